"""What a pixel means: files of many kinds become 8-bit grey or RGB images and yes-or-no masks, or a clear fault."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
MIN_SIDE = 16
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF")

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

RIM_PX = 8
_BLACK, _WHITE = 0.15 * 255, 0.85 * 255
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_NAMED_MODES = {"CMYK": "CMYK", "LAB": "CIE Lab", "F": "floating-point values", "YCbCr": "raw YCbCr"}


class PixelError(ValueError):
    """A file whose pixels are not to be used; its text tells the user why, and what to do."""


@dataclass(frozen=True)
class Window:
    """How more than 8 bits become 8: ``low`` and below is 0, ``high`` and above is 255, between them it is linear."""

    low: int
    high: int

    def apply(self, values: NDArray[np.integer[Any]]) -> Pixels:
        """uint8 of the shape of ``values``."""
        scaled = (values.astype(np.float64) - self.low) * (255 / (self.high - self.low))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class DecodedImage:
    """``pixels`` uint8 (h, w, c), c 1 or 3, upright. ``orientation`` is what EXIF said of the file's own (1: upright,
    5 to 8: lying). ``notes`` say what was done to them."""

    pixels: Pixels
    orientation: int
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def unturned(self) -> tuple[int, int]:
        """(width, height) of the file's own pixels, before the orientation was applied."""
        width, height = self.size
        return (height, width) if self.orientation >= 5 else (width, height)


def decode_image(data: bytes, window: Window | None = None) -> DecodedImage:
    """The image in ``data``: orientation applied, metadata and opaque alpha dropped, grey with one channel.

    Grey of more than 8 bits needs a ``window``. Raises ``PixelError`` for anything else than one 8-bit grey, palette
    or RGB picture of at most 64 megapixels, named by what it is.
    """
    image, orientation = _load(_open(data))
    notes = ["turned as its EXIF orientation says"] if orientation > 1 else []
    if image.mode in _DEEP_GREY:
        if window is None:
            raise PixelError("more than 8 bits a sample; save it with 8, or put a window.json beside the data")
        pixels = window.apply(np.asarray(image))[..., None]
        return DecodedImage(
            pixels, orientation, (*notes, f"more than 8 bits, through the window {window.low} to {window.high}")
        )
    image, dropped = _without_alpha(image)
    if dropped:
        notes.append("opaque alpha channel dropped")
    if image.mode in ("1", "L"):
        return DecodedImage(np.asarray(image.convert("L"))[..., None], orientation, tuple(notes))
    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if _is_grey(pixels):
        return DecodedImage(
            np.ascontiguousarray(pixels[..., :1]), orientation, (*notes, "grey in three channels, kept as one")
        )
    return DecodedImage(pixels, orientation, tuple(notes))


def decode_mask(data: bytes) -> Mask:
    """The mask in ``data`` as bool (h, w), True inside the lesion: brighter than half of its brightest value.

    0/1, 0/255, 1-bit, 16-bit, RGB and palette files mean the same. Grey along a rim, as JPEG and smooth scaling leave
    it, is cut at the half; grey elsewhere, a second level over an area, or several colours, is no mask. Raises
    ``PixelError``.
    """
    opened = _open(data)
    lossy = opened.format == "JPEG"
    image, _ = _load(opened)
    if image.mode in _DEEP_GREY:
        values: NDArray[np.integer[Any]] = np.asarray(image).astype(np.int32)
    else:
        image, _ = _without_alpha(image)
        values = np.asarray(image.convert("L")) if image.mode in ("1", "L") else _one_channel(image, lossy)
    brightest = int(values.max())
    if brightest <= 0:
        return np.zeros(values.shape, np.bool_)
    _refuse_grey_areas(_brightened(values, brightest), tolerance=0.10 if lossy else 0.02)
    if not lossy:
        _refuse_classes(values, brightest)
    return np.asarray(values > brightest / 2)


def _brightened(values: NDArray[np.integer[Any]], brightest: int) -> Pixels:
    """Values up to ``brightest`` as 0 to 255; of 8-bit ones by a table, for a photograph's mask has many."""
    levels = np.arange(256) if values.dtype == np.uint8 else values
    scaled = np.clip(levels * (255.0 / brightest), 0, 255).astype(np.uint8)
    return np.asarray(scaled[values]) if values.dtype == np.uint8 else scaled


def merge(masks: list[Mask]) -> Mask:
    """Where any of the masks, bool (h, w) each, is True."""
    return np.asarray(np.logical_or.reduce(masks))


def encode_png(pixels: Pixels) -> bytes:
    """8-bit PNG of uint8 (h, w), (h, w, 1) or (h, w, 3), without metadata: equal pixels give equal bytes."""
    plain = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(plain)).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def encode_mask(mask: Mask) -> bytes:
    """8-bit grey PNG of bool (h, w): 0 and 255."""
    return encode_png(mask.astype(np.uint8) * np.uint8(255))


