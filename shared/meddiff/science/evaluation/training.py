"""Training a segmenter on pairs and asking it for masks: one augmentation, optimiser and averaging for every arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from meddiff.science.geometry import Image, Mask, resize_image
from meddiff.seeds import derive

WARMUP_STEPS = 20


@dataclass(frozen=True)
class Pairs:
    """Images (n, 3, s, s) in [0, 1] and masks (n, 1, s, s) in {0, 1}, float32."""

    images: Tensor
    masks: Tensor

    @classmethod
    def of(cls, pairs: Sequence[tuple[Image, Mask]], size: int) -> Pairs:
        """Images (H, W, C) uint8 and masks (H, W), each stretched to ``size``."""
        images = torch.stack([_fitted(image, size) for image, _ in pairs])
        masks = torch.stack([_fitted(255 * mask[..., None].astype(np.uint8), size)[:1] for _, mask in pairs])
        return cls(images, (masks > 0.5).float())


def _fitted(image: Image, size: int) -> Tensor:
    """(3, size, size) in [0, 1]."""
    small = resize_image(image.astype(np.float32) / np.float32(255), (size, size)).clip(0, 1)
    return torch.from_numpy(np.broadcast_to(small, (size, size, 3)).transpose(2, 0, 1).copy())


@dataclass(frozen=True)
class Schedule:
    """Steps of ``batch_size`` real pairs each, with as many synthetic ones beside them where there are any; AdamW at a
    constant ``learning_rate`` after a warm-up; the weights are an exponential moving average, looked at every ``every``
    steps, so a training of N steps is the beginning of a longer one."""

    steps: int = 400
    every: int = 50
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    ema_decay: float = 0.98


def fit(
    network: nn.Module,
    real: Pairs,
    synthetic: Pairs | None,
    schedule: Schedule,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, nn.Module]]:
    """Joint training (real and synthetic in every batch): steps done and the network with averaged weights, the same
    object each time, to be used before the next is asked for.

    Step s draws pairs and augmentation from its own seed; the real ones it draws do not depend on the synthetic ones.
    """
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema_decay), use_buffers=True)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=schedule.weight_decay)
    network.train()
    for step in range(schedule.steps):
        if should_stop():
            return
        optimiser.param_groups[0]["lr"] = schedule.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
        parts = [_drawn(real, schedule.batch_size, derive(seed, "real", step))]
        if synthetic is not None:
            parts.append(_drawn(synthetic, schedule.batch_size, derive(seed, "synthetic", step)))
        images, masks = (torch.cat(field) for field in zip(*parts, strict=True))
        optimiser.zero_grad()
        segmentation_loss(network(images), masks).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        averaged.update_parameters(network)
        if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
            yield step + 1, averaged.module.eval()


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice loss (Milletari et al., 2016), each a mean over the pairs."""
    p = logits.sigmoid()
    overlap = (p * masks).sum(dim=(1, 2, 3))
    dice = (2 * overlap + 1) / (p.sum(dim=(1, 2, 3)) + masks.sum(dim=(1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - dice).mean()


@torch.no_grad()
def predict(network: nn.Module, image: Image, size: int) -> Mask:
    """The mask (H, W) that a segmenter sees in an image (H, W, C), averaged over the mirror image."""
    x = _fitted(image, size)[None]
    p = (network(x).sigmoid() + network(x.flip(-1)).sigmoid().flip(-1)) / 2
    return np.asarray(resize_image(p[0, 0, :, :, None].numpy(), image.shape[:2])[..., 0] > 0.5)


# ----------------------------------------------------------------------------------------------------- augmentation


def _drawn(pairs: Pairs, count: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(pairs.images), (count,), generator=draw)
    return augmented(pairs.images[chosen], pairs.masks[chosen], draw)


def augmented(images: Tensor, masks: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrored, turned, scaled and moved together (beyond the frame the image is mirrored, and so is its mask); then
    the images alone in contrast, brightness, gamma, colour balance, blur and noise."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=draw)

    angle = uniform(-np.pi, np.pi) * (uniform(0, 1) < 0.7)
    scale, stretch = uniform(-0.35, 0.35).exp(), uniform(-0.15, 0.15).exp()
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    rows = [
        torch.stack([scale * stretch * mirror * angle.cos(), -scale * angle.sin(), uniform(-0.15, 0.15)], dim=1),
        torch.stack([scale * stretch * mirror * angle.sin(), scale * angle.cos(), uniform(-0.15, 0.15)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    masks = (F.grid_sample(masks, grid, padding_mode="reflection", align_corners=False) > 0.5).float()
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * uniform(0.7, 1.3, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    images = images + uniform(-0.04, 0.04, 3, 1, 1)
    images = images.clamp(0, 1) ** uniform(-0.3, 0.3, 1, 1, 1).exp()
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = torch.lerp(images, blurred, (uniform(-1, 1, 1, 1, 1)).clamp(min=0))
    noise = torch.randn(images.shape, generator=draw) * uniform(0, 0.03, 1, 1, 1)
    return (images + noise).clamp(0, 1), masks
