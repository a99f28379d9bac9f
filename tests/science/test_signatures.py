from __future__ import annotations

import numpy as np
import pytest
from meddiff import signatures
from scipy import ndimage

Mask = np.ndarray


def blob(seed: int, side: int = 256) -> Mask:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), side / 8)
    return np.asarray(noise > np.quantile(noise, 0.85))


def true_iou(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_a_signature_is_a_bit_picture_of_64_by_64() -> None:
    shape = np.zeros((64, 64), np.bool_)
    shape[3, 5] = True
    packed = np.unpackbits(np.frombuffer(bytes.fromhex(signatures.of(shape)), np.uint8)).reshape(64, 64)
    assert len(signatures.of(shape)) == 2 * signatures.BYTES == 1024
    assert (packed.astype(bool) == shape).all()


def test_it_does_not_depend_on_the_size_of_the_image() -> None:
    shape = blob(1)
    large = np.kron(shape, np.ones((3, 5), np.bool_))
    assert signatures.of(large) == signatures.of(shape)


@pytest.mark.parametrize("shift", [2, 6, 12, 30])
def test_its_iou_is_near_that_of_the_pixels(shift: int) -> None:
    shape = blob(2)
    moved = np.roll(shape, shift, axis=1)
    found = signatures.iou(signatures.of(shape), signatures.of(moved))
    assert found == pytest.approx(true_iou(shape, moved), abs=0.05)


def test_shapes_that_overlap_by_nine_tenths_are_seen_as_near() -> None:
    rows, columns = np.ogrid[:256, :256]
    for radius in (8, 20, 60):
        shape = np.hypot(rows - 120, columns - 130) <= radius
        for y in range(4):
            for x in range(4):
                moved = np.hypot(rows - 120 - y, columns - 130 - x) <= radius
                if true_iou(shape, moved) > 0.9:
                    assert signatures.iou(signatures.of(shape), signatures.of(moved)) > 0.8


def test_a_shape_smaller_than_a_cell_leaves_a_mark_and_an_empty_one_none() -> None:
    speck = np.zeros((2016, 3024), np.bool_)
    speck[1000:1004, 2000:2003] = True
    assert signatures.iou(signatures.of(speck), signatures.of(speck)) == 1
    empty = signatures.of(np.zeros((32, 32), np.bool_))
    assert signatures.iou(empty, empty) == 0


def test_the_highest_of_many() -> None:
    one = signatures.of(blob(3))
    others = [signatures.of(blob(seed)) for seed in range(4, 9)]
    packed = b"".join(bytes.fromhex(other) for other in others)
    shapes = signatures.Shapes(packed)
    assert shapes.max_iou(bytes.fromhex(one)) == max(signatures.iou(one, other) for other in others)
    shapes.add(bytes.fromhex(one))
    assert len(shapes) == 6
    assert shapes.max_iou(bytes.fromhex(one)) == 1
    assert signatures.Shapes().max_iou(bytes.fromhex(one)) == 0
