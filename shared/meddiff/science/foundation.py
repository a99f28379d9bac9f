"""The pretrained Stable Diffusion checkpoint: loaded, encoded and decoded with, saved as plain diffusers reads it.

Tensors of pixels are float (n, 3, h, w) in [-1, 1]; latents are (n, 4, h/f, w/f), already times the scaling factor.
Symbols follow eq. 1 of the paper: x_t = alpha_t X + beta_t epsilon, with alpha_t^2 + beta_t^2 = 1.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

import meddiff
from meddiff import hub

LARGE_PARAMETERS = 100_000_000
BUILTIN = Path(meddiff.__file__).parent / "foundations" / "small"


@dataclass
class Foundation:
    """The parts of a checkpoint on one device, all with float32 weights: the U-Net's are the master weights that
    training changes, and an autoencoder in bfloat16 would be off by a grey level. ``dtype`` is what the U-Net computes
    in (``autocast``)."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    source: str
    sha256: str
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """The context in which the U-Net runs."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def alpha_beta(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and beta_t (n, 1, 1, 1) of timesteps ``t`` (n,); t = -1 is the clean end, alpha 1 and beta 0."""
        steps = self.scheduler.alphas_cumprod.to(t.device)
        alpha_squared = torch.where(t < 0, torch.ones_like(steps[0]), steps[t.clamp(min=0)]).view(-1, 1, 1, 1)
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def predicted_clean(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """X-hat of eq. 1: the clean latents that the U-Net's prediction of noise, or of velocity, stands for."""
        alpha, beta = self.alpha_beta(t)
        if self.scheduler.config.prediction_type == "v_prediction":
            return alpha * noisy - beta * prediction
        return (noisy - beta * prediction) / alpha

    def loss_weight(self, t: Tensor) -> Tensor:
        """w_t of eq. 1 (n,): 1 / beta^2 for velocity and alpha^2 / beta^2 for noise. With it the squared error of X-hat
        is the squared error of what the U-Net predicts, the loss it was pretrained with."""
        alpha, beta = self.alpha_beta(t)
        weight = beta**-2 if self.scheduler.config.prediction_type == "v_prediction" else (alpha / beta) ** 2
        return weight.flatten()

    @property
    def sees_the_mask(self) -> bool:
        """Whether the graded mask and the masked image are among what the U-Net is given."""
        return int(self.unet.config.in_channels) > int(self.vae.config.latent_channels)

    def unet_input(self, noisy: Tensor, mask: Tensor, masked_latents: Tensor) -> Tensor:
        """What goes into the U-Net: noisy latents alone, or with the graded mask and the masked image's latents."""
        return torch.cat([noisy, mask, masked_latents], dim=1) if self.sees_the_mask else noisy


def load(source: str | Path, dtype: torch.dtype, device: torch.device, unet_folder: Path | None = None) -> Foundation:
    """A Stable Diffusion checkpoint, 9-channel inpainting or 4-channel, from ``"builtin"``, a folder in diffusers
    layout, or a hub id; safetensors only, of a part that has them in half precision alone those. ``unet_folder`` holds
    a U-Net to take instead of its own.

    Raises ``OSError`` where a part is missing and ``ValueError`` for a prediction type other than epsilon or velocity.
    """
    folder = _folder(source)

    def weights(part: Path) -> dict[str, Any]:
        return {"use_safetensors": True, "local_files_only": True, "variant": hub.variant_of(part)}

    scheduler = DDIMScheduler.from_pretrained(
        folder,
        subfolder="scheduler",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"the foundation predicts {scheduler.config.prediction_type}; epsilon or v_prediction can be used"
        )
    parts = (unet_folder or folder / "unet", folder / "vae", folder / "text_encoder")
    unet = UNet2DConditionModel.from_pretrained(parts[0], torch_dtype=torch.float32, **weights(parts[0]))
    vae = AutoencoderKL.from_pretrained(parts[1], torch_dtype=torch.float32, **weights(parts[1]))
    text_encoder = CLIPTextModel.from_pretrained(parts[2], dtype=torch.float32, **weights(parts[2]))
    for network in (unet, vae):  # Else a saved model names the folder on this machine.
        network.register_to_config(_name_or_path="")
    for network in (unet, vae, text_encoder):
        laid_out(network.requires_grad_(network is unet).eval().to(device))
    return Foundation(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True),
        scheduler=scheduler,
        source=str(source),
        sha256=digest(folder),
        device=device,
        dtype=dtype,
    )


def laid_out(network: nn.Module) -> None:
    """Puts the weights into the memory layout that trains faster (`docs/decisions/0022`): channels last, but on a CPU,
    where networks are large, contiguous: there weights, not activations, are what is moved."""
    parameters = list(network.parameters())
    large = sum(p.numel() for p in parameters) > LARGE_PARAMETERS
    if not large or parameters[0].device.type != "cpu":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _folder(source: str | Path) -> Path:
    if source == "builtin":
        return BUILTIN
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute():
        raise FileNotFoundError(f"no such folder: {source}")
    return hub.download(str(source))


def save(f: Foundation, folder: Path) -> None:
    """Write a folder that plain ``StableDiffusionInpaintPipeline.from_pretrained`` loads and paints with."""
    StableDiffusionInpaintPipeline(
        vae=f.vae,
        text_encoder=f.text_encoder,
        tokenizer=f.tokenizer,
        unet=f.unet,
        scheduler=f.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)


def digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of the weight files (``*.safetensors``) under a folder, in order of name."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def trailing_timesteps(count: int, total: int) -> Tensor:
    """``count`` timesteps (at most ``total``) from the last one down in equal steps (Lin et al., WACV 2024), and -1,
    the clean end."""
    return torch.cat([(total - torch.arange(count) * total / count).round().long() - 1, torch.tensor([-1])])


def vae_factor(f: Foundation) -> int:
    """Pixels to a latent cell, along an axis."""
    return int(2 ** (len(f.vae.config.block_out_channels) - 1))


@torch.no_grad()
def embed_prompt(f: Foundation, prompt: str) -> Tensor:
    """The text encoder's last hidden state (1, L, D); the prompt is padded to the encoder's length, always alike."""
    length = f.tokenizer.model_max_length
    tokens = f.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return f.text_encoder(tokens.input_ids.to(f.device))[0]


@torch.no_grad()
def encode(f: Foundation, images: Tensor) -> Tensor:
    """Latents of images: the mode of the posterior, times the scaling factor."""
    pixels = images.to(f.device, memory_format=torch.channels_last)
    return f.vae.encode(pixels).latent_dist.mode() * f.vae.config.scaling_factor


@torch.no_grad()
def decode(f: Foundation, latents: Tensor) -> Tensor:
    """Images of latents, clamped to [-1, 1]."""
    scaled = (latents / f.vae.config.scaling_factor).to(f.device, memory_format=torch.channels_last)
    return f.vae.decode(scaled).sample.clamp(-1, 1)
