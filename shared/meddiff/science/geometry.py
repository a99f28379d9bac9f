"""Masks, windows and pixels: where the inpainter looks, what it may change, and how a patch returns to its image.

Images are uint8 (H, W, C) with C 1 or 3, masks bool (H, W). ``shape`` is the lesion, ``guide`` the exact support of
change (M of eq. 2), a superset of the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from meddiff.contracts.manifest import Window

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Field = NDArray[np.float32]
Kernel = Callable[[NDArray[np.float64]], NDArray[np.float64]]
Pixels = TypeVar("Pixels", NDArray[np.uint8], NDArray[np.float32], NDArray[np.bool_])
Colours = TypeVar("Colours", NDArray[np.uint8], NDArray[np.float32])
Real = TypeVar("Real", np.float32, np.float64)

SMALLEST_WINDOW = 64


def equivalent_diameter(mask: Mask) -> float:
    """Diameter in pixels of the disc that has the mask's area; 0 for an empty mask."""
    return float(2 * np.sqrt(mask.sum() / np.pi))


def dilate(mask: Mask, radius: float) -> Mask:
    """Every pixel within ``radius`` px (Euclidean) of the mask; an empty mask stays empty."""
    if not mask.any():
        return mask.copy()
    reach = int(np.ceil(radius))
    rows, columns = _box(mask)
    near = (
        slice(max(rows.start - reach, 0), rows.stop + reach),
        slice(max(columns.start - reach, 0), columns.stop + reach),
    )
    dilated = mask.copy()
    dilated[near] = ndimage.distance_transform_edt(~mask[near]) <= radius
    return dilated


def guide_of(shape: Mask, margin: float, cover: Mask | None = None) -> Mask:
    """The guide of a shape: the shape and ``margin`` times its equivalent diameter around it, at least 1 px if the
    margin is above 0. ``cover``, the lesion that the background already has, is widened by its own margin and joined,
    so that nothing of it stays visible beside the new one."""

    def widened(mask: Mask, least: float) -> Mask:
        return dilate(mask, max(margin * equivalent_diameter(mask), least))

    guide = widened(shape, 1.0 if margin > 0 else 0.0)
    return guide if cover is None else guide | widened(cover, 1.0)


