"""Fine-tuning the guided inpainter on about thirty pairs (section 2.1 of the paper, eq. 1).

The paper's reading takes the lesion's own mask as the guide and, for a second U-Net that repairs, the inverted mask.
By default one U-Net learns both: guides wider than the shape by a random margin, and holes in healthy tissue that are
painted as healthy. The graded mask channel tells it which is which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meddiff.contracts.manifest import Window
from meddiff.contracts.recipes import Recipe
from meddiff.science import geometry
from meddiff.science.foundation import Foundation, embed_prompt, encode, vae_factor
from meddiff.science.geometry import Field, Image, Mask, Pixels
from meddiff.science.training import StepLog, TrainingState, share_of, train_segment, warmup
from meddiff.seeds import derive

ENCODED_AT_ONCE = 8
PLACEMENTS = 30


@dataclass(frozen=True)
class Example:
    """A training example at native size: image (H, W, C), shape and guide (H, W). What is guide and not shape is to be
    painted as healthy tissue."""

    image: Image
    shape: Mask
    guide: Mask


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Eq. 1: w_t ||M (X-hat - X)||^2, per example divided by the area of its mask, then the mean over examples.

    prediction, target: (n, c, h, w); mask: (n, 1, h, w) in [0, 1]; weight: (n,). An empty mask counts 0.
    """
    squared = (mask * (prediction - target).square()).sum(dim=(1, 2, 3))
    area = mask.sum(dim=(1, 2, 3)).clamp(min=1) * target.shape[1]
    return (weight * squared / area).mean()


# ------------------------------------------------------------------------------------------------------------ cache


