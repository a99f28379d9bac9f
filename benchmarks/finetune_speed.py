"""A fine-tuning step at Stable Diffusion 1.5's size, against the authors' way and against the bare loop.

    THP_MEM_ALLOC_ENABLE=1 python -m benchmarks.finetune_speed
    python -m benchmarks.finetune_speed --px 512 --bfloat16 --steps 12

Random weights, gradient checkpointing, float32 unless told otherwise; on the first GPU where there is one.
``authors``: what their script does in each step beside the U-Net's: two VAE encodings (image, masked image) and a text
encoding; every block is computed again for its gradient, as diffusers' switch has it. ``bare``: the U-Net forward and
backward and AdamW, on ready tensors; computed again is what ours does again. The large pages that a worker asks for
serve all three, and so does the layout of the U-Net's weights. All take turns in one process; of each turn the first
step is not timed, for it allocates. On a CPU it needs some 20 GiB: run it alone.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from meddiff.contracts.recipes import CPU as CPU_RECIPE
from meddiff.contracts.recipes import Recipe, override
from meddiff.science import finetune, foundation
from meddiff.science.foundation import Foundation
from meddiff.science.training import StepLog
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.in_process import DEVICE

SD15_UNET = {"sample_size": 64, "in_channels": 9, "cross_attention_dim": 768, "attention_head_dim": 8}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD15_TEXT = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
)  # fmt: skip


class TurnOver(Exception):
    """Ends a training from within, before it copies its state."""


def sd15(dtype: torch.dtype) -> Foundation:
    """Stable Diffusion 1.5's shapes with random weights: 860 M parameters in the U-Net."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    unet, vae = UNet2DConditionModel(**SD15_UNET), AutoencoderKL(**SD15_VAE)
    text = CLIPTextModel(SD15_TEXT)
    for network in (unet, vae, text):
        network.requires_grad_(network is unet).eval().to(DEVICE)
    foundation.laid_out(unet)
    return Foundation(unet, vae, text, None, scheduler, "random", "", DEVICE, dtype)


def now() -> float:
    """The clock, when all that was asked of the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def cached(batch: int, px: int) -> dict[str, Tensor]:
    """What our cache holds of ``batch`` examples."""
    cells = px // 8
    return {
        "latents": torch.randn(batch, 4, cells, cells),
        "masked_latents": torch.randn(batch, 4, cells, cells),
        "mask": torch.ones(batch, 1, cells, cells),
        "loss_mask": torch.ones(batch, 1, cells, cells),
        "prompt_embeds": torch.randn(1, 77, 768),
    }


def our_step(f: Foundation, recipe: Recipe, cache: dict[str, Tensor]) -> float:
    """Mean seconds of a training's steps but the first."""
    ends: list[float] = []

    def on_step(log: StepLog) -> None:
        if log.step in (1, log.total):
            ends.append(now())
        if log.step == log.total:
            raise TurnOver

    steps = recipe.finetuning.steps
    with suppress(TurnOver):
        finetune.train(f, cache, recipe, 0, "inpainter", None, steps, on_step, lambda: False)
    return (ends[1] - ends[0]) / (steps - 1)


def plain_step(f: Foundation, batch: int, px: int, steps: int, encode: bool) -> float:
    """Mean seconds of a plain loop's steps but the first; with ``encode``, it encodes pixels and prompt itself."""
    optimiser = torch.optim.AdamW(f.unet.parameters(), lr=1e-5)
    cache = {name: tensor.to(DEVICE) for name, tensor in cached(batch, px).items()}
    pixels = torch.rand(batch, 3, px, px, device=DEVICE) * 2 - 1
    tokens = torch.randint(0, 49408, (batch, 77), device=DEVICE)
    f.unet.train()
    f.unet.enable_gradient_checkpointing(None if encode else finetune.recomputed_at(cache["mask"][0].numel()))
    for step in range(steps):
        if step == 1:
            begun = now()
        latents, masked, context = cache["latents"], cache["masked_latents"], cache["prompt_embeds"]
        context = context.expand(batch, -1, -1)
        if encode:
            with torch.no_grad(), f.autocast():
                latents, masked = (f.vae.encode(x).latent_dist.sample() * 0.18215 for x in (pixels, pixels * 0.5))
                context = f.text_encoder(tokens).last_hidden_state
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (batch,), device=DEVICE)
        noisy = f.scheduler.add_noise(latents, noise, t)
        with f.autocast():
            predicted = f.unet(torch.cat([noisy, cache["mask"], masked], dim=1), t, context).sample
        F.mse_loss(predicted.float(), noise).backward()
        optimiser.step()
        optimiser.zero_grad()
    return (now() - begun) / (steps - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=2, help="the paper's is 2")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--bfloat16", action="store_true", help="what the U-Net computes in")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    f = sd15(torch.bfloat16 if arguments.bfloat16 else torch.float32)
    batch, px, steps = arguments.batch, arguments.px, arguments.steps
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    size = sum(p.numel() for p in f.unet.parameters()) / 1e6
    print(f"U-Net of {size:.0f} M parameters, batch {batch}, {px} px, {f.dtype}, {where}")
    tuning = {"batch_size": batch, "learning_rate": 1e-5, "gradient_checkpointing": True, "steps": steps}
    recipe = override(CPU_RECIPE, {"finetuning": tuning})
    ways: dict[str, Callable[[], float]] = {
        "ours": lambda: our_step(f, recipe, cached(batch, px)),
        "authors": lambda: plain_step(f, batch, px, steps, encode=True),
        "bare": lambda: plain_step(f, batch, px, steps, encode=False),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.turns):
        for name, way in ways.items():
            taken[name].append(way())
        print(
            f"turn {turn + 1}: " + ", ".join(f"{name} {values[-1]:.3f} s" for name, values in taken.items()), flush=True
        )
    for name, other in (("a, authors / ours", "authors"), ("b, bare / ours", "bare")):
        ratios = np.array(taken[other]) / np.array(taken["ours"])
        print(f"{name}: median {np.median(ratios):.2f}, {ratios.min():.2f} to {ratios.max():.2f}")
    on_card = DEVICE.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_card else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
