from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from hashlib import sha256

import numpy as np
import pytest
import torch
from meddiff.contracts.recipes import CPU, Quality
from meddiff.science import quality
from meddiff.science.encoders import Encoder, load_encoder
from meddiff.science.geometry import Image, Mask
from scipy import ndimage
from torch import Tensor

from .real_cases import NAMES, RealCase, real_cases

SETTINGS = Quality(crop_px=64)


def coarse(images: Tensor) -> Tensor:
    """A picture of 8 by 8 without its mean: knows what is where, and nothing of brightness."""
    small = torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
    return small - small.mean(dim=1, keepdim=True)


COARSE = Encoder("coarse", "0" * 64, torch.device("cpu"), coarse)


def lesion(seed: int, channels: int = 3) -> tuple[Image, Mask]:
    """A dark spot on a smooth random picture (80, 100, C), and a disc as its mask."""
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(size=(80, 100, channels)), (6, 6, 0))
    rows, columns = np.ogrid[:80, :100]
    mask = np.asarray(np.hypot(rows - 40, columns - 50) < 20 + seed % 5)
    spot = ndimage.gaussian_filter(mask.astype(np.float64), 3)[..., None]
    return np.clip(150 - 50 * spot + 25 * texture / texture.std(), 0, 255).astype(np.uint8), mask


@cache
def calibrated(count: int = 12) -> quality.Reference:
    crops = [quality.lesion_crop(*lesion(seed), SETTINGS.context, SETTINGS.crop_px) for seed in range(count)]
    return quality.calibrate(COARSE, crops, [f"{seed:064x}" for seed in range(count)], SETTINGS)


def verdict(image: Image, shape: Mask) -> quality.Verdict:
    return quality.judge(calibrated(), COARSE, image, shape, SETTINGS)


# --------------------------------------------------------------------------------------------------------- the crop


@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_shows_the_lesion_and_its_surroundings_whatever_their_size(channels: int) -> None:
    image = np.zeros((90, 120, channels), np.uint8)
    mask = np.zeros((90, 120), np.bool_)
    mask[30:50, 40:80] = True
    image[mask] = 200
    crop = quality.lesion_crop(image, mask, 1.5, 60)
    assert crop.shape == (60, 60, channels)
    inside = crop[..., 0] > 100
    assert inside.any(axis=0).sum() == pytest.approx(60 / 1.5, abs=1)
    assert inside.any(axis=1).sum() == pytest.approx(60 / 1.5 / 2, abs=1)
    twice = quality.lesion_crop(image.repeat(2, 0).repeat(2, 1), mask.repeat(2, 0).repeat(2, 1), 1.5, 60)
    assert np.abs(twice.astype(int) - crop).mean() < 4


def test_a_crop_ends_where_the_image_ends_and_an_empty_region_means_all_of_it() -> None:
    image = np.arange(64, dtype=np.uint8)[:, None, None].repeat(48, 1)
    mask = np.zeros((64, 48), np.bool_)
    mask[:40] = True
    crop = quality.lesion_crop(image, mask, 1.2, 96)
    assert crop[0].mean() < 1
    assert (np.diff(crop[..., 0].astype(int), axis=0) >= 0).all()
    assert (
        quality.lesion_crop(image, np.zeros_like(mask), 1.2, 64) == quality.lesion_crop(image, ~mask | mask, 1, 64)
    ).all()


def test_a_flipped_pair_has_the_flipped_crop() -> None:
    image, mask = lesion(3)
    crop = quality.lesion_crop(image, mask, 1.3, 64)
    flipped = quality.lesion_crop(image[:, ::-1], mask[:, ::-1], 1.3, 64)
    assert np.abs(crop[:, ::-1].astype(int) - flipped).max() <= 12


# ------------------------------------------------------------------------------------------------------ the verdicts


def test_another_lesion_of_the_family_passes_and_its_scores_lie_in_the_band() -> None:
    passed = [verdict(*lesion(seed)) for seed in range(100, 112)]
    reasons = Counter(v.reason for v in passed)
    assert reasons[None] >= 10
    for reason, scores in passed:
        inside = scores.band[0] <= scores.nearest_real <= scores.band[1]
        assert inside == (reason is None)


def test_a_copy_its_flip_and_a_turned_one_are_copies_of_the_case_they_come_from() -> None:
    image, mask = lesion(4)
    pairs = [(image, mask), (image[:, ::-1], mask[:, ::-1]), (np.rot90(image), np.rot90(mask))]
    bright = np.clip(image * 1.05 + 15, 0, 255).astype(np.uint8)
    for picture, shape in [*pairs, (bright[6:, 4:], mask[6:, 4:])]:
        reason, scores = verdict(picture, shape)
        assert reason == "copy"
        assert scores.nearest_sha256 == f"{4:064x}"
        assert scores.nearest_real > scores.band[1]
        assert scores.margin > 0


def test_a_grey_patch_is_flat_and_a_missing_lesion_is_named() -> None:
    image, mask = lesion(101)
    flat = np.where(mask[..., None], 120, image).astype(np.uint8)
    assert verdict(flat, mask).reason == "flat"
    assert verdict(image, np.zeros_like(mask)).reason == "empty_shape"


