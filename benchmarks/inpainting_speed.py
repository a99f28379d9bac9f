"""Inpainting against plain diffusers, on the same fine-tuned model, in turns; and whether the pictures are as good.

    python -m benchmarks.inpainting_speed --data FOLDER/PH2

``tuned``: ``StableDiffusionInpaintPipeline`` as one would set it up who knows it well (DPM++ 2M, 20 steps, no guidance,
batch 8). ``authors``: their setting (DDIM, 50 steps, guidance 7.5, one at a time). Each paints 32 pairs, from the
background and the shape to the finished picture at its own size; ours also fits the composite it starts from, and with
it walks only the last fifth of its steps. ``from noise`` is ours with as many steps as tuned and nothing to start from:
what the code alone is worth. Then KID (Bińkowski et al., 2018, cubic kernel) of ``--crops`` lesion crops of ours and of
tuned against the real ones that neither saw, embedded by EfficientNet-Lite0, with an interval of the difference over
resampled halves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, StableDiffusionInpaintPipeline
from meddiff.contracts.recipes import override
from meddiff.science import encoders, geometry, inpainting, quality
from meddiff.science.foundation import Foundation
from meddiff.seeds import derive
from meddiff_services.pictures import Mask, Pixels
from numpy.typing import NDArray
from PIL import Image

from benchmarks.in_process import Generator
from benchmarks.sources import Case, cases_by_digest
from benchmarks.utility import RECIPE, fitted_model

PAIRS, BATCH = 32, 8
Embedded = NDArray[np.float32]


FROM_NOISE = {"inpainting": {"strength": 1.0, "solver_steps": 20, "kept_detail": 0}}


def ours(generator: Generator, seeds: Sequence[int], shapes: Sequence[Mask]) -> list[tuple[Pixels, Mask]]:
    canvases, _ = generator.canvases(seeds, shapes)
    images = inpainting.inpaint(generator.foundation, canvases, generator.recipe)
    return [(image, canvas.shape) for image, canvas in zip(images, canvases, strict=True)]


def plain(
    pipe: StableDiffusionInpaintPipeline,
    canvases: Sequence[inpainting.Canvas],
    px: int,
    batch: int,
    steps: int,
    guidance: float,
) -> list[tuple[Pixels, Mask]]:
    """Windows through the pipeline, pasted back inside the guide."""
    made = []
    for first in range(0, len(canvases), batch):
        some = canvases[first : first + batch]
        windows = [geometry.window_around(one.guide, RECIPE.inpainting.context) for one in some]
        views = [
            geometry.crop_window(np.broadcast_to(one.background, (*one.guide.shape, 3)), window)
            for one, window in zip(some, windows, strict=True)
        ]
        holes = [geometry.extend_window(one.guide, window) for one, window in zip(some, windows, strict=True)]
        painted = pipe(
            prompt=[RECIPE.finetuning.prompt] * len(some),
            image=[Image.fromarray(view).resize((px, px)) for view in views],
            mask_image=[Image.fromarray(255 * hole.astype(np.uint8)).resize((px, px)) for hole in holes],
            height=px,
            width=px,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(one.seed) for one in some],
        ).images
        for one, window, picture in zip(some, windows, painted, strict=True):
            native = np.asarray(picture.resize((window.side, window.side)))
            patch = native if one.background.shape[2] == 3 else native.mean(axis=2, keepdims=True).astype(np.uint8)
            made.append((geometry.paste(one.background, patch, window, one.guide), one.shape))
    return made


def pipeline(f: Foundation, scheduler: type[SchedulerMixin]) -> StableDiffusionInpaintPipeline:
    pipe = StableDiffusionInpaintPipeline(
        vae=f.vae,
        text_encoder=f.text_encoder,
        tokenizer=f.tokenizer,
        unet=f.unet,
        scheduler=scheduler.from_config(f.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --------------------------------------------------------------------------------------------------------------- KID


def embedded(encoder: encoders.Encoder, pairs: Sequence[tuple[Pixels, Mask]]) -> Embedded:
    found = []
    for image, mask in pairs:
        crop = quality.lesion_crop(image, mask, RECIPE.quality.context, RECIPE.quality.crop_px)
        coloured = np.broadcast_to(crop, (*crop.shape[:2], 3)).astype(np.float32) / 255
        found.append(encoder(torch.from_numpy(coloured.transpose(2, 0, 1).copy())[None])[0].numpy())
    return np.array(found)


def kid(one: Embedded, other: Embedded) -> float:
    """Unbiased squared MMD with the kernel (x·y / d + 1)³, of unit vectors scaled to length √d."""

    def kernel(a: Embedded, b: Embedded) -> NDArray[np.float64]:
        return (a.astype(np.float64) @ b.T + 1) ** 3

    n, m = len(one), len(other)
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(one, one), kernel(other, other))]
    return float(sum(within) - 2 * kernel(one, other).sum() / (n * m))


def difference(ours_: Embedded, tuned: Embedded, real: Embedded, resamples: int = 200) -> tuple[float, float, float]:
    """KID of ours less that of tuned: mean, and the 95 % interval over resampled halves of the crops."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        a, b = (
            x[rng.choice(len(x), len(x) // 2, replace=False)] for x in (ours_, tuned)
        )  # Without replacement: an equal pair of crops would bias the estimate.
        found.append(kid(a, real) - kid(b, real))
    low, high = np.quantile(found, [0.025, 0.975])
    return kid(ours_, real) - kid(tuned, real), float(low), float(high)


# -------------------------------------------------------------------------------------------------------------- runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--crops", type=int, default=512)
    parser.add_argument("--cache", type=Path, default=Path("out/utility"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    cases = [case for case in cases_by_digest(arguments.data).values() if case.mask.any()]
    recipe = override(RECIPE, {"work": {"inference_threads": 2, "training_threads": 2}})
    train: list[Case] = cases[: recipe.max_pairs]
    arguments.cache.mkdir(parents=True, exist_ok=True)
    fitted = fitted_model(train, [], recipe, 0, arguments.cache / f"{arguments.data.name}-speed.safetensors")
    generator = Generator(train, [], recipe, fitted)
    px = recipe.foundation.resolution
    schedulers = {"tuned": DPMSolverMultistepScheduler, "authors": DDIMScheduler}
    pipes = {name: pipeline(generator.foundation, scheduler) for name, scheduler in schedulers.items()}

    def seeds(turn: int, count: int) -> list[int]:
        return [derive("speed", turn, n) for n in range(count)]

    with torch.no_grad():
        taken: dict[str, list[float]] = {"ours": [], "from noise": [], "tuned": [], "authors": []}
        for turn in range(arguments.turns):
            some = seeds(turn, PAIRS)
            shapes = generator.shapes(some)
            canvases, _ = generator.canvases(some, shapes)
            ways: dict[str, Callable[[], object]] = {
                "ours": partial(ours, generator, some, shapes),
                "from noise": partial(inpainting.inpaint, generator.foundation, canvases, override(recipe, FROM_NOISE)),
                "tuned": partial(plain, pipes["tuned"], canvases, px, BATCH, 20, 1.0),
                "authors": partial(plain, pipes["authors"], canvases, px, 1, 50, 7.5),
            }
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                taken[name].append(time.perf_counter() - begun)
            print(f"turn {turn + 1}: " + ", ".join(f"{n} {v[-1]:.1f} s" for n, v in taken.items()), flush=True)
        for name in ("tuned", "authors"):
            ratio = np.array(taken[name]) / np.array(taken["ours"])
            print(f"c, {name} / ours: median {np.median(ratio):.2f}, {ratio.min():.2f} to {ratio.max():.2f}")
        ratio = np.array(taken["tuned"]) / np.array(taken["from noise"])
        print(f"tuned / ours from noise: median {np.median(ratio):.2f}, {ratio.min():.2f} to {ratio.max():.2f}")
        encoder = encoders.load_encoder("efficientnet-lite0", "builtin", torch.device("cpu"))
        real = embedded(encoder, [(case.image, case.mask) for case in cases[len(train) :]])
        many = seeds(99, arguments.crops)
        shapes = generator.shapes(many)
        mine = embedded(encoder, ours(generator, many, shapes))
        theirs = embedded(encoder, plain(pipes["tuned"], generator.canvases(many, shapes)[0], px, BATCH, 20, 1.0))
    mean, low, high = difference(mine, theirs, real)
    print(
        f"KID against {len(real)} real crops unseen, EfficientNet-Lite0, {len(mine)} crops each: "
        f"ours {kid(mine, real):.4f}, "
        f"tuned {kid(theirs, real):.4f}, difference {mean:+.4f} ({low:+.4f} to {high:+.4f})"
    )


if __name__ == "__main__":
    main()
