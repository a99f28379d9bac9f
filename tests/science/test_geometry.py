from __future__ import annotations

import numpy as np
import pytest
from meddiff.contracts.manifest import Window
from meddiff.science import geometry
from meddiff.science.geometry import Mask


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> Mask:
    y, x = np.mgrid[: size[0], : size[1]]
    return np.asarray(np.hypot(y - centre[0], x - centre[1]) <= radius)


def test_equivalent_diameter_of_a_disc_is_its_diameter() -> None:
    assert geometry.equivalent_diameter(disc((101, 101), (50, 50), 30)) == pytest.approx(60, rel=0.01)
    assert geometry.equivalent_diameter(np.zeros((5, 5), np.bool_)) == 0


def test_guide_widens_the_shape_by_a_share_of_its_diameter() -> None:
    shape = disc((200, 200), (100, 100), 40)
    guide = geometry.guide_of(shape, 0.25)
    assert guide[shape].all()
    assert geometry.equivalent_diameter(guide) == pytest.approx(2 * (40 + 0.25 * 80), rel=0.02)


def test_guide_without_margin_is_the_shape_and_with_the_least_margin_a_pixel_more() -> None:
    shape = disc((50, 50), (25, 25), 4)
    assert (geometry.guide_of(shape, 0.0) == shape).all()
    thin = geometry.guide_of(shape, 0.001)
    assert (thin == geometry.dilate(shape, 1.0)).all()
    assert thin.sum() > shape.sum()


def test_guide_covers_the_old_lesion_with_its_own_margin() -> None:
    shape, old = disc((200, 200), (60, 60), 20), disc((200, 200), (120, 120), 30)
    guide = geometry.guide_of(shape, 0.2, cover=old)
    assert (guide == (geometry.dilate(shape, 0.2 * 2 * 20) | geometry.guide_of(old, 0.2))).mean() > 0.999
    assert (geometry.guide_of(shape, 0.2, cover=np.zeros_like(old)) == geometry.guide_of(shape, 0.2)).all()


def test_dilation_equals_the_distance_definition_at_the_edge() -> None:
    shape = disc((40, 30), (0, 29), 6)
    y, x = np.mgrid[:40, :30]
    inside = np.stack(np.nonzero(shape), axis=1)
    nearest = np.min(np.hypot(y[..., None] - inside[:, 0], x[..., None] - inside[:, 1]), axis=-1)
    assert (geometry.dilate(shape, 7.3) == (nearest <= 7.3)).all()


@pytest.mark.parametrize("size", [(200, 300), (300, 200), (90, 400), (64, 64)])
@pytest.mark.parametrize("centre", [(0.5, 0.5), (0.05, 0.9), (0.95, 0.1)])
@pytest.mark.parametrize("context", [1.0, 1.6, 100.0])
def test_window_holds_the_guide_and_stays_inside_where_it_fits(
    size: tuple[int, int], centre: tuple[float, float], context: float
) -> None:
    guide = disc(size, (centre[0] * size[0], centre[1] * size[1]), 0.3 * min(size))
    window = geometry.window_around(guide, context)
    assert geometry.crop_window(guide, window).sum() == guide.sum()
    for first, length in ((window.top, size[0]), (window.left, size[1])):
        if window.side <= length:
            assert 0 <= first <= length - window.side
        else:
            assert first <= 0
            assert first + window.side >= length
    if context == 100.0:
        assert window.side == max(size)


def test_a_small_guide_gets_the_least_window_and_an_empty_one_none() -> None:
    guide = disc((200, 200), (100, 100), 3)
    assert geometry.window_around(guide, 1.5).side == geometry.SMALLEST_WINDOW
    assert geometry.window_around(guide, 1.5, minimum=100).side == 100
    with pytest.raises(ValueError, match="empty"):
        geometry.window_around(np.zeros((10, 10), np.bool_), 1.5)


def test_crop_beyond_the_edge_repeats_pixels_but_labels_none() -> None:
    image = np.arange(4 * 6 * 1, dtype=np.uint8).reshape(4, 6, 1)
    window = Window(top=-1, left=0, side=6)
    cropped = geometry.crop_window(image, window)
    assert (cropped[0] == image[0]).all()
    assert (cropped[1:5] == image).all()
    assert (cropped[5] == image[3]).all()
    mask = geometry.crop_window(np.ones((4, 6), np.bool_), window)
    assert mask.tolist() == [[row in range(1, 5)] * 6 for row in range(6)]
    assert geometry.extend_window(np.ones((4, 6), np.bool_), window).all()