def window_around(guide: Mask, context: float, minimum: int = SMALLEST_WINDOW) -> Window:
    """The square in which a guide is painted: ``context`` times the larger side of its box, at least ``minimum`` px and
    at most the image's longer side (so a large context means the whole image).

    It is centred on the box and moved inside the image; along an axis on which the image is shorter, it reaches beyond
    both edges alike. Raises ``ValueError`` for an empty guide.
    """
    if not guide.any():
        raise ValueError("an empty guide has no window")
    box = _box(guide)
    larger = max(axis.stop - axis.start for axis in box)
    side = int(min(max(round(context * larger), minimum), max(guide.shape)))

    def first(axis: slice, length: int) -> int:
        if side >= length:
            return (length - side) // 2
        return int(min(max((axis.start + axis.stop - side) // 2, 0), length - side))

    return Window(top=first(box[0], guide.shape[0]), left=first(box[1], guide.shape[1]), side=side)


def crop_window(array: Pixels, window: Window) -> Pixels:
    """The window's pixels (side, side, ...). Beyond the image's edge an image repeats its last row or column, a mask
    is False: no padded pixel is ever labelled."""
    rows = np.arange(window.top, window.top + window.side)
    columns = np.arange(window.left, window.left + window.side)
    height, width = array.shape[:2]
    cropped = array[np.clip(rows, 0, height - 1)[:, None], np.clip(columns, 0, width - 1)[None, :]]
    if array.dtype == np.bool_:
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
        cropped = cropped & inside
    return cropped


def extend_window(mask: Mask, window: Window) -> Mask:
    """The window's pixels of a mask that goes on beyond the image's edge as the image itself does: how the network, and
    whatever is interpolated, sees a lesion that the edge cuts."""
    return crop_window(mask.astype(np.uint8), window).astype(np.bool_)


def resize_image(image: Colours, size: tuple[int, int]) -> Colours:
    """An image (H, W, C) at ``size`` (h, w) by a cubic kernel (Keys, a = -1/2), widened when it shrinks so that nothing
    aliases. uint8 stays uint8, rounded and clipped; float32 stays float32 of any range."""
    resized = _resample(image.astype(np.float32), size, _keys)
    if image.dtype == np.uint8:
        resized = np.clip(np.rint(resized), 0, 255)
    return resized.astype(image.dtype)


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """A mask at ``size`` (h, w): pixels whose covered share, by a triangle kernel, is at least one half; where there is
    none, the one most covered, so that nothing but an empty mask comes out empty."""
    covered = _resample(mask.astype(np.float32)[..., None], size, _triangle)[..., 0]
    return np.asarray((covered >= min(0.5, float(covered.max()))) & (covered > 0))


def paste(background: Image, patch: Image, window: Window, guide: Mask) -> Image:
    """The background (H, W, C) with the patch (side, side, C) of the window inside the guide (H, W), and outside the
    guide equal to what it was, bit for bit."""
    rows = slice(max(window.top, 0), min(window.top + window.side, background.shape[0]))
    columns = slice(max(window.left, 0), min(window.left + window.side, background.shape[1]))
    inside = guide[rows, columns]
    pasted = background.copy()
    pasted[rows, columns][inside] = patch[
        rows.start - window.top : rows.stop - window.top, columns.start - window.left : columns.stop - window.left
    ][inside]
    return pasted


def condition_mask(shape: Mask, guide: Mask, factor: int) -> Field:
    """The U-Net's graded mask channel (h/factor, w/factor): mean over each latent cell of 1 in the shape, 0.5 in the
    rest of the guide, 0 where the image is kept."""
    graded = (guide.astype(np.float32) + (shape & guide)) / 2
    return np.asarray(_cells(graded, factor).mean(axis=(1, 3)), dtype=np.float32)


def guide_cells(guide: Mask, factor: int) -> Mask:
    """The latent cells (h/factor, w/factor) that hold any pixel of the guide (max-pooling)."""
    return np.asarray(_cells(guide, factor).any(axis=(1, 3)))


def smooth_fill(image: Field, hole: Mask) -> Field:
    """The image (H, W, C) with its hole filled smoothly from outside: normalised convolution (Knutsson and Westin,
    CVPR 1993) with a sum of Gaussians, heavy-tailed as r^-3, so that the nearest surroundings count most.

    Works at 128 px at most; what it fills holds no detail. A hole without surroundings is filled with its own mean.
    """
    height, width = hole.shape
    if hole.all():
        return np.broadcast_to(image.mean(axis=(0, 1), dtype=np.float32), image.shape).copy()
    shrink = max(1.0, max(height, width) / 128)
    size = (max(1, round(height / shrink)), max(1, round(width / shrink)))
    known = (~hole).astype(np.float32)[..., None]
    weighted = _resample(np.concatenate([known * image, known], axis=-1), size, _triangle).astype(np.float64)
    spread = np.zeros_like(weighted)
    for sigma in (2, 4, 8, 16, 32, 64):
        spread += _separable(_gaussian(size[0], sigma), _gaussian(size[1], sigma), weighted) / sigma
    value, total = spread[..., :-1], spread[..., -1:]
    filled = _resample((value / np.maximum(total, 1e-12)).astype(np.float32), (height, width), _triangle)
    return np.where(hole[..., None], filled, image).astype(np.float32)


def mirrored_detail(image: Field, hole: Mask) -> Field:
    """Texture for a hole (H, W, C), 0 elsewhere: each of its pixels takes the detail of its mirror image across the
    hole's rim, fading out where that lies in the hole or outside the picture, and with the depth in the hole.

    Detail is the image less its local mean over 4 px, clipped at two standard deviations so that no edge is mirrored.
    """
    known = (~hole).astype(np.float32)[..., None]
    detail = image - _blur(known * image, 4) / np.maximum(_blur(known, 4), 1e-6)
    if hole.all():
        return np.zeros_like(image)
    limit = 2 * detail[~hole].std(axis=0)
    depth, nearest = ndimage.distance_transform_edt(hole, return_indices=True)
    reach = max(hole.shape) / 12
    mirror = 2 * nearest - np.indices(hole.shape, np.int32)
    last = np.array(hole.shape, np.int32).reshape(2, 1, 1) - 1
    inside = np.clip(mirror, 0, last)
    valid = (mirror == inside).all(axis=0) & ~hole[inside[0], inside[1]]
    weight = valid[..., None] * _blur((valid | ~hole)[..., None].astype(np.float32), 2)
    weight *= np.exp(-((depth / reach) ** 2))[..., None]
    mirrored = weight * np.clip(detail[inside[0], inside[1]], -limit, limit)
    return np.where(hole[..., None], mirrored, 0).astype(np.float32)


def _blur(image: Field, sigma: float) -> Field:
    return np.asarray(ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="constant"), dtype=np.float32)


def _box(mask: Mask) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _cells(array: NDArray[np.generic], factor: int) -> NDArray[np.generic]:
    height, width = array.shape
    return array.reshape(height // factor, factor, width // factor, factor)


def _resample(image: Field, size: tuple[int, int], kernel: Kernel) -> Field:
    """Separable resampling of (H, W, C) to ``size``; edges are renormalised over the pixels that exist."""

    def weights(length: int, wanted: int) -> Field:
        scale = length / wanted
        width = max(scale, 1.0)
        centres = (np.arange(wanted) + 0.5) * scale - 0.5
        taps = kernel(np.asarray((np.arange(length)[None, :] - centres[:, None]) / width, np.float64))
        return np.asarray(taps / taps.sum(axis=1, keepdims=True), np.float32)

    return _separable(weights(image.shape[0], size[0]), weights(image.shape[1], size[1]), image)


def _separable(rows: NDArray[Real], columns: NDArray[Real], image: NDArray[Real]) -> NDArray[Real]:
    """An image (H, W, C) weighed by ``rows`` (h, H) and ``columns`` (w, W): (h, w, C)."""
    if len(rows) < len(image):
        return np.asarray(np.matmul(columns, np.tensordot(rows, image, axes=(1, 0))))
    return np.asarray(np.tensordot(rows, np.matmul(columns, image), axes=(1, 0)))


@lru_cache(maxsize=32)
def _gaussian(length: int, sigma: float) -> NDArray[np.float64]:
    """What each of ``length`` pixels gives to each (length, length): a Gaussian cut at four sigmas, nothing beyond the
    edges. For short lengths, where it is far quicker than a convolution."""
    reach = round(4 * sigma)
    apart = np.arange(length)[:, None] - np.arange(length)
    total = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).sum()
    return np.where(np.abs(apart) <= reach, np.exp(-0.5 * (apart / sigma) ** 2), 0) / total


def _keys(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.asarray(np.where(x < 1, near, np.where(x < 2, far, 0.0)))


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.maximum(1 - np.abs(x), 0.0))
