"""Training a segmenter on pairs and asking it for masks: one augmentation, optimiser and averaging for every arm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from meddiff.contracts.evaluation import Mixing
from meddiff.contracts.recipes import Evaluation
from meddiff.science.geometry import Image, Mask, resize_image
from meddiff.seeds import derive

WARMUP_STEPS = 20
WEIGHT_DECAY = 1e-3
FALLEN = 2 / 3  # Of the longest training: from there on no synthetic pair is left in a batch that falls.


@dataclass(frozen=True)
class Pairs:
    """Images (n, 3, s, s) in [0, 1] and masks (n, 1, s, s) in {0, 1}, float32."""

    images: Tensor
    masks: Tensor

    @classmethod
    def of(cls, pairs: Iterable[tuple[Image, Mask]], size: int) -> Pairs:
        """Images (H, W, C) uint8 and masks (H, W), each stretched to ``size``; one is held at a time."""
        found = [
            (_fitted(image, size), _fitted(255 * mask[..., None].astype(np.uint8), size)[:1]) for image, mask in pairs
        ]
        images, masks = (torch.stack(field) for field in zip(*found, strict=True))
        return cls(images, (masks > 0.5).float())

    def some(self, places: Sequence[int]) -> Pairs:
        """Those at ``places``."""
        return Pairs(self.images[list(places)], self.masks[list(places)])


def _fitted(image: Image, size: int) -> Tensor:
    """(3, size, size) in [0, 1]."""
    small = resize_image(image.astype(np.float32) / np.float32(255), (size, size)).clip(0, 1)
    return torch.from_numpy(np.broadcast_to(small, (size, size, 3)).transpose(2, 0, 1).copy())


def fit(
    network: nn.Module,
    real: Pairs,
    synthetic: Pairs | None,
    settings: Evaluation,
    steps: int,
    seed: int,
    mixing: Mixing = "joint",
    on_step: Callable[[int], None] = lambda step: None,
) -> Iterator[tuple[int, nn.Module]]:
    """Training of ``network``, on its device, for ``steps`` steps of ``settings.batch_size`` real pairs; joint: with as
    many synthetic ones beside them; falling: with ever fewer; pretrain: after ``settings.pretrain_steps`` of synthetic
    ones alone. AdamW at a constant rate after a warm-up.

    Every ``settings.every`` steps and at the end: the steps done and the network with its averaged weights (an
    exponential moving average), the same object each time, to be used before the next is asked for. A training of N
    steps is the beginning of a longer one, and the real pairs a step draws do not depend on the synthetic ones.
    ``on_step`` gets the steps done and ends the training by what it raises.
    """
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    device = next(network.parameters()).device
    first = settings.pretrain_steps if synthetic is not None and mixing == "pretrain" else 0
    network.train()
    for step in range(-first, steps):
        on_step(step)
        parts = []
        if step >= 0:
            parts.append(_drawn(real, settings.batch_size, derive(seed, "real", step)))
        if synthetic is not None and (beside := synthetic_beside(settings, step, mixing)):
            parts.append(_drawn(synthetic, beside, derive(seed, "synthetic", step)))
        images, masks = (torch.cat(field).to(device) for field in zip(*parts, strict=True))
        optimiser.param_groups[0]["lr"] = settings.learning_rate * min(1.0, (step + first + 1) / WARMUP_STEPS)
        optimiser.zero_grad()
        segmentation_loss(network(images.contiguous(memory_format=torch.channels_last)), masks).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        averaged.update_parameters(network)
        if step >= 0 and ((step + 1) % settings.every == 0 or step + 1 == steps):
            yield step + 1, averaged.module.eval()


def synthetic_beside(settings: Evaluation, step: int, mixing: Mixing) -> int:
    """How many synthetic pairs a step's batch holds; steps below 0 come before the first real pair."""
    whole = settings.batch_size
    if mixing == "falling":
        return round(whole * max(0.0, 1 - step / (FALLEN * settings.steps)))
    return whole if mixing == "joint" or step < 0 else 0


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice loss (Milletari et al., 2016), each a mean over the pairs."""
    p = logits.sigmoid()
    overlap = (p * masks).sum(dim=(1, 2, 3))
    dice = (2 * overlap + 1) / (p.sum(dim=(1, 2, 3)) + masks.sum(dim=(1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - dice).mean()


@torch.no_grad()
def predict(network: nn.Module, image: Image, size: int) -> Mask:
    """The mask (H, W) that a segmenter sees in an image (H, W, C), averaged over the mirror image."""
    x = _fitted(image, size)[None].to(next(network.parameters()).device)
    p = (network(x).sigmoid() + network(x.flip(-1)).sigmoid().flip(-1)) / 2
    return np.asarray(resize_image(p[0, 0, :, :, None].cpu().numpy(), image.shape[:2])[..., 0] > 0.5)


# ----------------------------------------------------------------------------------------------------- augmentation


def _drawn(pairs: Pairs, count: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(pairs.images), (count,), generator=draw)
    return augmented(pairs.images[chosen], pairs.masks[chosen], draw)


def augmented(images: Tensor, masks: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrored, turned, scaled and moved together (beyond the frame the image is mirrored, and so is its mask); then
    the images alone in contrast, brightness, gamma, colour balance, blur, resolution and noise: the list of nnU-Net
    (Isensee et al., Nature Methods 2021), with colour."""
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
    coarse = F.interpolate(F.interpolate(images, scale_factor=0.5, mode="area"), images.shape[-2:], mode="bilinear")
    images = torch.where(uniform(0, 1, 1, 1, 1) < 0.25, coarse, images)
    noise = torch.randn(images.shape, generator=draw) * uniform(0, 0.03, 1, 1, 1)
    return (images + noise).clamp(0, 1), masks
