"""Reading stored PNGs, and the pictures people look at: overlays, grids, contact sheets."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_BACK = (245, 245, 245)
_OUTLINE = (255, 210, 0)


def decode_png(data: bytes) -> Pixels:
    """Image (H, W, C) of a PNG this service has written, C 1 or 3."""
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def decode_mask(data: bytes) -> Mask:
    """Mask (H, W) of a PNG this service has written."""
    return np.asarray(decode_png(data)[..., 0] > 127)


def rgb(pixels: Pixels | Mask) -> Pixels:
    """(H, W, 3) of an image or a mask."""
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8)


def overlay(image: Pixels, label: Mask) -> Pixels:
    """``image`` with the outline of ``label`` drawn in yellow."""
    width = max(1, round(max(label.shape) / 128))
    inner = label.copy()
    for _ in range(width):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    picture = rgb(image).copy()
    picture[label & ~inner] = _OUTLINE
    return picture


def tile(pixels: Pixels | Mask, side: int) -> Image.Image:
    """A square thumbnail of ``side`` pixels, letterboxed."""
    picture = Image.fromarray(rgb(pixels))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), _BACK)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def sheet(
    rows: Sequence[Sequence[Pixels | Mask]],
    header: Sequence[str],
    captions: Sequence[str] = (),
    side: int = 128,
    groups: int = 1,
) -> bytes:
    """PNG of a table of thumbnails: one row an entry, ``groups`` entries beside each other, ``header`` over each."""
    gap, text = 4, 16
    columns = len(header)
    group_width = columns * (side + gap) + 3 * gap
    lines = -(-len(rows) // groups)
    row_height = side + gap + (text if captions else 0)
    canvas = Image.new("RGB", (groups * group_width + gap, text + 2 * gap + lines * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    for group in range(min(groups, len(rows))):
        for column, title in enumerate(header):
            draw.text((group * group_width + gap + column * (side + gap), gap), title, fill="black")
    for n, row in enumerate(rows):
        left = (n % groups) * group_width + gap
        top = text + 2 * gap + (n // groups) * row_height
        for column, pixels in enumerate(row):
            canvas.paste(tile(pixels, side), (left + column * (side + gap), top))
        if captions:
            draw.text((left, top + side), captions[n], fill=(90, 90, 90))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
