"""Drawn textures, shapes and scenes: what the built-in foundation learns from and what the phantoms are made of.

Everything is a pure function of a `np.random.Generator`. Pictures are float32 in [0, 1] of shape (h, w, 3), grey ones
with three equal channels; fields are float32 (h, w); masks are bool (h, w). Sizes are (h, w) in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

Size = tuple[int, int]
Field = NDArray[np.float32]
Picture = NDArray[np.float32]
Mask = NDArray[np.bool_]
Generator = np.random.Generator


# ---------------------------------------------------------------------------------------------------------- fields


def _frequencies(size: Size, stretch: tuple[float, float]) -> Field:
    fy = np.fft.fftfreq(size[0])[:, None] * stretch[0]
    fx = np.fft.rfftfreq(size[1])[None, :] * stretch[1]
    return np.hypot(fy, fx).astype(np.float32)


def _standardised(field: NDArray[np.floating]) -> Field:
    field = field - field.mean()
    return (field / (field.std() + 1e-8)).astype(np.float32)


def fractal(rng: Generator, size: Size, slope: float = 1.5, stretch: tuple[float, float] = (1.0, 1.0)) -> Field:
    """A random field with amplitude spectrum 1/f^slope, zero mean and unit deviation; `stretch` > 1 smooths an axis."""
    f = _frequencies(size, stretch)
    f[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal(size, dtype=np.float32)) / f**slope
    spectrum[0, 0] = 0.0
    return _standardised(np.fft.irfft2(spectrum, s=size))


def smooth(rng: Generator, size: Size, length: float, stretch: tuple[float, float] = (1.0, 1.0)) -> Field:
    """Gaussian-filtered white noise of correlation length `length` px, zero mean and unit deviation."""
    gain = np.exp(-2.0 * (np.pi * length * _frequencies(size, stretch)) ** 2)
    spectrum = np.fft.rfft2(rng.standard_normal(size, dtype=np.float32)) * gain
    return _standardised(np.fft.irfft2(spectrum, s=size))


def speckle(rng: Generator, size: Size, length: float = 1.0, stretch: tuple[float, float] = (1.0, 1.0)) -> Field:
    """Fully developed ultrasound speckle: the Rayleigh-distributed envelope of a complex Gaussian field, mean 1."""
    real, imaginary = smooth(rng, size, length, stretch), smooth(rng, size, length, stretch)
    return (np.hypot(real, imaginary) / np.sqrt(np.pi / 2)).astype(np.float32)


def gradient(rng: Generator, size: Size) -> Field:
    """A tilted plane with a little curvature, from 0 to 1."""
    y, x = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]), indexing="ij")
    angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.6, 0.6)
    plane = np.cos(angle) * x + np.sin(angle) * y + bend * (x**2 + y**2)
    return ((plane - plane.min()) / np.ptp(plane)).astype(np.float32)


# --------------------------------------------------------------------------------------------------------- colours

_TINTS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "skin": ((0.62, 1.0), (0.62, 0.85), (0.60, 0.98)),
    "pink": ((0.70, 1.0), (0.55, 0.80), (0.80, 1.15)),
    "brown": ((0.15, 0.65), (0.45, 0.75), (0.35, 0.85)),
    "pale": ((0.75, 1.0), (0.88, 1.0), (0.9, 1.05)),
}


def colour(rng: Generator, tint: str | None = None) -> Field:
    """An RGB colour (3,) in [0, 1]: "skin", "pink", "brown", "pale", "grey" or "any"; by default one by chance."""
    tint = tint or str(rng.choice(["skin", "pink", "brown", "pale", "grey", "any", "any"]))
    if tint == "any":
        return rng.random(3, dtype=np.float32)
    if tint == "grey":
        return np.full(3, rng.uniform(0.03, 0.95), np.float32)
    red, green, blue = (rng.uniform(*bounds) for bounds in _TINTS[tint])
    return np.clip([red, red * green, red * green * blue], 0, 1).astype(np.float32)


def near(rng: Generator, centre: Field, distance: float) -> Field:
    """A colour (3,) that differs from `centre` by about `distance`, mostly in brightness."""
    step = rng.choice([-1, 1]) * distance + rng.normal(0, 0.25 * distance, 3)
    return np.clip(centre + step, 0, 1).astype(np.float32)


def mix(first: NDArray[np.floating], second: NDArray[np.floating], weight: Field) -> Picture:
    """Blend two colours (3,) or pictures (h, w, 3) by `weight` (h, w) in [0, 1], which is the share of the second."""
    w = weight[..., None]
    return (first * (1 - w) + second * w).astype(np.float32)


def _sigmoid(field: NDArray[np.floating]) -> Field:
    return (1 / (1 + np.exp(-np.clip(field, -30, 30)))).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- textures


def flat(rng: Generator, size: Size) -> Picture:
    """One colour, a soft gradient and a trace of noise."""
    base = colour(rng)
    picture = mix(base, near(rng, base, rng.uniform(0, 0.2)), gradient(rng, size))
    return picture + rng.uniform(0, 0.03) * smooth(rng, size, rng.uniform(0, 1))[..., None]


def skin(rng: Generator, size: Size) -> Picture:
    """Skin as a dermatoscope shows it: a smooth tint that drifts, mottling, fine pores, now and then hairs."""
    base = colour(rng, str(rng.choice(["skin", "skin", "pink", "brown", "pale", "any"])))
    picture = mix(base, near(rng, base, rng.uniform(0.02, 0.2)), gradient(rng, size))
    for slope, most in ((2.0, 0.06), (1.0, 0.04)):
        amount = rng.uniform(0, most) * rng.uniform(0.6, 1.4, 3)
        picture = picture + fractal(rng, size, slope)[..., None] * amount.astype(np.float32)
    picture = picture + rng.uniform(0, 0.03) * smooth(rng, size, rng.uniform(0.4, 1.2))[..., None]
    return add_hairs(rng, picture) if rng.random() < 0.2 else picture


def pigment(rng: Generator, size: Size) -> Picture:
    """Pigment: brown to blue-grey clouds, sometimes with a network of dark meshes, globules or light streaks."""
    dark = colour(rng, str(rng.choice(["brown", "brown", "any", "grey"]))) * np.float32(rng.uniform(0.5, 1))
    picture = mix(
        dark, near(rng, dark, rng.uniform(0.05, 0.3)), _sigmoid(1.5 * fractal(rng, size, rng.uniform(1.2, 2)))
    )
    kind = rng.integers(4)
    if kind == 0:
        meshes = np.abs(smooth(rng, size, rng.uniform(1.2, 3)))
        picture = picture * (1 - rng.uniform(0.2, 0.7) * np.exp(-4 * meshes)[..., None])
    elif kind == 1:
        globules = _sigmoid(8 * (smooth(rng, size, rng.uniform(1, 2.5)) - 1.2))
        picture = mix(picture, near(rng, dark, 0.25), globules)
    elif kind == 2:
        streaks = np.clip(smooth(rng, size, rng.uniform(0.7, 1.2)) - 1.8, 0, 1)
        picture = picture + rng.uniform(0.1, 0.5) * streaks[..., None]
    return picture + rng.uniform(0, 0.04) * smooth(rng, size, rng.uniform(0.3, 1))[..., None]


def ultrasound(rng: Generator, size: Size) -> Picture:
    """Grey layered tissue with log-compressed multiplicative speckle, bright fibres and shadows to the depth."""
    level = rng.uniform(0.12, 0.6)
    stretch = (1.0, rng.uniform(1, 4))
    tissue = level * (1 + rng.uniform(0, 0.5) * fractal(rng, size, rng.uniform(1.2, 2), stretch))
    if rng.random() < 0.5:
        fibres = 1 - np.abs(smooth(rng, size, rng.uniform(1.5, 4), (1.0, rng.uniform(2, 6))))
        tissue = tissue + rng.uniform(0.1, 0.5) * np.clip(fibres, 0, 1) ** 4 * _sigmoid(3 * smooth(rng, size, 10))
    if rng.random() < 0.4:
        columns = ndimage.gaussian_filter1d(rng.standard_normal(size[1]), rng.uniform(3, 12), mode="reflect")
        shade = _sigmoid(2 * columns / (columns.std() + 1e-6))[None, :] * np.linspace(0, 1, size[0])[:, None]
        tissue = tissue * (1 - rng.uniform(0.2, 0.9) * shade)
    tissue = tissue * (1 - rng.uniform(0, 0.6) * gradient(rng, size))
    grain = speckle(rng, size, rng.uniform(0.4, 1.8), (1.0, rng.uniform(1, 2.5)))
    grey = np.clip(tissue, 0.01, None) * grain ** rng.uniform(0.1, 0.8)
    return np.repeat(grey[..., None], 3, axis=2).astype(np.float32)


def shadow(rng: Generator, size: Size) -> Picture:
    """Dark and nearly empty, as a cyst or an acoustic shadow: a low level with faint speckle."""
    level = rng.uniform(0.0, 0.15)
    grey = level * (1 + 0.4 * fractal(rng, size, 1.5)) + rng.uniform(0, 0.08) * speckle(
        rng, size, rng.uniform(0.5, 1.5)
    )
    return np.repeat(grey[..., None], 3, axis=2).astype(np.float32)


def clouds(rng: Generator, size: Size) -> Picture:
    """Fractal noise between two or three colours."""
    base = colour(rng)
    other = near(rng, base, rng.uniform(0.05, 0.4)) if rng.random() < 0.6 else colour(rng)
    picture = mix(base, other, _sigmoid(rng.uniform(0.5, 3) * fractal(rng, size, rng.uniform(0.8, 2.2))))
    if rng.random() < 0.3:
        picture = mix(picture, colour(rng), _sigmoid(4 * (fractal(rng, size, 1.8) - 1)))
    return picture


def grain(rng: Generator, size: Size) -> Picture:
    """Coloured grain of one correlation length: sand, felt, sensor noise."""
    amount = rng.uniform(0.02, 0.2)
    field = smooth(rng, size, rng.uniform(0.3, 3), (1.0, rng.uniform(1, 3)))
    return colour(rng) + amount * (field[..., None] * rng.uniform(0.6, 1.4, 3).astype(np.float32))


def stripes(rng: Generator, size: Size) -> Picture:
    """Wavy bands in two colours."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 40)
    phase = 2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period
    phase = phase + rng.uniform(0, 2.5) * smooth(rng, size, rng.uniform(6, 20))
    base = colour(rng)
    bands = _sigmoid(rng.uniform(1, 6) * np.sin(phase + rng.uniform(0, 6)))
    return mix(base, near(rng, base, rng.uniform(0.08, 0.4)), bands)


