"""Section by section, what a pixel means."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from dataset_files import encoded, noise, patch
from meddiff.importing.pixels import (
    PixelError,
    Window,
    decode_image,
    decode_mask,
    encode_mask,
    encode_png,
    merge,
)
from PIL import Image

INSIDE = np.asarray(patch()) > 0


def palette(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(INSIDE.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, *colour])
    return image


def red() -> Image.Image:
    black = patch(value=0)
    return Image.merge("RGB", (patch(value=200), black, black))


MASKS = {
    "0/1": encoded(patch(value=1)),
    "0/255": encoded(patch()),
    "1 bit": encoded(patch().convert("1")),
    "1-bit BMP": encoded(patch().convert("1"), "BMP"),
    "1-bit TIFF": encoded(patch().convert("1"), "TIFF", compression="group4"),
    "RGB": encoded(patch().convert("RGB")),
    "red": encoded(red()),
    "opaque alpha": encoded(patch().convert("RGBA")),
    "palette of white": encoded(palette((255, 255, 255))),
    "palette of maroon": encoded(palette((128, 0, 0))),
    "GIF": encoded(patch(), "GIF"),
    "JPEG": encoded(patch(), "JPEG", quality=50),
    "RGB JPEG": encoded(patch().convert("RGB"), "JPEG"),
    "16-bit 0/1": encoded(Image.fromarray(INSIDE.astype(np.uint16))),
    "16-bit 0/65535": encoded(Image.fromarray(INSIDE.astype(np.uint16) * np.uint16(65535))),
}


@pytest.mark.parametrize("data", MASKS.values(), ids=MASKS)
def test_every_encoding_of_a_mask_means_the_same(data: bytes) -> None:
    np.testing.assert_array_equal(decode_mask(data), INSIDE)


def test_a_smoothly_enlarged_mask_is_cut_at_the_half() -> None:
    enlarged = patch().resize((96, 64), Image.Resampling.BILINEAR)
    expected = np.asarray(patch().resize((96, 64), Image.Resampling.NEAREST)) > 0
    np.testing.assert_array_equal(decode_mask(encoded(enlarged)), expected)


def labels() -> Image.Image:
    values = np.asarray(patch(value=2)).copy()
    values[24:30, 5:40] = 1
    return Image.fromarray(values)


def two_colours() -> Image.Image:
    return Image.merge("RGB", (patch(), patch(value=0), patch().transpose(Image.Transpose.FLIP_TOP_BOTTOM)))


def label_map(*levels: int) -> bytes:
    """Areas of these levels, as large as each other, side by side."""
    values = np.zeros((64, 40 * len(levels) + 40), np.uint8)
    for n, level in enumerate(levels):
        values[20:50, 20 + 40 * n : 50 + 40 * n] = level
    return encoded(Image.fromarray(values))


def test_the_rim_that_a_filter_leaves_is_no_label_map() -> None:
    drawn = np.zeros((200, 300), np.uint8)
    drawn[60:140, 90:210] = 255
    for kernel in (Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
        assert decode_mask(encoded(Image.fromarray(drawn).resize((900, 600), kernel))).any()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (label_map(1, 7), "a label map"),
        (label_map(1, 255), "a label map"),
        (label_map(6, 7), "a label map"),
        (encoded(labels()), "shades of grey"),
        (encoded(noise().convert("L")), "shades of grey"),
        (encoded(noise(), "JPEG"), "shades of grey"),
        (encoded(two_colours()), "colours beside black"),
        (encoded(patch().convert("CMYK"), "JPEG"), "CMYK"),
        (MASKS["0/255"][:60], "truncated or damaged"),
    ],
    ids=[
        "classes 1 and 7",
        "1 and an ignored 255",
        "6 and 7",
        "labels",
        "photo",
        "photo as JPEG",
        "two colours",
        "CMYK",
        "truncated",
    ],
)
def test_what_is_no_mask_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(PixelError, match=reason):
        decode_mask(data)


def test_an_empty_mask_is_empty() -> None:
    assert not decode_mask(encoded(patch(value=0))).any()


def test_masks_of_one_image_merge() -> None:
    other = np.flipud(INSIDE)
    np.testing.assert_array_equal(merge([INSIDE, other]), INSIDE | other)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_colour_comes_back_as_it_was(kind: str) -> None:
    decoded = decode_image(encoded(noise(), kind))
    np.testing.assert_array_equal(decoded.pixels, np.asarray(noise()))
    assert decoded.size == (48, 32)
    assert decoded.notes == ()


def test_grey_stays_grey_and_grey_in_three_channels_becomes_so() -> None:
    grey = noise().convert("L")
    assert decode_image(encoded(grey)).pixels.shape == (32, 48, 1)
    stored_as_rgb = decode_image(encoded(grey.convert("RGB")))
    np.testing.assert_array_equal(stored_as_rgb.pixels[..., 0], np.asarray(grey))
    assert stored_as_rgb.pixels.shape[2] == 1
    assert "grey in three channels" in stored_as_rgb.notes[0]


def test_exif_orientation_is_applied_and_metadata_dropped() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    exif[0x010E] = "a name"
    decoded = decode_image(encoded(noise(), "PNG", exif=exif))
    np.testing.assert_array_equal(decoded.pixels, np.rot90(np.asarray(noise()), k=-1))
    assert decoded.unturned == (48, 32)
    assert decoded.size == (32, 48)
    assert b"a name" not in encode_png(decoded.pixels)
    with Image.open(io.BytesIO(encode_png(decoded.pixels))) as stored:
        assert stored.info == {}


def with_alpha(opacity: int) -> Image.Image:
    image = noise().convert("RGBA")
    image.putalpha(opacity)
    return image


def test_a_tiff_is_turned_as_its_orientation_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(encoded(noise(), "TIFF", exif=exif))
    assert (decoded.size, decoded.unturned) == ((32, 48), (48, 32))
    assert "EXIF" in decoded.notes[0]


def test_opaque_alpha_is_dropped() -> None:
    decoded = decode_image(encoded(with_alpha(255)))
    np.testing.assert_array_equal(decoded.pixels, np.asarray(noise()))
    assert decoded.notes == ("opaque alpha channel dropped",)
    assert decode_image(encoded(noise().convert("LA"))).pixels.shape[2] == 1


def raw_png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """An RGB PNG with that header over those rows: sizes and depths that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def transparent_colour() -> bytes:
    image = noise()
    return encoded(image, transparency=image.getpixel((0, 0)))


