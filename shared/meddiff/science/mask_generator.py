"""The mask generator: a DDPM on binary masks (section 2.1 of the paper), and a geometric family for too few masks.

Masks live in a square frame to which the whole image is stretched, so that a shape's place in the image is learnt too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from meddiff.contracts.recipes import MaskGeneration, Recipe
from meddiff.science.foundation import trailing_timesteps
from meddiff.science.geometry import Field, Mask, resize_image, resize_mask
from meddiff.science.training import StepLog, TrainingState, share_of, train_segment, warmup
from meddiff.seeds import derive

__all__ = ["build", "ddim", "geometric", "load", "place", "sample", "train"]

SAMPLED_AT_ONCE = 8
FINER = 4  # A sampled shape is thresholded on a grid this many times finer than the network's.
REDRAWS = 4
SPECK = 0.02  # A component below this share of the largest one's area is noise.
AREA_SLACK = 1.25  # A sample's area may leave the range of the real ones by this factor,
ASKED_SLACK = 1.5  # and that which was asked for by this one.

TIMESTEPS = 1000
SCHEDULE = {"num_train_timesteps": TIMESTEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def build(settings: MaskGeneration) -> UNet2DModel:
    """The U-Net on masks (n, 1, res, res): one level a width, attention at the lowest; random weights. Where it is
    told the area, that is a second timestep to it."""
    levels = len(settings.widths)
    return UNet2DModel(
        sample_size=settings.resolution,
        in_channels=1,
        out_channels=1,
        block_out_channels=settings.widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        norm_num_groups=int(np.gcd.reduce([8, *settings.widths])),
        class_embed_type="timestep" if settings.area_conditioned else None,
    )


def load(folder: Path, device: torch.device) -> UNet2DModel:
    """The U-Net that ``save_pretrained`` left in a folder."""
    unet = UNet2DModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return unet.to(device).eval()


# --------------------------------------------------------------------------------------------------------- training


def train(
    masks: Sequence[Mask],
    recipe: Recipe,
    seed: int,
    state: TrainingState | None,
    stop_step: int,
    on_step: Callable[[StepLog], None],
    should_stop: Callable[[], bool],
    device: torch.device,
) -> TrainingState:
    """Train the DDPM on ``masks`` (H, W) from ``state`` (None: random weights of this seed) up to ``stop_step``.

    The loss is the mean square of v-prediction; step s draws masks, augmentation, timesteps and noise from its own
    seed. Raises ``ValueError`` if a mask is empty or there is none.
    """
    settings = recipe.mask_generation
    clean = _clean(masks, settings.resolution)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(derive(seed, "mask_generator", "weights"))
        unet = build(settings)
    unet = unet.to(device)
    scheduler = DDPMScheduler(**SCHEDULE)

    def loss_at(model: nn.Module, step: int, accelerator: Accelerator) -> Tensor:
        n = settings.batch_size
        draw = torch.Generator().manual_seed(derive(seed, "mask_generator", step))
        chosen = torch.randint(len(clean), (n,), generator=draw)
        x = _augmented(clean[chosen], draw)
        area = _area(x)
        strata = (torch.randperm(n, generator=draw) + torch.rand(n, generator=draw)) / n
        t = (strata * scheduler.config.num_train_timesteps).long()
        noise = torch.randn(x.shape, generator=draw)
        mine = share_of(n, accelerator)
        x, area, t, noise = (part[mine].to(accelerator.device) for part in (x, area, t, noise))
        noisy = scheduler.add_noise(x, noise, t)
        return F.mse_loss(_velocity(model, settings, noisy, t, area), scheduler.get_velocity(x, noise, t))

    return train_segment(
        unet,
        loss_at,
        state,
        total=settings.steps,
        stop_step=stop_step,
        learning_rate=lambda step: warmup(step, settings.steps, settings.learning_rate, 20, cosine=True),
        ema_decay=settings.ema_decay,
        on_step=on_step,
        should_stop=should_stop,
    )


def _clean(masks: Sequence[Mask], resolution: int) -> Tensor:
    """Every mask (n, 1, res, res) as ``_signed``, one at a time in memory at its own size."""
    found = []
    for mask in masks:
        if not mask.any():
            raise ValueError("the mask generator needs masks that are not empty")
        found.append(_signed(mask, resolution))
    if not found:
        raise ValueError("the mask generator needs at least one mask")
    return torch.stack(found)


def _signed(mask: Mask, resolution: int) -> Tensor:
    """The mask in the low-resolution frame (1, res, res): 1 inside, -1 outside, in between where a cell is cut."""
    covered = resize_image(mask.astype(np.float32)[..., None], (resolution, resolution))[..., 0]
    return torch.from_numpy(2 * np.clip(covered, 0, 1) - 1)[None]


def _area(x: Tensor) -> Tensor:
    """The share of the frame (n,) that each of the masks (n, 1, s, s) in [-1, 1] covers, cells that are cut in part."""
    return ((x + 1) / 2).mean(dim=(1, 2, 3))


def _velocity(model: nn.Module, settings: MaskGeneration, noisy: Tensor, t: Tensor | int, area: Tensor) -> Tensor:
    """What the U-Net predicts for masks (n, 1, s, s) at timesteps ``t``; ``area`` (n,), in [0, 1]: the share of the
    frame that each is to cover. Its root, which goes with the diameter, spans the range of timesteps."""
    labels = {"class_labels": area.sqrt() * TIMESTEPS} if settings.area_conditioned else {}
    return cast(Tensor, model(noisy, t, **labels).sample)


def _augmented(x: Tensor, draw: torch.Generator) -> Tensor:
    """Masks (n, 1, s, s) mirrored left to right, turned and scaled a little about their own centre and moved a little;
    those that do not touch the frame are mirrored top to bottom about their own centre as well."""
    n, size = len(x), x.shape[-1]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=draw)

    x = torch.where((torch.rand(n, generator=draw) < 0.5)[:, None, None, None], x.flip(-1), x)
    inside = (x[:, 0] + 1) / 2
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    mass = inside.sum(dim=(1, 2)).clamp(min=1e-6)
    centre = torch.stack([(inside * axis).sum(dim=(1, 2)), (inside * axis[:, None]).sum(dim=(1, 2))], dim=1)
    centre = centre / mass[:, None]
    rim = torch.cat([x[:, 0, 0], x[:, 0, -1], x[:, 0, :, 0], x[:, 0, :, -1]], dim=1)
    mirrored = (rim.amax(dim=1) < 0) & (torch.rand(n, generator=draw) < 0.5)
    angle, wide, high = uniform(-0.35, 0.35), uniform(-0.12, 0.12).exp(), uniform(-0.12, 0.12).exp()
    moved = torch.stack([uniform(-0.08, 0.08), uniform(-0.08, 0.08)], dim=1)
    high = torch.where(mirrored, -high, high)
    linear = torch.stack(
        [
            torch.stack([angle.cos() * wide, -angle.sin() * wide], dim=1),
            torch.stack([angle.sin() * high, angle.cos() * high], dim=1),
        ],
        dim=1,
    )
    shift = centre - (linear @ (centre + moved)[..., None])[..., 0]
    theta = torch.cat([linear, shift[..., None]], dim=2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


# --------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(unet: UNet2DModel, recipe: Recipe, seeds: Sequence[int], masks: Sequence[Mask]) -> list[Mask]:
    """A shape for each seed by DDIM: bool (4 res, 4 res) in the frame of the whole image, never empty; a geometric one
    of the size that ``geometric`` gives it.

    Each seed has its own noise and its own model among the real ``masks``, whose area, augmented as in training, is
    the one to be drawn where the network is told one. The batch is always of the same size, so a shape depends on its
    seed alone. What comes out empty, far smaller or larger than any real mask, or not of the area asked for (lesions
    of a few cells are hard to draw) is drawn again a few times; then it is a geometric one, fitted to its model or,
    where that has too many parts for one outline, to all masks.
    """
    settings = recipe.mask_generation
    real = _Real.of(masks)
    size = settings.resolution * FINER
    models = {seed: derive(seed, "model") % len(masks) for seed in seeds}
    asked: dict[int, float] = {}
    if settings.area_conditioned:
        for seed in seeds:
            area = _area_to_draw(masks[models[seed]], settings.resolution, derive(seed, "area"))
            asked[seed] = min(max(area, real.least), real.most)
    shapes: dict[int, Mask] = {}
    for attempt in range(1 + REDRAWS):
        missing = [seed for seed in seeds if seed not in shapes]
        noises = [derive(seed, "redraw", attempt) if attempt else seed for seed in missing]
        fields = ddim(unet, settings, noises, [asked.get(seed, 0.0) for seed in missing])
        for seed, field in zip(missing, fields, strict=True):
            fine = resize_image(field[..., None], (size, size))[..., 0]
            shape = tidy(fine > 0, real.components[models[seed]], real.have_holes)
            if real.admits(shape, asked.get(seed)):
                shapes[seed] = shape
    for seed in seeds:
        if seed not in shapes:
            shape = geometric([masks[models[seed]]], seed)
            shapes[seed] = shape if real.admits(shape, None) else geometric(masks, seed)
    return [shapes[seed] for seed in seeds]


def _area_to_draw(mask: Mask, resolution: int, seed: int) -> float:
    """The share of the frame that a real mask covers once it is augmented, as the network learnt it."""
    clean = _signed(mask, resolution)[None]
    return float(_area(_augmented(clean, torch.Generator().manual_seed(seed))))


def ddim(unet: UNet2DModel, settings: MaskGeneration, seeds: Sequence[int], areas: Sequence[float]) -> list[Field]:
    """Fields (res, res) in [-1, 1], one a seed: deterministic DDIM (eta 0) of clipped v-predictions.

    ``areas``: the share of the frame that each is to cover; of no meaning to a network that is told none.
    """
    noise_schedule = DDPMScheduler(**SCHEDULE)
    signal = torch.cat([noise_schedule.alphas_cumprod, torch.ones(1)])  # The last, of timestep -1, is the clean end.
    steps = trailing_timesteps(settings.sampling_steps, noise_schedule.config.num_train_timesteps)
    shape = (1, settings.resolution, settings.resolution)
    fields: list[Field] = []
    for first in range(0, len(seeds), SAMPLED_AT_ONCE):
        batch = list(zip(seeds, areas, strict=True))[first : first + SAMPLED_AT_ONCE]
        full = batch + batch[-1:] * (SAMPLED_AT_ONCE - len(batch))
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, _ in full]
        x = torch.stack(noise).to(unet.device)
        area = torch.tensor([area for _, area in full], device=unet.device)
        for t, following in pairwise(steps):
            alpha, beta = signal[t].sqrt(), (1 - signal[t]).sqrt()
            clean = (alpha * x - beta * _velocity(unet, settings, x, t, area)).clamp(-1, 1)
            noise_left = (x - alpha * clean) / beta
            x = signal[following].sqrt() * clean + (1 - signal[following]).sqrt() * noise_left
        fields += list(x[: len(batch), 0].cpu().numpy())
    return fields


def tidy(shape: Mask, components: int, keep_holes: bool) -> Mask:
    """The largest ``components`` of a shape, without specks and, unless ``keep_holes``, without holes."""
    labels, count = ndimage.label(shape, np.ones((3, 3)))
    if count == 0:
        return shape.copy()
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    least = max(np.sort(areas)[-min(components, count)], SPECK * areas.max())
    kept = (areas >= least)[labels] & shape
    return kept if keep_holes else np.asarray(ndimage.binary_fill_holes(kept))


def count_components(mask: Mask) -> int:
    """The number of 8-connected components of a mask, specks not counted."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())[1:]
    return int((areas >= SPECK * areas.max(initial=0)).sum())