def _open(data: bytes) -> Image.Image:
    """The file's header, checked. Decoders raise whatever they please on damaged bytes, hence the broad except."""
    if data[128:132] == b"DICM":
        raise PixelError("DICOM is not read; export it as 8-bit PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Image.DecompressionBombError:
        raise PixelError(f"more than {MAX_PIXELS // 1_000_000} megapixels") from None
    except Exception:
        raise PixelError(f"not a readable image; the service reads {', '.join(FORMATS)}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PixelError(f"{width}x{height} is more than {MAX_PIXELS // 1_000_000} megapixels")
    if min(width, height) < MIN_SIDE:
        raise PixelError(f"{width}x{height} is smaller than {MIN_SIDE} pixels a side")
    if frames > 1:
        raise PixelError(f"{frames} frames or pages; save the one that is meant as a file of its own")
    if image.mode in _NAMED_MODES:
        raise PixelError(f"its pixels are {_NAMED_MODES[image.mode]}; convert it to RGB or grey")
    if image.mode not in _DEEP_GREY and _bits(image, data) > 8:
        raise PixelError("more than 8 bits a sample in colour or with alpha; save it with 8")
    if image.mode in _DEEP_GREY and image.format == "TIFF" and _tag(image, _PHOTOMETRIC, 1) == 0:
        raise PixelError("more than 8 bits a sample with 0 for white; save it with 0 for black")
    return image


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits a sample as the file says: Pillow opens 16-bit colour as if it had 8."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        return max(int(bits) for bits in _tag(image, _BITS_PER_SAMPLE, (1,)))
    return 8


def _tag(image: Image.Image, number: int, otherwise: Any) -> Any:
    """A field of a TIFF's header (TIFF 6.0, section 8)."""
    return image.tag_v2.get(number, otherwise)  # type: ignore[attr-defined]


def _load(image: Image.Image) -> tuple[Image.Image, int]:
    """The decoded image, upright, and the EXIF orientation that it had: 1 where none, or none that is known."""
    try:
        before = _orientation(image)  # Pillow turns a TIFF as it loads it.
        image.load()
        orientation = max(before, _orientation(image))
        ImageOps.exif_transpose(image, in_place=True)
        return image, orientation
    except Exception:
        raise PixelError("truncated or damaged: its pixels cannot be decoded") from None


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION, 1)
    return int(value) if value in range(1, 9) else 1


def _without_alpha(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image without alpha, and whether it had one. Raises ``PixelError`` where anything shows through."""
    if image.mode not in ("RGBA", "RGBa", "LA", "La", "PA") and "transparency" not in image.info:
        return image, False
    layered = image.convert("RGBA")
    if layered.getchannel("A").getextrema() != (255, 255):
        raise PixelError("its alpha channel is not opaque; flatten it onto the background that is meant")
    grey = image.mode in ("1", "L", "LA", "La")
    return layered.convert("L" if grey else "RGB"), True


def _is_grey(pixels: Pixels) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())


def _one_channel(image: Image.Image, lossy: bool) -> Pixels:
    """The brightest channel (h, w) of a colour mask. Raises ``PixelError`` for more than one colour beside black."""
    pixels = np.asarray(image.convert("RGB"))
    values: Pixels = pixels.max(axis=2)
    if not lossy and not _is_grey(pixels):
        red, green, blue = np.moveaxis(pixels.astype(np.uint32), 2, 0)
        colours = np.unique((red << 16 | green << 8 | blue)[values > 0])
        if len(colours) > 1:
            raise PixelError(f"{len(colours)} colours beside black; a mask is the lesion on black")
    return values


def _refuse_grey_areas(levels: Pixels, tolerance: float) -> None:
    """Raise ``PixelError`` where more than ``tolerance`` of what is not black is grey away from any rim.

    ``levels`` is uint8 (h, w), brightest 255. A rim pixel has black and white near it: within 3 to 8 pixels, the more
    the larger the mask.
    """
    grey = (levels > _BLACK) & (levels < _WHITE)
    if not grey.any():
        return
    reach = min(max(3, min(levels.shape) // 64), 8)
    rim = _near(levels >= _WHITE, reach) & _near(levels <= _BLACK, reach)
    if (grey & ~rim).sum() > tolerance * (levels > _BLACK).sum():
        raise PixelError("shades of grey over whole areas: not a mask of one lesion class in black and white")


def _refuse_classes(values: NDArray[np.integer[Any]], brightest: int) -> None:
    """Raise ``PixelError`` where one level between black and the brightest, as of a label map, holds more than 2 % of
    what is not black away from any rim."""
    between = (values > 0) & (values < brightest)
    if not between.any():
        return
    rim = _near(values == brightest, RIM_PX) & _near(values <= 0, RIM_PX)
    counts = np.bincount(values[between & ~rim].ravel(), minlength=1)
    if counts.max() > 0.02 * (values > 0).sum():
        found = f"levels {counts.argmax()} and {brightest} over whole areas"
        raise PixelError(f"{found}, a label map: a mask is one lesion class on black")


def _near(where: Mask, reach: int) -> Mask:
    """Whether any pixel within ``reach`` rows and columns is True (dilation by a square)."""
    for axis in (0, 1):
        padding = [(reach, reach) if a == axis else (0, 0) for a in (0, 1)]
        where = np.asarray(sliding_window_view(np.pad(where, padding), 2 * reach + 1, axis=axis).any(axis=-1))
    return where
