"""Guided inpainting (eq. 2 of the paper): lesions painted into backgrounds, or out of them, and nothing else changed.

Images are uint8 (H, W, C), masks bool (H, W), of any size; the network works in a square window around the guide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from meddiff.contracts.manifest import Window
from meddiff.contracts.recipes import Recipe
from meddiff.science import geometry
from meddiff.science.finetune import as_model_input
from meddiff.science.foundation import Foundation, decode, embed_prompt, encode, trailing_timesteps, vae_factor
from meddiff.science.geometry import Field, Image, Mask

EARLY_REACH = 1 / 16
"""How far M reaches beyond the guide at the noisiest step, as a share of the latents' side."""
SEAM_SCALE = 1 / 32
"""Width over which colours are compared across the guide's rim, as a share of the window's side."""
FEATHER = 2.0
"""Pixels inside the guide over which the painting fades in."""
COVERED_MARGIN = 0.1
"""How far beyond its mask an old lesion is filled, as a share of its equivalent diameter."""
RIM_MARGIN = 0.1
"""How far around its mask a donor's lesion is taken with it, as a share of its equivalent diameter."""
RAYS = 96
"""Rays from a lesion's centre along which its rim is fitted."""
SHADE = 12.0
"""Grey levels added before contrasts are taken as ratios, so that near-black surroundings do not blow them up."""
NEVER: Callable[[], bool] = lambda: False  # noqa: E731


@dataclass(frozen=True)
class Canvas:
    """One image to paint: background (H, W, C), shape and guide (H, W), the composite to start from where strength is
    below 1, and the seed its noise is drawn from."""

    background: Image
    shape: Mask
    guide: Mask
    start: Image | None
    seed: int


def inpaint(
    f: Foundation, canvases: Sequence[Canvas], recipe: Recipe, should_stop: Callable[[], bool] = NEVER
) -> list[Image]:
    """Paint each canvas; outside its guide an image equals its background bit for bit.

    Always runs full batches (the last canvas fills up the last one), so the bytes of an image do not depend on what
    came with it. Returns those that were finished when ``should_stop`` said so. Raises ``ValueError`` for an empty
    guide, and for a canvas without a composite where ``strength`` is below 1.
    """
    size = recipe.inpainting.batch_size
    images: list[Image] = []
    for first in range(0, len(canvases), size):
        batch = list(canvases[first : first + size])
        views = [view_of(canvas, recipe) for canvas in batch]
        filled = views + views[-1:] * (size - len(views))
        original = encode(f, torch.stack([as_model_input(view.original) for view in filled]))
        latents = solve(f, filled, original, recipe, should_stop)
        if latents is None:
            break
        painted, carried = _pixels(decode(f, latents)), _pixels(decode(f, original))
        detail = recipe.inpainting.kept_detail
        images += [composite(*parts, detail) for parts in zip(batch, views, painted, carried, strict=False)]
    return images


def repair(f: Foundation, cases: Sequence[tuple[Image, Mask, int]], recipe: Recipe) -> list[Image]:
    """Each image of ``cases`` (image, lesion, seed) with its lesion painted over as healthy tissue; unchanged outside
    the guide of the lesion.

    With ``separate_repair``, ``f`` holds the paper's second U-Net: its mask channel knows only paint and keep.
    """
    canvases = []
    for image, lesion, seed in cases:
        guide = geometry.guide_of(lesion, recipe.inpainting.guide_margin)
        shape = guide if recipe.finetuning.separate_repair else np.zeros_like(guide)
        window = geometry.window_around(guide, 1.5)
        start = _pasted(image, _healthy(image, guide, window), window, guide)
        canvases.append(Canvas(image, shape, guide, start, seed))
    return inpaint(f, canvases, recipe)


# ------------------------------------------------------------------------------------------------------------ eq. 2