DEEP = Image.fromarray(np.linspace(0, 4095, 32 * 48).reshape(32, 48).astype(np.uint16))


def white_is_zero() -> bytes:
    """Little-endian 16-bit grey whose PhotometricInterpretation (tag 262, one SHORT) is 0."""
    entry = b"\x06\x01\x03\x00\x01\x00\x00\x00"
    return encoded(DEEP, "TIFF").replace(entry + b"\x01\x00", entry + b"\x00\x00")


REFUSED = {
    "16-bit grey, 0 for white": (white_is_zero(), "with 0 for white"),
    "alpha": (encoded(with_alpha(200)), "alpha channel is not opaque"),
    "transparent colour": (transparent_colour(), "alpha channel is not opaque"),
    "CMYK": (encoded(noise().convert("CMYK"), "JPEG"), "CMYK"),
    "Lab": (encoded(noise().convert("LAB"), "TIFF"), "CIE Lab"),
    "floating point": (encoded(noise().convert("L").convert("F"), "TIFF"), "floating-point"),
    "16-bit grey": (encoded(DEEP), "more than 8 bits"),
    "16-bit colour": (raw_png(20, 20, 16, bytes(20 * (1 + 20 * 6))), "more than 8 bits"),
    "truncated PNG": (encoded(noise())[:2000], "truncated or damaged"),
    "truncated JPEG": (encoded(noise(), "JPEG")[:900], "truncated or damaged"),
    "bomb": (raw_png(30_000, 30_000, 8, b""), "64 megapixels"),
    "smaller bomb": (raw_png(9_000, 9_000, 8, b""), "64 megapixels"),
    "tiny": (encoded(noise(size=(8, 40))), "smaller than 16"),
    "animation": (encoded(noise(0), "GIF", save_all=True, append_images=[noise(1)]), "2 frames"),
    "text": (b"not an image", "not a readable image"),
    "nothing": (b"", "not a readable image"),
    "WebP": (encoded(noise(), "WEBP"), "not a readable image"),
    "DICOM": (bytes(128) + b"DICM" + bytes(50), "DICOM"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_8_bit_grey_or_rgb_is_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(PixelError, match=reason):
        decode_image(data)


def test_more_than_8_bits_go_through_the_recorded_window() -> None:
    decoded = decode_image(encoded(DEEP), Window(1000, 3000))
    values = np.asarray(DEEP).astype(float)
    expected = np.rint(np.clip((values - 1000) / 2000, 0, 1) * 255)
    np.testing.assert_array_equal(decoded.pixels[..., 0], expected)
    assert decoded.notes == ("more than 8 bits, through the window 1000 to 3000",)


def test_what_is_stored_reads_back_and_equal_pixels_give_equal_bytes() -> None:
    pixels = np.asarray(noise())
    assert encode_png(pixels) == encode_png(pixels.copy(order="F"))
    np.testing.assert_array_equal(decode_image(encode_png(pixels)).pixels, pixels)
    np.testing.assert_array_equal(decode_mask(encode_mask(INSIDE)), INSIDE)


def test_a_photographs_mask_needs_little_memory() -> None:
    """Some bytes a pixel: a gateway has a gigabyte, and a mask may have 64 megapixels."""
    drawn = np.zeros((3000, 4000), np.uint8)
    drawn[1000:2000, 1000:2000] = 200
    data = encoded(Image.fromarray(drawn))
    tracemalloc.start()
    assert decode_mask(data).sum() == 1_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * drawn.size