def test_what_is_like_no_real_lesion_is_too_far() -> None:
    _, mask = lesion(0)
    rows, columns = np.ogrid[:80, :100]
    chequered = (((rows // 4 + columns // 4) % 2) * 255).astype(np.uint8)[..., None]
    reason, scores = verdict(chequered, mask)
    assert reason == "too_far"
    assert scores.nearest_real < scores.band[0]


def test_grey_images_are_judged_as_colour_ones_are() -> None:
    image, mask = lesion(100, channels=1)
    one, three = verdict(image, mask), verdict(image.repeat(3, 2), mask)
    assert one == three


def test_a_reference_goes_through_its_bytes_unchanged() -> None:
    reference = calibrated()
    again = quality.Reference.from_bytes(reference.to_bytes())
    assert torch.equal(again.embeddings, reference.embeddings)
    assert (again.cases, again.lowest, again.copy_ratio) == (reference.cases, reference.lowest, reference.copy_ratio)
    assert again.lesions == reference.lesions == tuple(range(12))
    assert again.to_bytes() == reference.to_bytes()
    assert reference.summary()["cases"] == 12


def test_two_cases_are_enough_to_know_a_copy_and_one_is_not() -> None:
    reference = calibrated(2)
    assert quality.judge(reference, COARSE, *lesion(1), SETTINGS).reason == "copy"
    with pytest.raises(ValueError, match="at least two"):
        calibrated(1)


def test_a_lesion_that_is_there_twice_switches_no_gate_off() -> None:
    """As a second frame of it, or the same picture stored with loss."""
    pairs = [lesion(seed) for seed in range(12)]
    image, mask = pairs[4]
    noise = np.random.default_rng(0).normal(0, 1.5, image.shape)
    pairs.append((np.clip(image + noise, 0, 255).astype(np.uint8), mask))
    crops = [quality.lesion_crop(*pair, SETTINGS.context, SETTINGS.crop_px) for pair in pairs]
    reference = quality.calibrate(COARSE, crops, [f"{n:064x}" for n in range(13)], SETTINGS)
    assert reference.summary()["lesions"] == 12
    assert reference.lesions[12] == reference.lesions[4]
    alone = calibrated()
    assert reference.copy_ratio == pytest.approx(alone.copy_ratio, rel=0.1)
    assert reference.lowest == pytest.approx(alone.lowest, abs=0.05)
    for seed in (4, 7):
        assert quality.judge(reference, COARSE, *lesion(seed), SETTINGS).reason == "copy"
    with pytest.raises(ValueError, match="at least two"):
        quality.calibrate(COARSE, [crops[4], crops[12]], ["a" * 64, "b" * 64], SETTINGS)


# --------------------------------------------------------------------------------------------------------- real data

CALIBRATED, UNSEEN = 30, 40
DRAWS, PLANTED = 3, 12


def brightened_and_cropped(case: RealCase, rng: np.random.Generator) -> tuple[Image, Mask]:
    """A tenth of height and width cut off, 25 grey levels brighter; uncut where that would lose the lesion."""
    height, width = case.mask.shape
    top, left = rng.integers(0, height // 10 + 1), rng.integers(0, width // 10 + 1)
    window = (slice(top, top + height * 9 // 10), slice(left, left + width * 9 // 10))
    window = window if case.mask[window].any() else (slice(None), slice(None))
    bright = np.clip(case.image[window].astype(int) + 25, 0, 255).astype(np.uint8)
    return bright, case.mask[window]


def remembering(encoder: Encoder) -> Encoder:
    """The encoder, which looks at no crop twice: draws share most of their cases."""
    seen: dict[bytes, Tensor] = {}

    def features(images: Tensor) -> Tensor:
        key = sha256(images.numpy()).digest()
        if key not in seen:
            seen[key] = encoder.features(images)
        return seen[key]

    return replace(encoder, features=features)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_planted_copies_are_caught_and_unseen_real_cases_pass(name: str) -> None:
    """Over several draws of the calibrated cases: with forty unseen cases a draw, one alone says little about 5 %."""
    torch.set_num_threads(2)
    encoder = remembering(load_encoder("efficientnet-lite0", "builtin", torch.device("cpu")))
    settings = CPU.quality
    cases = real_cases(name, CALIBRATED + UNSEEN)
    planted_reasons: dict[str, list[str | None]] = defaultdict(list)
    unseen_reasons: list[str | None] = []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        drawn = [cases[i] for i in rng.permutation(len(cases))] if draw else cases
        known = drawn[:CALIBRATED]
        unseen = [case for case in drawn[CALIBRATED:] if case.patient not in {k.patient for k in known}]
        crops = [quality.lesion_crop(case.image, case.mask, settings.context, settings.crop_px) for case in known]
        reference = quality.calibrate(encoder, crops, [f"{n:064x}" for n in range(CALIBRATED)], settings)
        planted = {
            "copy": [(case.image, case.mask) for case in known[:PLANTED]],
            "flip": [(case.image[:, ::-1], case.mask[:, ::-1]) for case in known[:PLANTED]],
            "brightened and cropped": [brightened_and_cropped(case, rng) for case in known[:PLANTED]],
            "grey": [
                (np.where(case.mask[..., None], 128, case.image).astype(np.uint8), case.mask)
                for case in known[:PLANTED]
            ],
        }
        for what, pairs in planted.items():
            planted_reasons[what] += [quality.judge(reference, encoder, *pair, settings).reason for pair in pairs]
        unseen_reasons += [quality.judge(reference, encoder, case.image, case.mask, settings).reason for case in unseen]
    turned_away = Counter(reason for reason in unseen_reasons if reason)
    caught = planted_reasons["brightened and cropped"].count("copy") / (DRAWS * PLANTED)
    print(f"{name}: {dict(turned_away)} of {len(unseen_reasons)} unseen turned away, {caught:.2f} of crops caught")
    assert set(planted_reasons["copy"]) == {"copy"}
    assert set(planted_reasons["flip"]) == {"copy"}
    assert set(planted_reasons["grey"]) == {"flat"}
    assert turned_away.total() <= 0.05 * len(unseen_reasons)
    assert caught >= 10 / 12