@dataclass(frozen=True)
class View:
    """A canvas as the network sees it, in its window at the model's resolution: pixels (r, r, C) in 0..255."""

    window: Window
    background: Field
    start: Field | None
    shape: Mask
    guide: Mask
    real: Mask
    seed: int

    @property
    def original(self) -> Field:
        """What M holds in place: the composite where there is one. Outside the guide it is the background, and inside
        nothing of what the background had there shines through."""
        return self.background if self.start is None else self.start


def view_of(canvas: Canvas, recipe: Recipe) -> View:
    if canvas.start is None and recipe.inpainting.strength < 1:
        raise ValueError("a strength below 1 needs a composite to start from")
    window = geometry.window_around(canvas.guide, recipe.inpainting.context)
    size = (recipe.foundation.resolution, recipe.foundation.resolution)

    def pixels(image: Image) -> Field:
        return geometry.resize_image(geometry.crop_window(image, window).astype(np.float32), size)

    def covered(mask: Mask) -> Mask:
        return geometry.resize_mask(geometry.extend_window(mask, window), size)

    shape = covered(canvas.shape)
    start = pixels(canvas.start) if canvas.start is not None and recipe.inpainting.strength < 1 else None
    real = geometry.resize_mask(geometry.crop_window(np.ones_like(canvas.guide), window), size)
    return View(window, pixels(canvas.background), start, shape, covered(canvas.guide) | shape, real, canvas.seed)


@torch.no_grad()
def solve(
    f: Foundation, views: Sequence[View], original: Tensor, recipe: Recipe, should_stop: Callable[[], bool]
) -> Tensor | None:
    """Clean latents (n, 4, h, w) by DDIM with the background held in place at every step (eq. 2); None if stopped.

    The solver walks the last ``strength`` of its trailing timesteps, from the composite noised to the first of them: at
    strength 1 it walks them all, from noise. ``original`` (n, 4, h, w) is what M holds in place. While the noise is
    above ``ring_strength``, M is the shape alone: the composite's healthy surroundings are held in place as well.
    """
    settings = recipe.inpainting
    factor = vae_factor(f)
    masked = torch.stack([as_model_input(v.background) * torch.from_numpy(~v.guide) for v in views])
    masked_latents = encode(f, masked)
    mask = torch.stack([torch.from_numpy(geometry.condition_mask(v.shape, v.guide, factor))[None] for v in views])
    guides = np.stack([geometry.guide_cells(v.guide, factor) for v in views])
    shapes = np.stack([geometry.guide_cells(v.shape, factor) for v in views])
    noise = torch.stack(
        [torch.randn(original.shape[1:], generator=torch.Generator().manual_seed(v.seed)) for v in views]
    )
    mask, noise = mask.to(f.device), noise.to(f.device)
    prompts = torch.cat([embed_prompt(f, prompt) for prompt in (recipe.finetuning.prompt, "")])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        """The U-Net's prediction, away from the empty prompt where ``guidance_scale`` asks for it."""
        inputs = f.unet_input(x, mask, masked_latents)
        with f.autocast():
            wanted: Tensor = f.unet(inputs, t, prompts[:1].expand(len(x), -1, -1)).sample.float()
            if settings.guidance_scale == 1:
                return wanted
            plain: Tensor = f.unet(inputs, t, prompts[1:].expand(len(x), -1, -1)).sample.float()
        return plain + settings.guidance_scale * (wanted - plain)

    steps = solver_timesteps(f, settings.solver_steps, settings.strength).to(f.device)
    alpha, beta = f.alpha_beta(steps[:1])
    x = alpha * original + beta * noise
    for t, previous in pairwise(steps):
        if should_stop():
            return None
        alpha, beta = f.alpha_beta(t[None])
        clean = f.predicted_clean(predict(x, t), x, t[None])
        epsilon = (x - alpha * clean) / beta
        alpha, beta = f.alpha_beta(previous[None])
        denoised = alpha * clean + beta * epsilon
        kept = alpha * original + beta * noise
        reach = EARLY_REACH * guides.shape[-1] * float(beta) if settings.adaptive_guide else 0.0
        cells = guides if t < settings.ring_strength * f.scheduler.config.num_train_timesteps else shapes
        m = torch.from_numpy(guide_at(cells, reach))[:, None].to(f.device)
        x = m * denoised + (1 - m) * kept
    return x