def cells(rng: Generator, size: Size) -> Picture:
    """A mosaic of irregular cells (Voronoi), each in its own shade, with or without darker seams."""
    count = int(rng.integers(12, 140))
    points = rng.random((count, 2)) * size
    y, x = np.mgrid[: size[0], : size[1]]
    warp = rng.uniform(0, 3)
    query = np.stack([y + warp * smooth(rng, size, 4), x + warp * smooth(rng, size, 4)], axis=-1).astype(np.float32)
    nearest, owner = cKDTree(points).query(query, k=2)
    shade = 1 + rng.uniform(0.03, 0.3) * rng.standard_normal(count)
    seam = _sigmoid(rng.uniform(0.7, 3) * (nearest[..., 1] - nearest[..., 0] - rng.uniform(0.5, 2.5)))
    depth = rng.uniform(0, 0.8)
    return colour(rng) * (shade[owner[..., 0]] * (1 - depth + depth * seam))[..., None].astype(np.float32)


def blobs(rng: Generator, size: Size) -> Picture:
    """Round spots of one colour scattered over another: droplets, beads, freckles."""
    base = colour(rng)
    field = smooth(rng, size, rng.uniform(1, 6))
    spots = _sigmoid(rng.uniform(4, 12) * (field - rng.uniform(0.5, 1.8)))
    picture = mix(base, near(rng, base, rng.uniform(0.1, 0.5)), spots)
    return picture + rng.uniform(0, 0.03) * smooth(rng, size, 0.6)[..., None]


