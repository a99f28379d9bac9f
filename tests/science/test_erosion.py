from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meddiff.science.erosion import erode
from meddiff.science.geometry import Mask, equivalent_diameter
from scipy import ndimage


def disc(side: int, radius: float, y: float | None = None, x: float | None = None) -> Mask:
    rows, columns = np.ogrid[:side, :side]
    return np.asarray(np.hypot(rows - (y or side / 2), columns - (x or side / 2)) <= radius)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_a_disc_loses_the_rounded_share_of_its_diameter_from_its_radius(share: float) -> None:
    shape = disc(201, 70)
    label, eroded_px = erode(shape, share)
    assert eroded_px == round(share * 140)
    assert equivalent_diameter(label) == pytest.approx(140 - 2 * eroded_px, abs=1)


def test_a_share_of_zero_keeps_the_shape_and_any_other_takes_at_least_a_pixel() -> None:
    shape = disc(40, 8)
    label, eroded_px = erode(shape, 0)
    assert (label == shape).all()
    assert eroded_px == 0
    label, eroded_px = erode(shape, 1e-6)
    assert eroded_px == 1
    assert (label == ndimage.binary_erosion(shape)).all()


def test_no_component_vanishes() -> None:
    shape = disc(120, 40)
    shape[2:5, 2:5] = True
    shape[2, 100] = True
    label, eroded_px = erode(shape, 0.1)
    assert eroded_px == 8
    assert label[3, 3]
    assert label[2:5, 2:5].sum() == 1
    assert label[2, 100]


def test_nothing_is_taken_off_where_the_image_ends() -> None:
    shape = np.zeros((50, 60), np.bool_)
    shape[:, :30] = True
    label, eroded_px = erode(shape, 0.1)
    assert eroded_px == 4
    assert label[:, :26].all()
    assert not label[:, 26:].any()


@pytest.mark.parametrize("filled", [False, True])
def test_an_empty_shape_and_a_full_one_stay(filled: bool) -> None:
    shape = np.full((9, 7), filled)
    label, eroded_px = erode(shape, 0.2)
    assert (label == shape).all()
    assert eroded_px == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 0.2))
def test_a_label_lies_in_its_shape_and_never_vanishes(seed: int, share: float) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(40, 50)), 3)
    shape = noise > 0.05
    before = shape.copy()
    label, eroded_px = erode(shape, share)
    assert (shape == before).all()
    assert not (label & ~shape).any()
    assert label.any() == shape.any()
    assert 0 <= eroded_px <= max(1, round(share * equivalent_diameter(shape)))
