"""Inpainting at Stable Diffusion 1.5's size on a GPU, against plain diffusers with the same random weights, in turns.

    python -m benchmarks.sd15_inpainting

32 pairs at 512 px, from backgrounds and shapes to finished pictures at their own size. ``ours``: the gpu recipe.
``ours, as tuned``: as many steps as ``tuned`` and no guidance. ``tuned`` and ``authors`` are those of
``inpainting_speed``, in bfloat16 throughout; authors' paints 8 pairs, and its time is taken four times. Of random
weights the time is that of trained ones; the pictures are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from meddiff.contracts.recipes import GPU, Recipe, override
from meddiff.science import foundation, geometry, inpainting
from meddiff.science.foundation import Foundation
from meddiff_services.pictures import Mask, Pixels
from transformers import CLIPTokenizer

from benchmarks.finetune_speed import now, sd15
from benchmarks.in_process import DEVICE
from benchmarks.inpainting_speed import BATCH, PAIRS, pipeline, plain

PX = GPU.foundation.resolution
SHARE = 4
AS_TUNED = override(GPU, {"inpainting": {"solver_steps": 20, "guidance_scale": 1.0, "strength": 1.0}})


def canvases() -> list[inpainting.Canvas]:
    """Discs on grey noise, 600 x 800 pixels."""
    rng = np.random.default_rng(0)
    found = []
    for n in range(PAIRS):
        rows, columns = np.ogrid[:600, :800]
        shape: Mask = np.asarray(np.hypot(rows - rng.uniform(200, 400), columns - rng.uniform(250, 550)) < 90)
        image: Pixels = rng.integers(90, 200, (600, 800, 3), dtype=np.uint8)
        guide = geometry.guide_of(shape, GPU.inpainting.guide_margin)
        start = inpainting.fit_lesion(image, shape, guide, image, shape)
        found.append(inpainting.Canvas(image, shape, guide, start, n))
    return found


def with_prompts() -> Foundation:
    """Random weights, and the built-in tokenizer at the length of Stable Diffusion's."""
    f = sd15(torch.bfloat16)
    f.tokenizer = CLIPTokenizer.from_pretrained(foundation.BUILTIN, subfolder="tokenizer", model_max_length=77)
    return f


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args(argv)
    f, other, some = with_prompts(), with_prompts(), canvases()
    tuned, authors = (
        pipeline(other, scheduler).to(DEVICE, torch.bfloat16)
        for scheduler in (DPMSolverMultistepScheduler, DDIMScheduler)
    )

    def ours(recipe: Recipe) -> object:
        return inpainting.inpaint(f, some, recipe)

    ways: dict[str, Callable[[], object]] = {
        "ours": partial(ours, GPU),
        "ours, as tuned": partial(ours, AS_TUNED),
        "tuned": partial(plain, tuned, some, PX, BATCH, 20, 1.0),
        "authors": partial(plain, authors, some[: PAIRS // SHARE], PX, 1, 50, 7.5),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        inpainting.inpaint(f, some[:BATCH], AS_TUNED)
        for turn in range(arguments.turns):
            for name, way in ways.items():
                begun = now()
                way()
                taken[name].append((now() - begun) * (SHARE if name == "authors" else 1))
            print(f"turn {turn + 1}: " + ", ".join(f"{n} {v[-1]:.1f} s" for n, v in taken.items()), flush=True)
    for mine in ("ours", "ours, as tuned"):
        for name in ("tuned", "authors"):
            ratio = np.array(taken[name]) / np.array(taken[mine])
            print(f"{name} / {mine}: median {np.median(ratio):.2f}, {ratio.min():.2f} to {ratio.max():.2f}")
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{torch.cuda.get_device_name()}, {peak:.1f} GiB at most, of which the pipelines' own networks 2")


if __name__ == "__main__":
    main(sys.argv[1:])
