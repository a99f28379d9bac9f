"""The U-Net and text encoder of the built-in foundation, trained on the task itself: painting one texture into a shape
and the surroundings into the ring around it, over textures and pictures that are drawn or lie in installed packages."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from meddiff.drawing import Picture, paint, shape, texture
from meddiff.pretraining import pictures, prompts
from meddiff.pretraining.autoencoder import SIDE, draw_tinted, to_model
from meddiff.pretraining.runs import Average, Run, cosine, save_atomically
from meddiff.science import geometry

REPAIR_SHARE = 0.25
OUTSIDE_WEIGHT = 0.1
WIDTH = 64
FACTOR = 2
CELLS = SIDE // FACTOR
BATCH = 16


def build_unet() -> UNet2DConditionModel:
    """7.3 M parameters; 64 x 64 latents, attention at 8 x 8. Few groups, so that a colour is not normalised away."""
    return UNet2DConditionModel(
        sample_size=CELLS,
        in_channels=9,
        out_channels=4,
        block_out_channels=(32, 64, 128, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=4,
    )


def build_text_encoder(vocabulary: int, end: int) -> CLIPTextModel:
    """Two layers of 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=prompts.LENGTH,
            eos_token_id=end,
            bos_token_id=end - 1,
            pad_token_id=end,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas at zero terminal SNR, v-prediction, trailing steps (Lin et al., WACV 2024)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        steps_offset=1,
    )


# ----------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """A picture (128, 128, 3) uint8, the shape in it and the guide around it (128, 128), and a caption."""

    picture: NDArray[np.uint8]
    shape: NDArray[np.bool_]
    guide: NDArray[np.bool_]
    caption: str


def draw(seed: int, count: int, held_out: bool = False) -> list[Sample]:
    """Samples of the task. A quarter are repair: no shape, and the guide lies over a plain background."""
    rng = np.random.default_rng([11, seed])
    photos = pictures.load(pictures.HELD_OUT if held_out else pictures.TRAINING)
    return [_draw(rng, photos) for _ in range(count)]


def _draw(rng: np.random.Generator, photos: list[Picture]) -> Sample:
    size = (SIDE, SIDE)
    picture, kind = pictures.background(rng, photos, size)
    mask = shape(rng, size, area=(0.01, 0.35))
    diameter = geometry.equivalent_diameter(mask)
    margin = diameter * rng.choice([0.0, rng.uniform(0.02, 0.12), rng.uniform(0.1, 0.35)], p=[0.25, 0.4, 0.35])
    guide = geometry.dilate(mask, margin)
    if rng.random() < 0.15:
        guide |= shape(rng, size, area=(0.01, 0.1))
    if rng.random() < REPAIR_SHARE:
        caption = prompts.healthy(rng, kind)
        mask = np.zeros_like(mask)
    else:
        lesion = paint(rng, picture, mask, texture(rng, size), related=rng.random() < 0.8)
        picture, caption = lesion.picture, prompts.lesion(rng, lesion.words, kind)
    return Sample(draw_tinted(rng, picture), mask, guide, caption)


@dataclass(frozen=True)
class Pool:
    """Samples as the U-Net reads them: latents (n, 4, 64, 64) and masked-image latents, graded mask (n, 1, 64, 64),
    loss weight (n, 1, 64, 64), tokens (n, 32)."""

    latents: Tensor
    masked: Tensor
    mask: Tensor
    weight: Tensor
    tokens: Tensor


