"""Phantoms: a drawn dataset for demos and tests. No patient stands behind it; nothing medical is to be read from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meddiff import drawing
from meddiff.importing.pixels import encode_mask, encode_png
from meddiff.seeds import derive

SIZE = (256, 256)

README = """These are phantoms: drawings made by the program meddiff, from noise and curves.
No image here shows a patient, an animal or tissue. They serve to try the software, for nothing else.

images/       drawn lesions on drawn skin, 8-bit RGB PNG
masks/        where the lesion was drawn, 8-bit grey PNG, 0 and 255
backgrounds/  drawn skin without a lesion
"""


def write(folder: Path, pairs: int = 30, backgrounds: int = 6, seed: int = 0) -> None:
    """Draw ``pairs`` images with masks and ``backgrounds`` images without lesion into ``folder``, in the layout
    ``images/``, ``masks/``, ``backgrounds/``, 256x256 RGB. Equal seeds give equal bytes."""
    for name in ("images", "masks", "backgrounds"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "README.txt").write_text(README)
    for n in range(pairs):
        rng = np.random.default_rng(derive(seed, "phantom", "pair", n))
        mask = drawing.shape(rng, SIZE, area=(0.04, 0.2))
        (folder / f"images/phantom_{n:03d}.png").write_bytes(_png(lesion(rng, skin(rng), mask)))
        (folder / f"masks/phantom_{n:03d}.png").write_bytes(encode_mask(mask))
    for n in range(backgrounds):
        rng = np.random.default_rng(derive(seed, "phantom", "background", n))
        (folder / f"backgrounds/phantom_{n:03d}.png").write_bytes(_png(skin(rng)))


def skin(rng: drawing.Generator) -> drawing.Picture:
    """Drawn skin, float32 (256, 256, 3) in [0, 1]: one tint that drifts, mottling and fine pores."""
    tint = drawing.colour(rng, "skin")
    picture = drawing.mix(tint, drawing.near(rng, tint, 0.06), drawing.gradient(rng, SIZE))
    mottling = 0.02 * drawing.fractal(rng, SIZE, 1.5) + 0.012 * drawing.smooth(rng, SIZE, 1.0)
    return np.clip(picture + mottling[..., None], 0, 1).astype(np.float32)


def lesion(rng: drawing.Generator, background: drawing.Picture, mask: drawing.Mask) -> drawing.Picture:
    """``background`` (h, w, 3) with a dark, clouded patch in ``mask`` (h, w) whose rim fades over some pixels."""
    around = background[mask].mean(axis=0)
    dark = around * rng.uniform(0.35, 0.65) * np.array([1.0, 0.85, 0.75], np.float32)
    clouds = 0.08 * drawing.fractal(rng, SIZE, 1.3) + 0.03 * drawing.smooth(rng, SIZE, 1.5)
    filling = np.clip(dark * (1 + 2 * clouds[..., None]), 0, 1).astype(np.float32)
    return drawing.mix(background, filling, drawing.alpha(mask, float(rng.uniform(1.5, 4))))


def _png(picture: drawing.Picture) -> bytes:
    return encode_png(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8))