def build_cache(
    f: Foundation,
    pairs: Sequence[tuple[Image, Mask]],
    backgrounds: Sequence[Image],
    recipe: Recipe,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """Everything training reads, computed once: ``variants`` augmented examples of each pair, through VAE and text
    encoder. The first variant of a pair is the pair as it is.

    Returns CPU tensors ``latents`` and ``masked_latents`` (n, 4, h, w), ``mask`` (n, 1, h, w) graded in [0, 1],
    ``loss_mask`` (n, 1, h, w) and ``prompt_embeds`` (1, L, D); where there is a second U-Net also ``repair/latents``
    and so on for it. ``progress`` gets examples done and in all.
    """
    settings = recipe.finetuning
    parts = ["", "repair/"] if recipe.has_second_unet(len(backgrounds)) else [""]
    drawn = [(case, variant) for case in range(len(pairs)) for variant in range(settings.variants)]
    cache = {"prompt_embeds": embed_prompt(f, settings.prompt).cpu()}

    def prepared(part: str, case: int, variant: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(derive(seed, "example", case, variant))
        first = variant == 0
        example = _inverted(*pairs[case]) if part else _example(pairs, backgrounds, case, recipe, rng, as_it_is=first)
        return prepare(vae_factor(f), example, recipe, rng, as_it_is=first)

    for n, part in enumerate(parts):
        encoded: list[dict[str, Tensor]] = []
        for first in range(0, len(drawn), ENCODED_AT_ONCE):
            some = drawn[first : first + ENCODED_AT_ONCE]
            encoded.append(_encode(f, [prepared(part, case, variant) for case, variant in some]))
            progress(n * len(drawn) + first + len(some), len(parts) * len(drawn))
        cache |= {part + name: torch.cat([chunk[name] for chunk in encoded]) for name in encoded[0]}
    return cache


def _example(
    pairs: Sequence[tuple[Image, Mask]],
    backgrounds: Sequence[Image],
    case: int,
    recipe: Recipe,
    rng: np.random.Generator,
    as_it_is: bool,
) -> Example:
    """A lesion with a guide of random margin; for ``repair_share`` of the examples a hole in healthy tissue instead,
    and for as many again such a hole as well, as in a guide that also covers an old lesion."""
    own = image, mask = pairs[case]
    margin = float(rng.uniform(*recipe.finetuning.guide_margin))
    lesion_guide = geometry.guide_of(mask, margin)
    share = recipe.finetuning.repair_share
    kind = 1.0 if as_it_is else float(rng.random())
    if as_it_is or kind >= 2 * share:
        return Example(image, mask, lesion_guide)
    stamp = pairs[int(rng.integers(len(pairs)))][1]
    if kind < share and backgrounds and rng.random() < 0.5:
        image = backgrounds[int(rng.integers(len(backgrounds)))]
        mask = np.zeros(image.shape[:2], np.bool_)
    lesion = geometry.dilate(mask, 0.05 * geometry.equivalent_diameter(mask))
    hole = hole_beside(stamp, lesion, rng)
    if hole is None:
        return Example(*own, lesion_guide)
    hole = geometry.guide_of(hole, margin) & ~lesion
    return Example(image, np.zeros_like(hole), hole) if kind < share else Example(image, mask, lesion_guide | hole)


def hole_beside(stamp: Mask, forbidden: Mask, rng: np.random.Generator) -> Mask | None:
    """Another case's mask, turned and scaled, somewhere in (H, W) where it touches nothing forbidden; None if a number
    of tries, ever smaller, find no place."""
    form = _crop_to_box(_dihedral(stamp, int(rng.integers(8))))
    height, width = forbidden.shape
    larger = min(max(form.shape), 0.6 * min(height, width))
    for attempt in range(PLACEMENTS):
        side = larger * 0.95**attempt * rng.uniform(0.6, 1.0)
        size = (
            max(4, round(side * form.shape[0] / max(form.shape))),
            max(4, round(side * form.shape[1] / max(form.shape))),
        )
        top, left = rng.integers(0, height - size[0] + 1), rng.integers(0, width - size[1] + 1)
        placed = geometry.resize_mask(form, size)
        here = (slice(top, top + size[0]), slice(left, left + size[1]))
        if placed.any() and not (forbidden[here] & placed).any():
            hole = np.zeros_like(forbidden)
            hole[here] = placed
            return hole
    return None


def _crop_to_box(mask: Mask) -> Mask:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _inverted(image: Image, mask: Mask) -> Example:
    """The paper's example for the U-Net that repairs: everything but the lesion is painted."""
    return Example(image, ~mask, ~mask)


def prepare(
    factor: int, example: Example, recipe: Recipe, rng: np.random.Generator, as_it_is: bool
) -> dict[str, Tensor]:
    """One augmented window at the model's resolution, image and masks through the same transform."""
    resolution = recipe.foundation.resolution
    turn = 0 if as_it_is else int(rng.integers(8))
    image = _dihedral(example.image, turn)
    shape, guide = _dihedral(example.shape, turn), _dihedral(example.guide, turn)
    window = geometry.window_around(guide, recipe.inpainting.context)
    if not as_it_is:
        window = _jittered(window, guide, rng)
    size = (resolution, resolution)
    pixels = geometry.resize_image(geometry.crop_window(image, window).astype(np.float32), size)
    if not as_it_is:
        pixels = _recoloured(pixels, rng)
    real = geometry.resize_mask(geometry.crop_window(np.ones_like(guide), window), size)
    shape, guide = (geometry.resize_mask(geometry.extend_window(mask, window), size) for mask in (shape, guide))
    guide |= shape
    tensor = as_model_input(pixels)
    kept = torch.from_numpy(~guide)
    cells = geometry.guide_cells(guide, factor)
    edge = geometry.guide_cells(shape, factor) & geometry.guide_cells(~shape, factor)
    weight = np.where(cells, 1.0, recipe.finetuning.outside_weight) + recipe.finetuning.edge_weight * edge
    weight *= ~geometry.guide_cells(~real, factor)
    return {
        "image": tensor,
        "masked": tensor * kept,
        "mask": torch.from_numpy(geometry.condition_mask(shape, guide, factor))[None],
        "loss_mask": torch.from_numpy(weight.astype(np.float32))[None],
    }


def as_model_input(pixels: Field) -> Tensor:
    """Pixels (h, w, C) in 0..255, grey or colour, as (3, h, w) in [-1, 1]."""
    colour = np.broadcast_to(np.clip(pixels, 0, 255), (*pixels.shape[:2], 3))
    return torch.from_numpy(np.ascontiguousarray(colour.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1)


def _encode(f: Foundation, prepared: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    stacked = {name: torch.stack([p[name] for p in prepared]) for name in prepared[0]}
    return {
        "latents": encode(f, stacked["image"]).cpu(),
        "masked_latents": encode(f, stacked["masked"]).cpu(),
        "mask": stacked["mask"],
        "loss_mask": stacked["loss_mask"],
    }


def _dihedral(array: Pixels, turn: int) -> Pixels:
    """One of the square's eight symmetries: quarter turns, for 4 to 7 of the mirror image."""
    turned = np.rot90(array, turn % 4)
    return turned[:, ::-1] if turn >= 4 else turned


def _jittered(window: Window, guide: Mask, rng: np.random.Generator) -> Window:
    """A window up to 30 % wider or narrower, and shifted, that still holds the guide."""
    rows, columns = np.flatnonzero(guide.any(axis=1)), np.flatnonzero(guide.any(axis=0))
    needed = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = int(np.clip(round(window.side * rng.uniform(0.8, 1.3)), needed, max(guide.shape)))

    def first(low: int, high: int, length: int) -> int:
        """Start of an axis: the guide inside, and inside the image where that is long enough."""
        if side >= length:
            return (length - side) // 2
        return int(rng.integers(max(high + 1 - side, 0), min(low, length - side) + 1))

    return Window(
        top=first(int(rows[0]), int(rows[-1]), guide.shape[0]),
        left=first(int(columns[0]), int(columns[-1]), guide.shape[1]),
        side=side,
    )


def _recoloured(pixels: Field, rng: np.random.Generator) -> Field:
    """Mild changes of contrast, brightness and, where there is colour, of its balance; values stay about 0..255."""
    mean = pixels.mean(axis=(0, 1))
    balance = rng.normal(0, 4, pixels.shape[2]) if pixels.shape[2] == 3 else 0
    moved = mean + (pixels - mean) * rng.uniform(0.9, 1.1) + rng.normal(0, 8) + balance
    recoloured: Field = np.clip(moved, 0, 255).astype(np.float32)
    return recoloured


# --------------------------------------------------------------------------------------------------------- training


def recomputed_at(cells: int) -> Callable[..., Tensor]:
    """Gradient checkpointing of the blocks that work on ``cells`` positions or more, for diffusers' networks. At the
    U-Net's finest level lies most of the activations' memory; coarser blocks keep theirs and are not computed twice."""

    def run(block: nn.Module, *inputs: Tensor) -> Tensor:
        features = inputs[0]
        positions = features.shape[1] if features.ndim == 3 else features[0, 0].numel()
        result: Tensor = block(*inputs) if positions < cells else checkpoint(block, *inputs, use_reentrant=False)
        return result

    return run


def train(
    f: Foundation,
    cache: dict[str, Tensor],
    recipe: Recipe,
    seed: int,
    part: str,
    state: TrainingState | None,
    stop_step: int,
    on_step: Callable[[StepLog], None],
    should_stop: Callable[[], bool],
) -> TrainingState:
    """Train the U-Net from ``state`` (None: the foundation's weights) up to ``stop_step``, on the examples of ``part``:
    ``inpainter`` or, where the recipe has a second U-Net, ``repair``. ``f.unet`` holds the last weights afterwards."""
    settings = recipe.finetuning
    prefix = "repair/" if part == "repair" else ""
    examples = {name: cache[prefix + name].float() for name in ("latents", "masked_latents", "mask", "loss_mask")}
    prompt = cache["prompt_embeds"].float()
    last_timestep = f.scheduler.config.num_train_timesteps - 1
    if settings.gradient_checkpointing:
        f.unet.enable_gradient_checkpointing(recomputed_at(examples["mask"][0].numel()))

    def loss_at(unet: nn.Module, step: int, accelerator: Accelerator) -> Tensor:
        """Eq. 1 on this process's share of the step's batch. Timesteps are uniform, one in each of as many strata."""
        draw = torch.Generator().manual_seed(derive(seed, part, step))
        batch = settings.batch_size
        chosen = torch.randint(len(examples["latents"]), (batch,), generator=draw)
        strata = torch.randperm(batch, generator=draw) + torch.rand(batch, generator=draw)
        timesteps = (strata / batch * last_timestep).round().long()
        noises = torch.randn(batch, *examples["latents"].shape[1:], generator=draw)
        share = share_of(batch, accelerator)
        latents, masked_latents, mask, loss_mask = (
            examples[name][chosen[share]].to(accelerator.device)
            for name in ("latents", "masked_latents", "mask", "loss_mask")
        )
        t, noise, context = (
            part.to(accelerator.device)
            for part in (timesteps[share], noises[share], prompt.expand(len(latents), -1, -1))
        )
        alpha, beta = f.alpha_beta(t)
        noisy = alpha * latents + beta * noise
        with f.autocast():
            prediction = unet(f.unet_input(noisy, mask, masked_latents), t, context).sample
        return masked_loss(f.predicted_clean(prediction.float(), noisy, t), latents, loss_mask, f.loss_weight(t))

    def learning_rate(step: int) -> float:
        cosine = settings.schedule == "cosine"
        return warmup(step, settings.steps, settings.learning_rate, settings.warmup_steps, cosine)

    return train_segment(
        f.unet,
        loss_at,
        state,
        total=settings.steps,
        stop_step=stop_step,
        learning_rate=learning_rate,
        ema_decay=settings.ema_decay,
        on_step=on_step,
        should_stop=should_stop,
    )
