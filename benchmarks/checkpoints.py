"""Where a fine-tune of the inpainter should end: by its loss on cases held aside, and by how much it copies.

    python -m benchmarks.checkpoints DATASET [--pairs 30]

Checkpoints are the ends of segments. At each, with averaged weights: eq. 1 on a fifth of the cases, which it did not
train on, and the share of the others' shapes that it fills with a copy of a lesion it was trained on, when they are
painted from noise into the next one's image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.recipes import CPU, Recipe, override
from meddiff.importing.pixels import encode_png
from meddiff.science import encoders, finetune, foundation, geometry, inpainting, quality
from meddiff.science.training import TrainingState
from meddiff.seeds import derive
from meddiff_services.pictures import Pixels

from benchmarks.foundation_gain import cached, split, unseen_loss
from benchmarks.in_process import DEVICE
from benchmarks.sources import Case

HELD_ASIDE = 0.2
COPIES = 0.1
FROM_NOISE = {"inpainting": {"strength": 1.0, "ring_strength": 1.0, "kept_detail": 0.0}}


@dataclass(frozen=True)
class Checkpoint:
    """Eq. 1 on the cases held aside after ``step`` steps, and the share of repainted lesions that are copies."""

    step: int
    loss: float
    copies: float


def best(found: Sequence[Checkpoint]) -> int:
    """The step of the lowest loss, among the checkpoints of which at most ``COPIES`` are copies or, where there is
    none, as few as of any."""
    least = max(COPIES, min(one.copies for one in found))
    return min((one for one in found if one.copies <= least), key=lambda one: one.loss).step


def measured(cases: Sequence[Case], healthy: Sequence[Pixels], recipe: Recipe, seed: int) -> list[Checkpoint]:
    """Every checkpoint of a fine-tune on four fifths of the cases."""
    order = np.random.default_rng(derive(seed, "held aside")).permutation(len(cases))
    aside = max(1, round(HELD_ASIDE * len(cases)))
    held, seen = ([cases[place] for place in some] for some in (order[:aside], order[aside:]))
    f = foundation.load(recipe.foundation.source, torch.float32, DEVICE)
    unseen = cached(f, held, override(recipe, {"finetuning": {"variants": 1}}))
    pairs = [(case.image, case.mask) for case in seen]
    cache = finetune.build_cache(f, pairs, healthy, recipe, derive(seed, "cache"), lambda *_: None)
    encoder = encoders.load_encoder(recipe.quality.encoder, recipe.quality.encoder_source, DEVICE)
    crops = [quality.lesion_crop(c.image, c.mask, recipe.quality.context, recipe.quality.crop_px) for c in seen]
    digests = [sha256_hex(encode_png(case.image)) for case in seen]
    reference = quality.calibrate(encoder, crops, digests, recipe.quality)
    state: TrainingState | None = None
    found = []
    steps = recipe.finetuning.steps
    for stop in [*range(recipe.finetuning.segment_steps, steps, recipe.finetuning.segment_steps), steps]:
        state = finetune.train(
            f, cache, recipe, derive(seed, "finetune"), "inpainter", state, stop, lambda _: None, bool
        )  # fmt: skip
        loss = unseen_loss(f, state.ema, unseen)
        found.append(Checkpoint(stop, loss, _copied(f, seen, recipe, reference, encoder)))
    return found


@torch.no_grad()
def _copied(
    f: foundation.Foundation,
    cases: Sequence[Case],
    recipe: Recipe,
    reference: quality.Reference,
    encoder: encoders.Encoder,
) -> float:
    """The share of paintings from noise that are judged to be copies: each case's shape in the next one's image, so
    that what is near to a real lesion is not its surroundings."""
    canvases = []
    for n, case in enumerate(cases):
        below = cases[(n + 1) % len(cases)]
        shape = geometry.resize_mask(case.mask, below.mask.shape)
        guide = geometry.guide_of(shape, recipe.inpainting.guide_margin, below.mask)
        canvases.append(inpainting.Canvas(below.image, shape, guide, None, derive("checkpoint", n)))
    images = inpainting.inpaint(f, canvases, override(recipe, FROM_NOISE))
    verdicts = [
        quality.judge(reference, encoder, image, canvas.shape, recipe.quality)
        for image, canvas in zip(images, canvases, strict=True)
    ]
    return float(np.mean([verdict.reason == "copy" for verdict in verdicts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases, _ = split(arguments.dataset, arguments.pairs)
    found = measured(cases, [], CPU, 0)
    print(f"{arguments.dataset.name}: {len(cases)} pairs, a fifth of them held aside")
    print("steps    " + "".join(f"{one.step:>8}" for one in found))
    print("eq. 1    " + "".join(f"{one.loss:8.4f}" for one in found))
    print("copies   " + "".join(f"{one.copies:8.2f}" for one in found))
    print(f"chosen: {best(found)}")


if __name__ == "__main__":
    main()