@torch.no_grad()
def encode(vae: AutoencoderKL, samples: list[Sample]) -> Pool:
    """The samples through the VAE, once."""
    scale, tokenizer = vae.config.scaling_factor, prompts.tokenizer()
    latents, masked = [], []
    for first in range(0, len(samples), 32):
        some = samples[first : first + 32]
        x = to_model(torch.from_numpy(np.stack([s.picture for s in some])).permute(0, 3, 1, 2)).contiguous()
        kept = torch.from_numpy(np.stack([~s.guide for s in some]))[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            latents.append((vae.encode(x).latent_dist.mode() * scale).half())
            masked.append((vae.encode(x * kept).latent_dist.mode() * scale).half())
    graded = np.stack([geometry.condition_mask(s.shape, s.guide, FACTOR) for s in samples])[:, None]
    near = np.stack([geometry.dilate(geometry.guide_cells(s.guide, FACTOR), 1) for s in samples])[:, None]
    weight = np.maximum(near, OUTSIDE_WEIGHT).astype(np.float16)
    tokens = tokenizer([s.caption for s in samples], padding="max_length", truncation=True, return_tensors="pt")
    return Pool(
        torch.cat(latents),
        torch.cat(masked),
        torch.from_numpy(graded).half(),
        torch.from_numpy(weight),
        tokens.input_ids,
    )


def draw_pool(vae: AutoencoderKL, count: int, workers: int = 2) -> Pool:
    """``count`` samples drawn by ``workers`` processes, encoded."""
    share = count // (4 * workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(draw, range(4 * workers), [share] * (4 * workers)))
    return encode(vae, [sample for part in parts for sample in part])


def batch(pool: Pool, step: int) -> Pool:
    """16 samples of step ``step``."""
    chosen = torch.from_numpy(np.random.default_rng([13, step]).integers(len(pool.latents), size=BATCH))
    latents, masked, mask, weight = (
        field[chosen].float() for field in (pool.latents, pool.masked, pool.mask, pool.weight)
    )
    return Pool(latents, masked, mask, weight, pool.tokens[chosen])


# ---------------------------------------------------------------------------------------------------------- training


def loss(networks: nn.ModuleDict, scheduler: DDIMScheduler, some: Pool, step: int) -> Tensor:
    """Squared error of the predicted velocity, weighted: 1 in the guide and a cell around it, 0.1 elsewhere."""
    draw_from = torch.Generator().manual_seed(step)
    noise = torch.randn(some.latents.shape, generator=draw_from)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(noise),), generator=draw_from)
    noisy, target = scheduler.add_noise(some.latents, noise, t), scheduler.get_velocity(some.latents, noise, t)
    inputs = torch.cat([noisy, some.mask, some.masked], dim=1).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        context = networks["text_encoder"](some.tokens)[0]
        predicted = networks["unet"](inputs, t, context).sample.float()
    squared = (some.weight * (predicted - target).square()).sum(dim=(1, 2, 3))
    return (squared / (4 * some.weight.sum(dim=(1, 2, 3)))).mean()


def train(out: Path, minutes: float, pool_size: int = 8000, lr: float = 1e-3) -> None:
    """Train for ``minutes`` from ``out/autoencoder/vae``, going on from ``out/inpainter/checkpoint.pt``."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(out / "autoencoder" / "vae").eval()
    tokenizer, scheduler = prompts.tokenizer(), build_scheduler()
    text_encoder = build_text_encoder(len(tokenizer), tokenizer.eos_token_id)
    networks = nn.ModuleDict({"unet": build_unet(), "text_encoder": text_encoder})
    networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    networks["unet"].compile()
    run, average = Run(out / "inpainter", minutes), Average(networks, 0.9995)
    optimiser = torch.optim.AdamW(networks.parameters(), lr=lr, weight_decay=1e-3, fused=True)
    checkpoint = out / "inpainter" / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        networks.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average.resume(state["average"])
        run.resume(state["run"])
    pool = draw_pool(vae, pool_size)

    def save() -> None:
        parts = {"model": networks.state_dict(), "optimiser": optimiser.state_dict()}
        save_atomically({**parts, "average": average.state(), "run": run.state()}, checkpoint)

    for step in run.clock():
        rate = cosine(run.share, lr, 1e-5)
        for group in optimiser.param_groups:
            group["lr"] = rate
        value = loss(networks, scheduler, batch(pool, step), step)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimiser.step()
        average.update(networks)
        if (step + 1) % 500 == 0:
            save()
        run.note(value.item(), rate)
    save()


def publish(out: Path, folder: Path) -> None:
    """The averaged weights of ``out`` as an fp16 Stable Diffusion inpainting checkpoint in ``folder``, swapped in."""
    average = torch.load(out / "inpainter" / "checkpoint.pt", weights_only=True)["average"]["weights"]
    tokenizer = prompts.tokenizer()
    networks = nn.ModuleDict(
        {"unet": build_unet(), "text_encoder": build_text_encoder(len(tokenizer), tokenizer.eos_token_id)}
    )
    networks.load_state_dict(average, strict=False)
    pipeline = StableDiffusionInpaintPipeline(
        vae=AutoencoderKL.from_pretrained(out / "autoencoder" / "vae"),
        text_encoder=networks["text_encoder"],
        tokenizer=tokenizer,
        unet=networks["unet"],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    fresh = folder.with_name(f"{folder.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)
