from __future__ import annotations

import numpy as np
from meddiff.importing.pixels import encode_mask, encode_png
from meddiff_services.pictures import decode_mask, decode_png, overlay, sheet


def test_png_keeps_every_pixel_and_equal_pixels_give_equal_bytes() -> None:
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        image = rng.integers(0, 256, (9, 7, channels), dtype=np.uint8)
        assert np.array_equal(decode_png(encode_png(image)), image)
        assert encode_png(image) == encode_png(image.copy())
    mask = rng.random((9, 7)) > 0.5
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)


def test_overlay_draws_the_outline_alone() -> None:
    image = np.full((32, 32, 1), 100, np.uint8)
    label = np.zeros((32, 32), bool)
    label[8:24, 8:24] = True
    drawn = (overlay(image, label) != 100).any(axis=2)
    assert drawn[8, 8]
    assert not drawn[12:20, 12:20].any()
    assert not drawn[~label].any()


def test_a_sheet_has_a_row_an_entry() -> None:
    image, mask = np.zeros((20, 30, 3), np.uint8), np.ones((20, 30), bool)
    one = decode_png(sheet([[image, mask]], ["image", "mask"], side=32))
    three = decode_png(sheet([[image, mask]] * 3, ["image", "mask"], side=32))
    assert three.shape[0] - one.shape[0] == 2 * 36
    assert three.shape[1] == one.shape[1]
