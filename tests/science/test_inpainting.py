from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from meddiff.contracts.recipes import CPU, PAPER, Recipe, override
from meddiff.science import foundation, geometry
from meddiff.science.foundation import Foundation
from meddiff.science.geometry import Image, Mask
from meddiff.science.inpainting import (
    Canvas,
    composite,
    fit_lesion,
    guide_at,
    inpaint,
    repair,
    seam_correction,
    solve,
    solver_timesteps,
    view_of,
)
from PIL import Image as Pillow
from scipy import ndimage

from .tiny import write_checkpoint

SMALL = override(
    CPU,
    {
        "foundation": {"resolution": 64},
        "inpainting": {"solver_steps": 3, "strength": 0.6, "ring_strength": 1.0, "batch_size": 2},
    },
)


@pytest.fixture(scope="module")
def f(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    torch.set_num_threads(1)
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return foundation.load(folder, torch.float32, torch.device("cpu"))


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> Mask:
    y, x = np.mgrid[: size[0], : size[1]]
    return np.asarray(np.hypot(y - centre[0], x - centre[1]) <= radius)


def noise(size: tuple[int, int], channels: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)


def canvas(size: tuple[int, int], channels: int, centre: tuple[float, float], radius: float, seed: int = 7) -> Canvas:
    background, shape = noise(size, channels), disc(size, centre, radius)
    guide = geometry.guide_of(shape, 0.2)
    return Canvas(background, shape, guide, fit_lesion(background, shape, guide, background, shape), seed)


CANVASES = {
    "square": canvas((96, 96), 3, (48, 48), 15),
    "grey": canvas((96, 96), 1, (40, 50), 15),
    "wide": canvas((60, 200), 3, (30, 100), 18),
    "tall, beyond the edge": canvas((200, 50), 3, (100, 25), 40),
    "in a corner": canvas((90, 120), 1, (0, 119), 30),
    "larger than the model": canvas((300, 280), 3, (150, 140), 90),
    "small": canvas((90, 90), 3, (45, 45), 2),
}


@pytest.mark.parametrize("name", CANVASES)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_outside_the_guide_nothing_changes(f: Foundation, name: str, strength: float) -> None:
    one = CANVASES[name]
    (image,) = inpaint(f, [one], override(SMALL, {"inpainting": {"strength": strength}}))
    assert image.shape == one.background.shape
    assert image.dtype == np.uint8
    difference = np.abs(image.astype(int) - one.background.astype(int)).max(axis=2)
    assert difference[~one.guide].max() == 0
    assert (difference[one.guide] > 0).mean() > 0.5


@pytest.mark.parametrize("changes", [{"adaptive_guide": False}, {"guidance_scale": 3.0}, {"ring_strength": 0.2}])
def test_options_change_the_picture_but_not_the_outside(f: Foundation, changes: dict[str, object]) -> None:
    one = CANVASES["square"]
    (plain,) = inpaint(f, [one], SMALL)
    (image,) = inpaint(f, [one], override(SMALL, {"inpainting": changes}))
    assert (image != plain).any()
    assert (image[~one.guide] == one.background[~one.guide]).all()


def test_the_original_is_held_outside_the_guide_and_until_its_strength_in_the_ring(f: Foundation) -> None:
    one = CANVASES["larger than the model"]
    views = [view_of(one, SMALL)]
    original = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    guide = torch.from_numpy(geometry.guide_cells(views[0].guide, 4))
    shape = torch.from_numpy(geometry.guide_cells(views[0].shape, 4))
    for ring_strength, held in ((1.0, ~guide), (0.1, ~shape)):
        recipe = override(SMALL, {"inpainting": {"ring_strength": ring_strength, "adaptive_guide": False}})
        latents = solve(f, views, original, recipe, lambda: False)
        assert latents is not None
        moved = (latents - original).abs().amax(dim=1)[0]
        assert moved[held].max() == 0
        assert (moved[~held] > 0).all()


def test_bytes_depend_on_the_seed_and_not_on_the_company(f: Foundation) -> None:
    some = [CANVASES["square"], CANVASES["wide"], CANVASES["in a corner"]]
    together = inpaint(f, some, SMALL)
    for one, image in zip(some, together, strict=True):
        assert (inpaint(f, [one], SMALL)[0] == image).all()
    other = Canvas(some[0].background, some[0].shape, some[0].guide, some[0].start, seed=8)
    assert (inpaint(f, [other], SMALL)[0] != together[0]).any()


def test_a_stop_keeps_what_is_finished(f: Foundation) -> None:
    calls: list[int] = []

    def after_the_first_batch() -> bool:
        calls.append(1)
        return len(calls) > 3

    recipe = override(SMALL, {"inpainting": {"batch_size": 1, "strength": 1.0}})
    assert len(inpaint(f, [CANVASES["square"]] * 3, recipe, after_the_first_batch)) == 1


def test_repair_paints_the_lesion_and_nothing_else(f: Foundation) -> None:
    image, lesion = noise((80, 120), 3), disc((80, 120), (40, 50), 14)
    other = (noise((60, 60), 1), disc((60, 60), (30, 30), 9), 4)
    for recipe in (SMALL, override(SMALL, {"finetuning": {"separate_repair": True}})):
        repaired, beside = repair(f, [(image, lesion, 3), other], recipe)
        assert (beside == repair(f, [other], recipe)[0]).all()
        guide = geometry.guide_of(lesion, recipe.inpainting.guide_margin)
        assert (repaired[~guide] == image[~guide]).all()
        assert (repaired[lesion] != image[lesion]).any()


@pytest.mark.parametrize(("prediction", "channels", "factor"), [("epsilon", 9, 8), ("epsilon", 4, 8)])
def test_stable_diffusion_1_5_checkpoints_paint_too(
    tmp_path: Path, prediction: str, channels: int, factor: int
) -> None:
    folder = write_checkpoint(tmp_path, prediction, channels, factor)
    f = foundation.load(folder, torch.float32, torch.device("cpu"))
    assert foundation.vae_factor(f) == factor
    recipe: Recipe = override(PAPER, {"foundation": {"resolution": 64}, "inpainting": {"solver_steps": 3}})
    one = CANVASES["wide"]
    (image,) = inpaint(f, [one], recipe)
    assert (image[~one.guide] == one.background[~one.guide]).all()


def test_plain_diffusers_loads_and_paints_with_what_was_saved(f: Foundation, tmp_path: Path) -> None:
    with torch.no_grad():
        next(f.unet.parameters()).mul_(1.01)
    foundation.save(f, tmp_path / "model")
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.safety_checker is None
    for saved, ours in zip(pipeline.unet.parameters(), f.unet.parameters(), strict=True):
        assert torch.equal(saved, ours)
    one = CANVASES["square"]
    painted = pipeline(
        "an image of hta",
        Pillow.fromarray(one.background),
        Pillow.fromarray(one.guide.astype(np.uint8) * 255),
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="np",
    ).images
    assert painted.shape == (1, 64, 64, 3)
    assert np.isfinite(painted).all()
    again = foundation.load(tmp_path / "model", torch.float32, torch.device("cpu"))
    assert again.sha256 == foundation.digest(tmp_path / "model")


def test_solver_walks_trailing_timesteps_to_the_clean_end(f: Foundation) -> None:
    assert solver_timesteps(f, 4, 1.0).tolist() == [999, 749, 499, 249, -1]
    assert solver_timesteps(f, 4, 0.5).tolist() == [499, 249, -1]
    assert solver_timesteps(f, 4, 0.01).tolist() == [249, -1]


def test_the_adaptive_guide_narrows_to_the_guide() -> None:
    cells = disc((32, 32), (16, 16), 5)[None]
    wide, narrow, exact = guide_at(cells, 4.0), guide_at(cells, 1.0), guide_at(cells, 0.0)
    assert (exact == cells).all()
    assert (wide >= narrow).all()
    assert (narrow >= exact).all()
    assert (wide[cells] == 1).all()
    assert 0 < wide[0, 16, 23] < 1
    assert not guide_at(np.zeros((1, 32, 32), np.bool_), 4.0).any()


# ------------------------------------------------------------------------------------------------------------- seams


def test_a_constant_colour_offset_is_mended_at_the_rim_and_left_in_the_lesion() -> None:
    rng = np.random.default_rng(0)
    background = (120 + rng.normal(0, 5, (128, 128, 3))).astype(np.float32)
    shape = disc((128, 128), (64, 64), 20)
    guide = geometry.dilate(shape, 12)
    painted = background + 25
    painted[shape] -= 70
    mended = painted + seam_correction(painted, background, shape, guide, np.ones_like(guide))
    just_inside = guide & geometry.dilate(~guide, 2.0)
    assert abs((mended - background)[just_inside].mean()) < 3
    assert abs((mended - painted)[disc((128, 128), (64, 64), 8)]).max() < 1
    assert (mended[~guide] == painted[~guide]).all()


@pytest.mark.parametrize("name", ["grey", "larger than the model", "tall, beyond the edge"])
def test_what_autoencoder_and_window_lose_of_the_composite_is_given_back(name: str) -> None:
    """Were the painting just what the autoencoder makes of the composite, the image would be the composite itself,
    away from the rim, down to the grain that the window's resolution does not hold."""
    one = CANVASES[name]
    assert one.start is not None
    seen = view_of(one, SMALL)
    assert seen.start is not None
    carried = np.repeat(seen.start, 3 // seen.start.shape[2], axis=2) * 0.8 + 20
    image = composite(one, seen, carried, carried)
    deep = ~geometry.dilate(~one.guide, 0.3 * seen.window.side)
    rim_free = deep if deep.any() else one.shape
    assert np.abs(image.astype(int) - one.start)[rim_free].mean() < 2


def test_of_a_painting_only_what_is_coarser_than_the_kept_detail_counts() -> None:
    one = CANVASES["square"]
    assert one.start is not None
    seen = view_of(one, SMALL)
    assert seen.start is not None
    checks = 40 * (np.indices(seen.start.shape[:2]).sum(axis=0) % 2 * 2 - 1)[..., None].astype(np.float32)
    deep = ~geometry.dilate(~one.guide, 6)
    for change, kept_detail, least, most in ((checks, 0.0, 15, 45), (checks, 1 / 16, 0, 3), (30.0, 1 / 16, 15, 30)):
        image = composite(one, seen, seen.start + change, seen.start, kept_detail)
        moved = np.abs(image.astype(int) - one.start)[deep & (one.start > 50).all(2) & (one.start < 200).all(2)].mean()
        assert least <= moved <= most


def test_where_the_shape_touches_the_rim_its_contrast_stays() -> None:
    background = np.full((128, 128, 1), 150, np.float32)
    shape = disc((128, 128), (64, 64), 30)
    painted = np.where(shape[..., None], np.float32(40), background)
    assert np.abs(seam_correction(painted, background, shape, shape, np.ones_like(shape))).max() < 1


# --------------------------------------------------------------------------------------------------------- composite


def test_the_composite_lays_the_donors_contrast_into_the_shape() -> None:
    donor_mask = disc((120, 160), (60, 80), 30)
    donor = np.full((120, 160, 3), 200, np.uint8)
    donor[donor_mask] = 100
    background = np.full((90, 140, 3), 140, np.uint8)
    y, x = np.mgrid[:90, :140]
    shape = np.asarray(((y - 45) / 12) ** 2 + ((x - 60) / 30) ** 2 <= 1)
    guide = geometry.guide_of(shape, 0.2)
    start = fit_lesion(background, shape, guide, donor, donor_mask)
    assert (start[~guide] == 140).all()
    assert start[45, 60].astype(int) == pytest.approx(np.full(3, (112 / 212) * 152 - 12), abs=2)
    darker = (start[..., 0] < 110) & guide
    assert (darker & shape).sum() / (darker | shape).sum() > 0.9
    ring = guide & ~geometry.dilate(shape, 3)
    assert np.abs(start[ring].astype(int) - 140).max() <= 3


def test_a_lesion_fitted_into_its_own_shape_on_its_own_background_is_itself() -> None:
    y, x = np.mgrid[:120, :160]
    mask = np.asarray(((y - 60) / 25) ** 2 + ((x - 80) / 40) ** 2 <= 1)
    soft = ndimage.gaussian_filter(mask.astype(float), 3)[..., None]
    image = np.rint(np.repeat(180 - 90 * soft, 3, axis=2)).astype(np.uint8)
    start = fit_lesion(image, mask, geometry.guide_of(mask, 0.2), image, mask, cover=mask)
    assert np.abs(start.astype(int) - image).mean() < 2


def test_the_composites_rim_lies_on_the_shapes_whatever_their_forms() -> None:
    """Where donor and shape have nothing in common but a rim: a lesion drawn 4 px outside its visible edge stays so."""
    donor_mask = disc((160, 160), (80, 80), 30)
    donor = np.full((160, 160, 1), 180, np.uint8)
    donor[disc((160, 160), (80, 80), 26)] = 60
    background = np.full((200, 200, 1), 180, np.uint8)
    y, x = np.mgrid[:200, :200] - 100
    radius, angle = np.hypot(y, x), np.arctan2(y, x)
    shape = np.asarray(radius <= 40 * (1 + 0.2 * np.cos(3 * angle)))
    start = fit_lesion(background, shape, geometry.guide_of(shape, 0.2), donor, donor_mask, cover=np.zeros_like(shape))
    dark = start[..., 0] < 120
    expected = radius <= 40 * (1 + 0.2 * np.cos(3 * angle)) * 26 / 30
    assert (dark & expected).sum() / (dark | expected).sum() > 0.95
    assert not (dark & ~shape).any()


@pytest.mark.parametrize(("radius", "donor_radius"), [(0, 20), (20, 0), (0, 0)])
def test_a_lesion_may_be_a_single_pixel(radius: int, donor_radius: int) -> None:
    background, donor = noise((80, 80), 3), noise((80, 80), 3, 1)
    shape, donor_mask = disc((80, 80), (40, 40), radius), disc((80, 80), (30, 50), donor_radius)
    guide = geometry.guide_of(shape, 0.2)
    start = fit_lesion(background, shape, guide, donor, donor_mask, cover=np.zeros_like(shape))
    assert (start[~guide] == background[~guide]).all()


def test_the_composite_matches_grey_to_colour_both_ways() -> None:
    mask = disc((80, 80), (40, 40), 20)
    guide = geometry.guide_of(mask, 0.1)
    for donor_channels, channels in ((1, 3), (3, 1)):
        start = fit_lesion(noise((80, 80), channels), mask, guide, noise((80, 80), donor_channels, 1), mask)
        assert start.shape == (80, 80, channels)


def test_nothing_of_an_old_lesion_under_the_guide_reaches_the_composite() -> None:
    shape = disc((100, 100), (40, 40), 12)
    old = disc((100, 100), (60, 60), 20)
    guide = geometry.guide_of(shape, 0.2, cover=old)
    clean = np.full((100, 100, 3), 160, np.uint8)
    with_old = clean.copy()
    with_old[old] = (255, 0, 0)
    donor = clean.copy()
    donor[old] = 60
    for cover in (None, old):
        spoilt = fit_lesion(with_old, shape, guide, donor, old, cover)
        assert (spoilt == fit_lesion(clean, shape, guide, donor, old, cover)).all()


def test_the_composite_keeps_healthy_tissue_around_the_lesion() -> None:
    background, shape = noise((90, 120), 3), disc((90, 120), (40, 60), 12)
    guide = geometry.guide_of(shape, 0.5)
    start = fit_lesion(background, shape, guide, background, shape, cover=np.zeros_like(shape))
    assert (start != background)[shape].any()
    assert (start == background)[~geometry.dilate(shape, 4)].all()