def gravel(rng: Generator, size: Size) -> Picture:
    """Rough relief lit from one side."""
    height = fractal(rng, size, rng.uniform(0.7, 1.6))
    angle = rng.uniform(0, 2 * np.pi)
    slope = _standardised(np.cos(angle) * np.gradient(height, axis=1) + np.sin(angle) * np.gradient(height, axis=0))
    return colour(rng) * (1 + rng.uniform(0.05, 0.35) * slope)[..., None]


def add_hairs(rng: Generator, picture: Picture) -> Picture:
    """Up to eight thin curved hairs, dark or light, over a picture."""
    h, w = picture.shape[:2]
    strokes = np.zeros((h, w), np.float32)
    for _ in range(int(rng.integers(1, 9))):
        t = np.linspace(0, 1, 4 * max(h, w))
        start, angle = rng.random(2) * (h, w), rng.uniform(0, 2 * np.pi)
        length, bend = rng.uniform(0.2, 1.0) * max(h, w), rng.uniform(-0.4, 0.4)
        y = start[0] + length * (t * np.sin(angle) + bend * t**2 * np.cos(angle))
        x = start[1] + length * (t * np.cos(angle) - bend * t**2 * np.sin(angle))
        inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
        strokes[y[inside].astype(int), x[inside].astype(int)] = 1
    width = rng.uniform(0.4, 1.2)
    cover = np.clip(2.2 * width * ndimage.gaussian_filter(strokes, width), 0, 1)
    return mix(picture, colour(rng, "brown") * np.float32(rng.uniform(0.1, 1)), cover)