@dataclass(frozen=True)
class _Real:
    """What the real masks say of how a shape may look: the least and the most of the image that it may cover, the
    number of components of each mask, and whether any has holes."""

    least: float
    most: float
    components: tuple[int, ...]
    have_holes: bool

    @classmethod
    def of(cls, masks: Sequence[Mask]) -> _Real:
        areas, components, holes = [], [], []
        for mask in masks:
            areas.append(float(mask.mean()))
            components.append(count_components(mask))
            holes.append((ndimage.binary_fill_holes(mask) & ~mask).sum() > SPECK * mask.sum())
        return cls(min(areas) / AREA_SLACK, max(areas) * AREA_SLACK, tuple(components), any(holes))

    def admits(self, shape: Mask, asked: float | None) -> bool:
        """Whether a shape is of a possible area and, where one was ``asked`` for, about of that."""
        area = float(shape.mean())
        as_asked = asked is None or asked / ASKED_SLACK <= area <= asked * ASKED_SLACK
        return as_asked and self.least <= area <= self.most


def place(shape: Mask, size: tuple[int, int]) -> Mask:
    """A shape (h, w) in the frame of the whole image at the image's ``size`` (H, W), with a smooth outline.

    Enlarged by a cubic kernel after a blur of one of its pixels, and cut at the level that keeps its share of the
    image, so smoothing takes nothing off. One that shrinks is averaged over areas. Never empty unless ``shape`` is.
    """
    if shape.shape == size or not shape.any() or shape.all():
        return shape.copy() if shape.shape == size else np.full(size, bool(shape.any()))
    if shape.shape[0] >= size[0] and shape.shape[1] >= size[1]:
        return resize_mask(shape, size)
    soft = ndimage.gaussian_filter(shape.astype(np.float32), 1.0, mode="nearest")
    enlarged = resize_image(soft[..., None], size)[..., 0]
    return _largest(enlarged, max(1, round(float(shape.mean()) * enlarged.size)))