def solver_timesteps(f: Foundation, solver_steps: int, strength: float) -> Tensor:
    """The last ``strength`` of ``solver_steps`` trailing timesteps, at least one, and -1, the clean end."""
    walked = max(1, round(strength * solver_steps))
    return trailing_timesteps(solver_steps, f.scheduler.config.num_train_timesteps)[-walked - 1 :]


def guide_at(cells: NDArray[np.bool_], reach: float) -> Field:
    """M of eq. 2 (n, h, w) in [0, 1]: 1 in the guide's cells, falling to 0 over ``reach`` cells around them. The reach
    shrinks with the noise, so M is wide and soft early and exactly the guide in the end."""
    if reach <= 0:
        return cells.astype(np.float32)
    far = float(cells.shape[-1])
    distance = np.stack(
        [ndimage.distance_transform_edt(~one) if one.any() else np.full(one.shape, far) for one in cells]
    )
    return np.clip(1 - distance / (reach + 1), 0, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------- back to the image


def _pixels(images: Tensor) -> Field:
    """Images (n, 3, h, w) in [-1, 1] as pixels (n, h, w, 3) in 0..255."""
    return np.asarray((images.cpu().numpy().transpose(0, 2, 3, 1) + 1) * np.float32(127.5))


def composite(canvas: Canvas, view: View, painted: Field, carried: Field, kept_detail: float = 0.0) -> Image:
    """The canvas with ``painted`` (r, r, 3) in its guide at native size: colours mended at the rim, detail added, faded
    in over a few pixels inside the rim, rounded, pasted.

    ``carried`` (r, r, 3) is what the autoencoder makes of the composite. What it lost of it, and what the window's
    resolution lost, is given back: grain, the finest structure, and the autoencoder's own error. So is what the
    painting lost or added below ``kept_detail``, a share of the window's side.
    """
    if canvas.background.shape[2] == 1:
        painted, carried = (pixels.mean(axis=2, keepdims=True) for pixels in (painted, carried))
    native = (view.window.side, view.window.side)
    if view.start is None or canvas.start is None:
        lost_by_network, lost = np.zeros_like(painted), np.zeros((*native, 1), np.float32)
    else:
        scale = kept_detail * len(painted)
        painted = carried + ndimage.gaussian_filter(painted - carried, (scale, scale, 0))
        lost_by_network = view.start - carried
        start = geometry.crop_window(canvas.start, view.window).astype(np.float32)
        lost = start - geometry.resize_image(carried, native)
    seam = seam_correction(painted + lost_by_network, view.background, view.shape, view.guide, view.real)
    patch = geometry.resize_image(painted + seam, native)
    patch += lost  # In place, here and below: at the camera's size each of these takes half a gigabyte.
    below = geometry.crop_window(canvas.background, view.window).astype(np.float32)
    depth = ndimage.distance_transform_edt(geometry.extend_window(canvas.guide, view.window)).astype(np.float32)
    patch -= below
    patch *= np.clip(depth / (FEATHER + 1), 0, 1)[..., None]
    patch += below
    return _pasted(canvas.background, patch, view.window, canvas.guide)


def seam_correction(painted: Field, background: Field, shape: Mask, guide: Mask, real: Mask) -> Field:
    """What to add inside the guide so that the painting meets the background's colours at the rim.

    Just outside the rim the background's local mean colour is taken, just inside it that of the ring painted as healthy
    tissue; their difference, which both Gaussian means carry inwards, fades over the ring. Where the shape itself
    touches the rim, and beyond the ``real`` pixels, nothing is known, and nothing is changed. All at the model's size.
    """
    scale = SEAM_SCALE * guide.shape[0]
    depth = ndimage.distance_transform_edt(guide)
    height = ndimage.distance_transform_edt(~guide)
    near_shape = ndimage.distance_transform_edt(~shape) if shape.any() else np.full(shape.shape, np.inf)
    inside = np.where(guide & (near_shape > 1), np.exp(-((depth / scale) ** 2)), 0)
    outside = np.where(~guide & real, np.exp(-((height / scale) ** 2)), 0)

    def local_mean(image: Field, weight: NDArray[np.floating]) -> tuple[Field, Field]:
        known = weight[..., None].astype(np.float32)
        total = ndimage.gaussian_filter(known, (scale, scale, 0))
        return ndimage.gaussian_filter(known * image, (scale, scale, 0)) / np.maximum(total, 1e-6), total

    there, out_weight = local_mean(background, outside)
    here, in_weight = local_mean(painted, inside)
    known = np.clip(np.minimum(out_weight, in_weight) / 1e-3, 0, 1)
    fade = np.exp(-((depth / (2 * scale)) ** 2))[..., None]
    return np.where(guide[..., None], known * fade * (there - here), 0).astype(np.float32)


# -------------------------------------------------------------------------------------------- the composite to start


def fit_lesion(
    background: Image, shape: Mask, guide: Mask, donor_image: Image, donor_mask: Mask, cover: Mask | None = None
) -> Image:
    """The composite that strength below 1 starts from: a real lesion fitted into the shape, rim on rim.

    The donor's lesion and a margin around it are moved by the affine map between the second moments of the two masks
    (the optimal transport between Gaussians: no needless turn), then along each ray from the centre until the rims
    meet: what a real annotator drew a rim around lies within the shape, with that rim's own blur. Their contrast to the
    donor's surroundings is laid on the new surroundings. Those are the background itself, the old lesion ``cover``
    (all false: none) filled from around it; without ``cover`` the whole guide is filled from outside. Raises
    ``ValueError`` for an empty shape or donor.
    """
    if not (shape.any() and donor_mask.any()):
        raise ValueError("an empty mask has no lesion to fit")
    old = guide if cover is None else guide & geometry.guide_of(cover, COVERED_MARGIN)
    window = geometry.window_around(guide, 1.5)
    healthy = _healthy(background, old, window)
    beyond = geometry.crop_window(~geometry.guide_of(shape, RIM_MARGIN), window)
    contrast = _donor_contrast(donor_image, donor_mask, geometry.extend_window(shape, window), background.shape[2])
    lesion = contrast * (geometry.smooth_fill(healthy, ~beyond) + SHADE) - SHADE
    softness = max(0.7, 0.25 * RIM_MARGIN * geometry.equivalent_diameter(shape))
    opacity = ndimage.gaussian_filter((~beyond).astype(np.float32), softness)[..., None]
    return _pasted(background, healthy + opacity * (lesion - healthy), window, guide)


def _healthy(background: Image, lesion: Mask, window: Window) -> Field:
    """The window of the background with a lesion filled from around it, smoothly and with mirrored texture.
    The pixels next to it do not count: they may be its rim, or the frame of a picture."""
    around = geometry.crop_window(background, window).astype(np.float32)
    hole = ~geometry.crop_window(~geometry.dilate(lesion, FEATHER), window)
    return geometry.smooth_fill(around, hole) + geometry.mirrored_detail(around, hole)


def _pasted(background: Image, patch: Field, window: Window, guide: Mask) -> Image:
    return geometry.paste(background, np.clip(np.rint(patch), 0, 255).astype(np.uint8), window, guide)


def _donor_contrast(donor_image: Image, donor_mask: Mask, shape: Mask, channels: int) -> Field:
    """The donor over its surroundings (h, w, channels), a ratio, with its lesion's rim on that of ``shape`` (h, w)."""
    margin = geometry.guide_of(donor_mask, RIM_MARGIN)
    window = geometry.window_around(margin, 1.5)
    image = geometry.crop_window(donor_image, window).astype(np.float32)
    lesion = geometry.extend_window(donor_mask, window)
    if image.shape[2] != channels:
        image = np.broadcast_to(image.mean(axis=2, keepdims=True), (*image.shape[:2], channels))
    around = geometry.smooth_fill(image, geometry.extend_window(margin, window))
    ratio = (image + SHADE) / (around + SHADE)
    places = _rim_on_rim(shape, lesion)
    side = max(8, round(window.side * geometry.equivalent_diameter(shape) / geometry.equivalent_diameter(lesion)))
    within, without = (_sampled(_nearest(ratio, part), places, min(side, window.side)) for part in (lesion, ~lesion))
    return np.where(shape[..., None], within, without)


def _nearest(field: Field, known: Mask) -> Field:
    """The field (h, w, C), where it is not known that of the nearest pixel that is."""
    if not known.any():
        return field
    rows, columns = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return field[rows, columns]


def _sampled(field: Field, places: NDArray[np.float64], side: int) -> Field:
    """The square field (s, s, C) at places (2, h, w), after it has been made smaller to ``side``."""
    if side < len(field):
        field, places = geometry.resize_image(field, (side, side)), (places + 0.5) * (side / len(field)) - 0.5
    channels = [ndimage.map_coordinates(field[..., c], places, order=1, mode="nearest") for c in range(field.shape[2])]
    return np.stack(channels, axis=-1)


def _rim_on_rim(shape: Mask, lesion: Mask) -> NDArray[np.float64]:
    """Where in the lesion's frame each pixel of the shape's frame comes from (2, h, w): the affine map at the centre,
    the more along its ray the nearer the rim."""
    from_centre, from_spread = _moments(lesion)
    to_centre, to_spread = _moments(shape)
    transport = _gaussian_transport(to_spread, from_spread)
    moved = np.tensordot(transport, np.indices(shape.shape) - to_centre[:, None, None], axes=1)
    ray = np.arctan2(moved[0], moved[1])
    to_rim = _reach(moved[:, shape])
    stretch = _reach(np.stack(np.nonzero(lesion)) - from_centre[:, None]) / to_rim
    depth = np.minimum(np.hypot(*moved) / _along(ray, to_rim), 1.0)
    return np.asarray(from_centre[:, None, None] + (1 + depth * (_along(ray, stretch.clip(0.6, 1.7)) - 1)) * moved)


def _along(ray: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is known for each of ``RAYS`` rays, at angles between them."""
    angles = np.linspace(-np.pi, np.pi, RAYS, endpoint=False)
    return np.interp(ray.ravel(), angles, values, period=2 * np.pi).reshape(ray.shape)


def _reach(offsets: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far pixels at these offsets (2, n) from a centre reach along each of ``RAYS`` rays, smoothed."""
    ray = np.round((np.arctan2(offsets[0], offsets[1]) + np.pi) / (2 * np.pi) * RAYS).astype(int) % RAYS
    reach = np.zeros(RAYS)
    np.maximum.at(reach, ray, np.hypot(*offsets) + 0.5)  # To the pixel's edge.
    hit = np.flatnonzero(reach)
    filled = np.interp(np.arange(RAYS), hit, reach[hit], period=RAYS)
    return np.asarray(ndimage.gaussian_filter1d(filled, 1.5, mode="wrap"))


def _moments(mask: Mask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centroid (2,) and covariance (2, 2) of a mask's pixels, each pixel a unit square."""
    places = np.stack(np.nonzero(mask)).astype(np.float64)
    centre = places.mean(axis=1)
    offsets = places - centre[:, None]
    return centre, offsets @ offsets.T / places.shape[1] + np.eye(2) / 12


def _gaussian_transport(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric matrix A with A source A = target: optimal transport between centred Gaussians."""

    def root(matrix: NDArray[np.float64], power: float) -> NDArray[np.float64]:
        values, vectors = np.linalg.eigh(matrix)
        return np.asarray((vectors * np.maximum(values, 1e-9) ** power) @ vectors.T)

    half, inverse = root(source, 0.5), root(source, -0.5)
    return inverse @ root(half @ target @ half, 0.5) @ inverse
