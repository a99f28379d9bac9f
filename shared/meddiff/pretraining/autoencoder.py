"""The VAE of the built-in foundation: `AutoencoderKL`, 2 px to a latent cell, 4 channels, trained for PSNR."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from meddiff.drawing import paint, shape, texture
from meddiff.pretraining import pictures
from meddiff.pretraining.runs import Average, Run, cosine, save_atomically

SIDE = 128
CHANNELS = 4
KL_WEIGHT = 1e-4
L1_WEIGHT = 0.1


def build() -> AutoencoderKL:
    """0.6 M parameters; no attention, so any size that 2 divides goes through.

    Normalised over all channels at once: of a picture only one mean and one scale are forgotten, so a saturated tint
    survives. The latents start large beside the posterior's noise, without which the decoder long ignores them.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )
    with torch.no_grad():
        vae.quant_conv.weight[:CHANNELS] *= 6
        vae.quant_conv.bias[CHANNELS:] = -3
    return vae


def draw_tinted(rng: np.random.Generator, picture: NDArray[np.floating]) -> NDArray[np.uint8]:
    """A picture (h, w, 3) in [0, 1] as uint8, a third of the colour ones in a tint that nobody would think of."""
    if np.ptp(picture, axis=2).max() > 0.02 and rng.random() < 0.33:
        mix = np.eye(3) + rng.normal(0, 0.25, (3, 3))
        picture = (picture - 0.5) @ mix.T + 0.5 + rng.normal(0, 0.12, 3)
    return np.clip(np.rint(np.asarray(picture) * 255), 0, 255).astype(np.uint8)


def draw(seed: int, count: int, held_out: bool = False) -> NDArray[np.uint8]:
    """Pictures (count, 128, 128, 3), uint8: two thirds with a shape painted in, the rest plain backgrounds."""
    rng = np.random.default_rng(seed)
    photos = pictures.load(pictures.HELD_OUT if held_out else pictures.TRAINING)
    drawn = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for i in range(count):
        picture, _ = pictures.background(rng, photos, (SIDE, SIDE))
        if rng.random() < 0.66:
            filling = texture(rng, (SIDE, SIDE))
            picture = paint(rng, picture, shape(rng, (SIDE, SIDE)), filling, related=rng.random() < 0.7).picture
        drawn[i] = draw_tinted(rng, picture)
    return drawn


def draw_pool(count: int, workers: int = 2) -> Tensor:
    """A training pool, uint8 (count, 3, 128, 128), drawn by `workers` processes."""
    share = count // (4 * workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(draw, range(4 * workers), [share] * (4 * workers)))
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()


def to_model(pixels: Tensor) -> Tensor:
    """uint8 in 0..255 to float in -1..1."""
    return pixels.float() / 127.5 - 1


def batch(pool: Tensor, step: int) -> Tensor:
    """Of step `step`: 8 random windows of 64 px or, every third step, 2 whole pictures, flipped and turned."""
    rng = np.random.default_rng([7, step])
    side, count = (SIDE, 2) if step % 3 == 0 else (SIDE // 2, 8)
    windows = []
    for i in rng.integers(len(pool), size=count):
        top, left = rng.integers(SIDE - side + 1, size=2)
        window = torch.rot90(pool[i, :, top : top + side, left : left + side], int(rng.integers(4)), (1, 2))
        windows.append(window.flip(2) if rng.random() < 0.5 else window)
    return to_model(torch.stack(windows)).contiguous(memory_format=torch.channels_last)


def loss(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """L2 with a little L1 and KL, means over pixels (and over latent values for the KL)."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
    error = y.float() - x
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return error.square().mean() + L1_WEIGHT * error.abs().mean() + KL_WEIGHT * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """PSNR in dB (n,) of uint8 pictures (n, 3, h, w) through the posterior's mode and back to 8 bits."""
    values = []
    for one in pixels:
        y = vae.decode(vae.encode(to_model(one[None])).latent_dist.mode()).sample[0]
        back = ((y.clamp(-1, 1) + 1) * 127.5).round()
        values.append(10 * torch.log10(255**2 / (back - one.float()).square().mean()))
    return torch.stack(values)


@torch.no_grad()
def standardise(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Give each latent channel mean 0 and standard deviation 1 over uint8 pictures (n, 3, h, w), folded into the two
    1x1 convolutions around the latents: what is decoded stays the same, and no channel drowns in the diffusion's
    noise."""
    latents = torch.cat([vae.encode(to_model(x)).latent_dist.mode() for x in pixels.split(16)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    out, back = vae.quant_conv, vae.post_quant_conv
    out.weight[:CHANNELS] /= std.view(-1, 1, 1, 1)
    out.bias[:CHANNELS] = (out.bias[:CHANNELS] - mean) / std
    out.bias[CHANNELS:] -= 2 * std.log()
    back.bias += (back.weight[..., 0, 0] * mean).sum(1)
    back.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def averaged(average: Average) -> AutoencoderKL:
    vae = build().eval()
    vae.load_state_dict(average.weights)
    return vae


def train(out: Path, minutes: float, pool_size: int = 8000, lr: float = 1.5e-3) -> None:
    """Train for `minutes`, going on from `out/checkpoint.pt` if it is there; leaves `out/vae` in diffusers layout."""
    torch.manual_seed(0)
    run, vae = Run(out, minutes), build().to(memory_format=torch.channels_last)
    average, optimiser = Average(vae, 0.999), torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average.resume(state["average"])
        run.resume(state["run"])
    pool = draw_pool(pool_size)
    unseen = torch.from_numpy(draw(10**6, 24, held_out=True)).permute(0, 3, 1, 2)

    def save() -> None:
        parts = {"model": vae.state_dict(), "optimiser": optimiser.state_dict()}
        save_atomically({**parts, "average": average.state(), "run": run.state()}, checkpoint)

    quality = 0.0
    for step in run.clock():
        rate = cosine(run.share, lr, 1e-5)
        for group in optimiser.param_groups:
            group["lr"] = rate
        value = loss(vae, batch(pool, step))
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        average.update(vae)
        if (step + 1) % 500 == 0:
            quality = float(psnr(averaged(average), unseen).mean())
            save()
        run.note(value.item(), rate, psnr_unseen=quality)
    save()
    final = averaged(average)
    standardise(final, pool[:512])
    final.save_pretrained(out / "vae")