def _largest(field: Field, count: int) -> Mask:
    """The pixels whose value is at least the ``count``-th largest."""
    return np.asarray(field >= np.partition(field, -count, axis=None)[-count])


# -------------------------------------------------------------------------------------------------- geometric family


HARMONICS = 8
ANGLES = 96
RADII = 1024
SIDES = (128, 1024)
CELLS_ACROSS = 4  # Of the smallest lesion, where the frame is not finer than the second of SIDES already.


@dataclass(frozen=True)
class _Blob:
    """A star-shaped outline in the unit frame. ``centre`` (y, x); log radius over the angle = ``log_radius`` plus a
    Fourier series with complex coefficients ``lobes`` of orders 1 to 8; order 2 is the elongation."""

    centre: NDArray[np.float64]
    log_radius: float
    lobes: NDArray[np.complex128]


def geometric(masks: Sequence[Mask], seed: int) -> Mask:
    """A shape (n, n), n as ``SIDES``, of a family fitted to real masks (H, W), at least one: the place, size and
    elongation of one of them changed by about the spread of all, lobes of the real strength in new places. One far
    smaller or larger than any of them (most of it may lie beyond the edge) is drawn again a few times.

    Raises ``ValueError`` if no mask holds anything.
    """
    filled = [mask for mask in masks if mask.any()]
    if not filled:
        raise ValueError("a geometric shape needs at least one mask that is not empty")
    blobs = [_blob(mask) for mask in filled]
    areas = [float(mask.mean()) for mask in filled]
    size = int(np.clip(CELLS_ACROSS / np.sqrt(min(areas)), *SIDES))
    rng = np.random.default_rng(seed)
    for _ in range(1 + REDRAWS):
        shape = _drawn(_varied(blobs, rng), size)
        if min(areas) / AREA_SLACK <= shape.mean() <= max(areas) * AREA_SLACK:
            break
    return shape


