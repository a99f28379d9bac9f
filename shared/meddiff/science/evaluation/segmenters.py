"""The segmenters that an evaluation trains: from a name to a module of images (n, 3, h, w) in [0, 1] to logits
(n, 1, h, w), h and w multiples of 32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.networks.nets import DynUNet as MonaiDynUNet
from torch import Tensor, nn

from meddiff.science.encoders import efficientnet_lite0


class Block(nn.Sequential):
    """Two 3 x 3 convolutions, each with batch normalisation and ReLU."""

    def __init__(self, wide: int, out: int) -> None:
        layers: list[nn.Module] = []
        for width in (wide, out):
            layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class Decoder(nn.Module):
    """Feature maps from fine to coarse, each half the size of the last, to logits of the finest one's size."""

    def __init__(self, widths: tuple[int, ...], decoded: tuple[int, ...]) -> None:
        super().__init__()
        below = (widths[-1], *decoded)
        skips = widths[-2::-1]
        self.blocks = nn.ModuleList(Block(b + s, d) for b, s, d in zip(below, skips, decoded, strict=False))
        self.head = nn.Conv2d(decoded[-1], 1, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        for block, skip in zip(self.blocks, features[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1))
        logits: Tensor = self.head(x)
        return logits


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al., MICCAI 2015), random weights: 1.2 M parameters."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128, 160)) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.decoder = Decoder(widths, widths[-2::-1])

    def forward(self, images: Tensor) -> Tensor:
        features: list[Tensor] = []
        x = 2 * images - 1
        for level, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if level else x)
            features.append(x)
        logits: Tensor = self.decoder(features)
        return logits


class EfficientNetUNet(nn.Module):
    """A U-Net on EfficientNet-Lite0 (Tan 2020) with ImageNet weights; logits at half size, enlarged smoothly."""

    def __init__(self, decoded: tuple[int, ...] = (64, 48, 32, 16)) -> None:
        super().__init__()
        self.encoder = efficientnet_lite0()
        self.decoder = Decoder((16, 24, 40, 112, 320), decoded)

    def forward(self, images: Tensor) -> Tensor:
        network = self.encoder
        x = network._swish(network._bn0(network._conv_stem((images * 255 - 127) / 128)))
        features: list[Tensor] = []
        for block in network._blocks:
            after = block(x)
            if after.shape[-1] < x.shape[-1]:
                features.append(x)
            x = after
        logits = self.decoder([*features, x])
        return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)


class DynUNet(nn.Module):
    """The U-Net that nnU-Net would plan for a small image (Isensee et al., Nature Methods 2021), as MONAI builds it:
    instance normalisation, strided convolutions, random weights."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128, 160)) -> None:
        super().__init__()
        strides = (1, *(2,) * (len(widths) - 1))
        self.network = MonaiDynUNet(
            2, 3, 1, kernel_size=(3,) * len(widths), strides=strides, upsample_kernel_size=strides[1:], filters=widths
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(2 * images - 1)
        return logits


SEGMENTERS: dict[str, Callable[[], nn.Module]] = {
    "unet": UNet,
    "efficientnet-unet": EfficientNetUNet,
    "dynunet": DynUNet,
}


def build(name: str, seed: int) -> nn.Module:
    """The segmenter of that name; what is not pretrained is drawn from ``seed``. Raises ``ValueError`` for another
    name."""
    if name not in SEGMENTERS:
        raise ValueError(f"unknown segmenter {name!r}; there are {', '.join(SEGMENTERS)}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return SEGMENTERS[name]()
