"""A fine-tuning step at Stable Diffusion 1.5's size, against the authors' way and against the bare loop.

    THP_MEM_ALLOC_ENABLE=1 python -m benchmarks.finetune_speed

Random weights, 256 px, gradient checkpointing, float32 on the CPU. ``authors``: what their script does in each step
beside the U-Net's: two VAE encodings (image, masked image) and a text encoding. ``bare``: the U-Net forward and
backward and AdamW, on ready tensors. The large pages are what a worker asks for, and serve all three. All take turns in
one process; of each turn the second step is timed, for the first one allocates. Needs some 20 GiB: run it alone.
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
from meddiff.science import finetune
from meddiff.science.foundation import Foundation
from meddiff.science.training import StepLog
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

PX = 256
DEVICE = torch.device("cpu")
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


def sd15() -> Foundation:
    """Stable Diffusion 1.5's shapes with random weights: 860 M parameters in the U-Net."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    unet, vae = UNet2DConditionModel(**SD15_UNET), AutoencoderKL(**SD15_VAE)
    text = CLIPTextModel(SD15_TEXT)
    for network in (unet, vae, text):
        network.requires_grad_(network is unet).eval().to(memory_format=torch.channels_last)
    unet.enable_gradient_checkpointing()
    return Foundation(unet, vae, text, None, scheduler, "random", "", DEVICE, torch.float32)


def cached(batch: int) -> dict[str, Tensor]:
    """What our cache holds of ``batch`` examples."""
    cells = PX // 8
    return {
        "latents": torch.randn(batch, 4, cells, cells),
        "masked_latents": torch.randn(batch, 4, cells, cells),
        "mask": torch.ones(batch, 1, cells, cells),
        "loss_mask": torch.ones(batch, 1, cells, cells),
        "prompt_embeds": torch.randn(1, 77, 768),
    }


def our_step(f: Foundation, recipe: Recipe, cache: dict[str, Tensor]) -> float:
    """Seconds of the second step of a training."""
    steps: list[StepLog] = []

    def on_step(log: StepLog) -> None:
        steps.append(log)
        if len(steps) == 2:
            raise TurnOver

    with suppress(TurnOver):
        finetune.train(f, cache, recipe, 0, "inpainter", None, 2, on_step, lambda: False)
    return steps[1].seconds


def plain_step(f: Foundation, batch: int, encode: bool) -> float:
    """Seconds of the second step of a plain loop; with ``encode``, of one that encodes pixels and prompt itself."""
    optimiser = torch.optim.AdamW(f.unet.parameters(), lr=1e-5)
    cache, seconds = cached(batch), 0.0
    pixels = torch.rand(batch, 3, PX, PX) * 2 - 1
    tokens = torch.randint(0, 49408, (batch, 77))
    f.unet.train()
    for _ in range(2):
        begun = time.perf_counter()
        latents, masked, context = cache["latents"], cache["masked_latents"], cache["prompt_embeds"]
        context = context.expand(batch, -1, -1)
        if encode:
            with torch.no_grad():
                latents, masked = (f.vae.encode(x).latent_dist.sample() * 0.18215 for x in (pixels, pixels * 0.5))
                context = f.text_encoder(tokens).last_hidden_state
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (batch,))
        noisy = f.scheduler.add_noise(latents, noise, t)
        predicted = f.unet(torch.cat([noisy, cache["mask"], masked], dim=1), t, context).sample
        F.mse_loss(predicted, noise).backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds = time.perf_counter() - begun
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=2, help="the paper's is 2")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    f, batch = sd15(), arguments.batch
    print(f"U-Net of {sum(p.numel() for p in f.unet.parameters()) / 1e6:.0f} M parameters, batch {batch}, {PX} px")
    tuning = {"batch_size": batch, "learning_rate": 1e-5, "gradient_checkpointing": True, "steps": 2}
    recipe = override(CPU_RECIPE, {"finetuning": tuning})
    ways: dict[str, Callable[[], float]] = {
        "ours": lambda: our_step(f, recipe, cached(batch)),
        "authors": lambda: plain_step(f, batch, encode=True),
        "bare": lambda: plain_step(f, batch, encode=False),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.turns):
        for name, way in ways.items():
            taken[name].append(way())
        print(
            f"turn {turn + 1}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in taken.items()), flush=True
        )
    for name, other in (("a, authors / ours", "authors"), ("b, bare / ours", "bare")):
        ratios = np.array(taken[other]) / np.array(taken["ours"])
        print(f"{name}: median {np.median(ratios):.2f}, {ratios.min():.2f} to {ratios.max():.2f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