def _varied(blobs: Sequence[_Blob], rng: np.random.Generator) -> _Blob:
    """One of the outlines, changed; its centre stays within the frame, reflected at its edges."""
    base = blobs[int(rng.integers(len(blobs)))]
    bandwidth = 0.5 * len(blobs) ** -0.2
    moved = base.centre + rng.normal(0, _spread([b.centre for b in blobs], 0.06) * bandwidth)
    centre = 1 - np.abs(1 - np.abs(moved))
    log_radius = base.log_radius + rng.normal(0, _spread([b.log_radius for b in blobs], 0.15) * bandwidth)
    strength = np.sqrt(np.mean([np.abs(b.lobes) ** 2 for b in blobs], axis=0))
    turned = rng.uniform(0, 2 * np.pi, HARMONICS)
    turned[1] = rng.normal(0, 0.4)
    amplitudes = np.abs(base.lobes) * rng.uniform(0.6, 1.2, HARMONICS) + 0.1 * strength
    return _Blob(centre, log_radius, amplitudes * np.exp(1j * (np.angle(base.lobes) + turned)))


def _spread(values: Sequence[NDArray[np.float64] | float], least: float) -> NDArray[np.float64]:
    return np.asarray(np.maximum(np.std(np.asarray(values), axis=0), least))


def _blob(mask: Mask) -> _Blob:
    """The outline of a mask's largest component, seen from its centroid."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    main = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    size = np.array(mask.shape)
    centre = (np.argwhere(main).mean(axis=0) + 0.5) / size
    angles = np.arange(ANGLES) * 2 * np.pi / ANGLES
    radii = np.linspace(0, np.sqrt(2), RADII)
    rays = centre[:, None, None] + np.stack([np.sin(angles), np.cos(angles)])[:, :, None] * radii
    pixels = np.clip((rays * size[:, None, None]).astype(int), 0, (size - 1)[:, None, None])
    inside = main[tuple(pixels)] & ((rays >= 0) & (rays < 1)).all(axis=0)
    farthest = np.where(inside, radii, radii[1]).max(axis=1)
    spectrum = np.fft.fft(np.log(farthest)) / ANGLES
    return _Blob(centre, float(np.log(np.sqrt(main.mean() / np.pi))), spectrum[1 : HARMONICS + 1])


def _drawn(blob: _Blob, size: int) -> Mask:
    around = _waves(blob, np.linspace(-np.pi, np.pi, 8 * ANGLES, endpoint=False))
    log_radius = blob.log_radius - around.var()  # So that the waves leave the area, the mean of r^2, what it was.
    farthest = np.exp(log_radius + around.max())
    rows, columns = (
        slice(max(0, int((at - farthest) * size) - 1), int((at + farthest) * size) + 2) for at in blob.centre
    )
    axis = (np.arange(size) + 0.5) / size
    y, x = axis[rows, None] - blob.centre[0], axis[None, columns] - blob.centre[1]
    shape = np.zeros((size, size), np.bool_)
    shape[rows, columns] = np.hypot(y, x) <= np.exp(log_radius + _waves(blob, np.arctan2(y, x)))
    row, column = np.clip((blob.centre * size).astype(int), 0, size - 1)
    shape[row, column] = True
    return shape


def _waves(blob: _Blob, angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Fourier series of ``blob`` at some angles."""
    orders = np.arange(1, HARMONICS + 1)
    return np.asarray(2 * np.real(blob.lobes * np.exp(1j * orders * angles[..., None])).sum(axis=-1))