TEXTURES: dict[str, Callable[[Generator, Size], Picture]] = {
    "skin": skin,
    "pigment": pigment,
    "ultrasound": ultrasound,
    "shadow": shadow,
    "flat": flat,
    "clouds": clouds,
    "grain": grain,
    "stripes": stripes,
    "cells": cells,
    "blobs": blobs,
    "gravel": gravel,
}


def to_grey(picture: Picture) -> Picture:
    """Luma (ITU-R BT.601) in three equal channels."""
    luma = picture @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat(luma[..., None], 3, axis=2)


def texture(rng: Generator, size: Size, kind: str | None = None, grey: bool | None = None) -> Picture:
    """One texture, float32 (h, w, 3) in [0, 1]; `kind` is a key of TEXTURES, drawn by chance if left out.

    `grey` True turns it grey and False leaves its colours (an "ultrasound" is grey anyway); None decides by chance.
    """
    kind = kind or str(rng.choice(list(TEXTURES)))
    picture = TEXTURES[kind](rng, size)
    if grey if grey is not None else rng.random() < 0.25:
        picture = to_grey(picture)
    return np.clip(picture, 0, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- shapes


def star(rng: Generator, size: Size, roughness: float | None = None) -> Field:
    """Signed field (h, w), positive inside a star-shaped blob whose radius is a Fourier series of the angle."""
    roughness = rng.uniform(0.0, 0.35) if roughness is None else roughness
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    y, x = y / size[0] - rng.uniform(0.25, 0.75), x / size[1] - rng.uniform(0.25, 0.75)
    turn, squeeze = rng.uniform(0, np.pi), rng.uniform(0.55, 1.0)
    u, v = np.cos(turn) * x + np.sin(turn) * y, (np.cos(turn) * y - np.sin(turn) * x) / squeeze
    angle, radius = np.arctan2(v, u), np.hypot(u, v)
    order = np.arange(2, 9)
    weight = roughness * rng.standard_normal(7) / order**1.2
    phase = rng.uniform(0, 2 * np.pi, 7)
    profile = sum(a * np.cos(n * angle + p) for a, n, p in zip(weight, order, phase, strict=True))
    return (-radius / np.exp(profile)).astype(np.float32)


def ellipse(rng: Generator, size: Size) -> Field:
    """Signed field of a turned ellipse."""
    return star(rng, size, roughness=0.0)


def lobulated(rng: Generator, size: Size) -> Field:
    """Signed field of a union of two to five overlapping round lobes."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    y, x = y / size[0], x / size[1]
    centre = rng.uniform(0.3, 0.7, 2)
    field = np.full(size, -10.0, np.float32)
    for _ in range(int(rng.integers(2, 6))):
        cy, cx = centre + rng.normal(0, 0.09, 2)
        field = np.maximum(field, -np.hypot(y - cy, x - cx) / rng.uniform(0.7, 1.3))
    return field.astype(np.float32)


def level_set(rng: Generator, size: Size) -> Field:
    """Signed field of an irregular patch: smooth noise added to a bump."""
    short = min(size)
    return star(rng, size, 0.1) + rng.uniform(0.03, 0.10) * smooth(rng, size, rng.uniform(0.02, 0.08) * short)


SHAPES: dict[str, Callable[[Generator, Size], Field]] = {
    "star": star,
    "ellipse": ellipse,
    "lobulated": lobulated,
    "level_set": level_set,
}


def shape(rng: Generator, size: Size, area: tuple[float, float] = (0.02, 0.3), kind: str | None = None) -> Mask:
    """One connected mask without holes, bool (h, w), that covers about a share within `area` of the picture."""
    field = SHAPES[kind or str(rng.choice(list(SHAPES)))](rng, size)
    share = np.exp(rng.uniform(*np.log(area)))
    mask = field > np.quantile(field, 1 - share)
    labels, count = ndimage.label(mask)
    if count > 1:
        mask = labels == 1 + int(np.argmax(ndimage.sum_labels(mask, labels, range(1, count + 1))))
    return np.asarray(ndimage.binary_fill_holes(mask))


def alpha(mask: Mask, softness: float) -> Field:
    """Opacity (h, w) in [0, 1] of a mask whose rim fades over about `softness` px to either side; 0 is a hard rim."""
    if softness <= 0:
        return mask.astype(np.float32)
    return ndimage.gaussian_filter(mask.astype(np.float32), softness)


# ---------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Lesion:
    """What `paint` did: the picture (h, w, 3), and words for the rim, the contrast and the filling."""

    picture: Picture
    words: str


def paint(rng: Generator, background: Picture, mask: Mask, filling: Picture, related: bool) -> Lesion:
    """Lay `filling` into `mask` over `background`, with a rim from hard to soft and now and then a halo or a shadow.

    `related` recolours the filling around the background's own mean colour, from a faint to a strong contrast.
    """
    diameter = 2 * np.sqrt(mask.sum() / np.pi)
    softness = float(rng.choice([0.4, 0.8, 0.03 * diameter, 0.08 * diameter]))
    words = "soft" if softness > 2 else "sharp"
    if related:
        inside = background[mask].mean(0)
        contrast = rng.uniform(0.06, 0.5) * (1 if rng.random() < 0.25 else -1)
        tint = rng.normal(0, 0.2 * abs(contrast), 3) if np.ptp(background, axis=2).max() > 0.02 else 0
        detail = filling - filling.mean((0, 1))
        filling = (inside + contrast + tint + detail * rng.uniform(0.3, 1)).astype(np.float32)
        words += " bright" if contrast > 0 else " dark"
    opacity = alpha(mask, softness)
    picture = background
    if rng.random() < 0.15:
        halo = np.clip(alpha(ndimage.binary_dilation(mask, iterations=max(1, int(0.08 * diameter))), 2) - opacity, 0, 1)
        picture = picture + rng.uniform(-0.15, 0.25) * halo[..., None]
        words += " ringed"
    return Lesion(np.clip(mix(picture, filling, opacity), 0, 1), words)