def test_resizing_keeps_constants_means_and_types() -> None:
    rng = np.random.default_rng(0)
    grey = np.full((37, 53, 1), 91, np.uint8)
    assert (geometry.resize_image(grey, (16, 80)) == 91).all()
    noise = rng.random((96, 96, 3)).astype(np.float32)
    small = geometry.resize_image(noise, (24, 24))
    assert small.dtype == np.float32
    assert small.mean() == pytest.approx(noise.mean(), abs=0.01)
    assert small.std() < 0.35 * noise.std()
    assert geometry.resize_image(noise, (96, 96)) == pytest.approx(noise, abs=1e-6)


def test_resized_mask_keeps_its_share_of_the_picture() -> None:
    mask = disc((300, 300), (140, 160), 77)
    for size in ((64, 64), (600, 600), (50, 200)):
        assert geometry.resize_mask(mask, size).mean() == pytest.approx(mask.mean(), rel=0.03)


def test_a_mask_of_a_few_pixels_does_not_vanish() -> None:
    mask = np.zeros((300, 300), np.bool_)
    assert not geometry.resize_mask(mask, (64, 64)).any()
    mask[200, 100] = True
    small = geometry.resize_mask(mask, (64, 64))
    assert 1 <= small.sum() <= 4
    assert small[200 * 64 // 300, 100 * 64 // 300]


@pytest.mark.parametrize(
    "window", [Window(top=3, left=5, side=20), Window(top=-7, left=-2, side=44), Window(top=10, left=-4, side=25)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_paste_changes_the_guide_and_nothing_else(window: Window, channels: int) -> None:
    rng = np.random.default_rng(1)
    background = rng.integers(0, 256, (30, 40, channels), dtype=np.uint8)
    patch = rng.integers(0, 256, (window.side, window.side, channels), dtype=np.uint8)
    guide = disc((30, 40), (16, 14), 6)
    pasted = geometry.paste(background, patch, window, guide)
    assert (pasted[~guide] == background[~guide]).all()
    for y, x in zip(*np.nonzero(guide), strict=True):
        assert (pasted[y, x] == patch[y - window.top, x - window.left]).all()


def test_condition_mask_is_one_in_the_shape_half_in_the_ring_and_mean_pooled() -> None:
    shape, guide = np.zeros((16, 16), np.bool_), np.zeros((16, 16), np.bool_)
    guide[:8], shape[:4, :6] = True, True
    graded = geometry.condition_mask(shape, guide, 4)
    assert graded.dtype == np.float32
    assert graded.tolist() == [[1, 0.75, 0.5, 0.5], [0.5] * 4, [0] * 4, [0] * 4]


def test_a_single_pixel_of_the_guide_keeps_its_cell() -> None:
    guide = np.zeros((16, 16), np.bool_)
    guide[7, 12] = True
    assert np.argwhere(geometry.guide_cells(guide, 4)).tolist() == [[1, 3]]


def test_smooth_fill_continues_a_plane_and_leaves_the_rest() -> None:
    y, x = np.mgrid[:120, :160].astype(np.float32)
    plane = np.stack([50 + 0.5 * x, 100 + 0.3 * y, 80 + 0 * x], axis=2).astype(np.float32)
    hole = disc((120, 160), (60, 80), 25)
    spoilt = np.where(hole[..., None], np.float32(255), plane)
    filled = geometry.smooth_fill(spoilt, hole)
    assert (filled[~hole] == plane[~hole]).all()
    assert np.abs(filled - plane)[hole].max() < 8
    assert np.isfinite(geometry.smooth_fill(plane, np.ones_like(hole))).all()


def test_mirrored_detail_gives_a_hole_the_grain_of_its_surroundings_and_no_more() -> None:
    rng = np.random.default_rng(2)
    grain = rng.normal(0, 10, (120, 120, 1)).astype(np.float32)
    hole = disc((120, 120), (60, 60), 20)
    image = np.where(hole[..., None], np.float32(1000), 80 + grain)
    detail = geometry.mirrored_detail(image, hole)
    assert (detail[~hole] == 0).all()
    near_rim = hole & geometry.dilate(~hole, 6) & ~geometry.dilate(~hole, 2)
    assert detail[near_rim].std() == pytest.approx(10, rel=0.4)
    assert np.abs(detail).max() < 30
    assert (geometry.mirrored_detail(image, np.ones_like(hole)) == 0).all()
