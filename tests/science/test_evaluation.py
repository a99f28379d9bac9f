"""Figures against closed forms, intervals against what they must hold, and segmenters that learn."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from meddiff.contracts.evaluation import REAL, Arm, CurvePoint, Interval, Mixing, Row
from meddiff.contracts.recipes import Evaluation
from meddiff.science.evaluation import comparison, figures, report, segmenters, splits, training, trials
from meddiff.science.geometry import Image, Mask
from scipy import stats

CPU = torch.device("cpu")


def square(top: int, left: int, side: int = 20) -> Mask:
    mask = np.zeros((60, 80), np.bool_)
    mask[top : top + side, left : left + side] = True
    return mask


NOTHING = np.zeros((60, 80), np.bool_)


def disc(seed: int) -> tuple[Image, Mask]:
    """A dark disc on grey noise (48, 64, 1), and its mask."""
    rng = np.random.default_rng(seed)
    rows, columns = np.ogrid[:48, :64]
    mask = np.asarray(np.hypot(rows - rng.uniform(15, 33), columns - rng.uniform(18, 46)) < rng.uniform(7, 13))
    return (rng.normal(160, 12, (48, 64, 1)) - 70 * mask[..., None]).clip(0, 255).astype(np.uint8), mask


# ---------------------------------------------------------------------------------------------------------- figures


def test_a_square_five_pixels_off_has_the_figures_geometry_gives_it() -> None:
    found = figures.figures(square(20, 25), square(20, 30))
    assert found.dice == pytest.approx(15 / 20)
    assert found.hd95 == pytest.approx(5 / 100)
    assert figures.figures(square(20, 30), square(20, 25)) == found
    one_off = figures.figures(square(20, 25), square(20, 26))
    assert one_off.nsd == 1  # Within the tolerance of 2 px.
    assert 0 < found.nsd < 1


def test_equal_masks_are_best_and_empty_ones_agree_only_with_empty_ones() -> None:
    best = figures.Figures(1, 1, 0)
    assert figures.figures(square(3, 3), square(3, 3)) == best
    assert figures.figures(NOTHING, NOTHING) == best
    assert figures.figures(NOTHING, square(3, 3)) == figures.figures(square(3, 3), NOTHING) == figures.Figures(0, 0, 1)


def test_masks_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="different size"):
        figures.figures(NOTHING, NOTHING[:10])


# ------------------------------------------------------------------------------------------------------- comparison


def gained(*differences: np.ndarray) -> comparison.Gain:
    """Of draws that test different cases, each of another patient."""
    ends = np.cumsum([draw.shape[1] for draw in differences])
    return comparison.gain(
        [
            comparison.Paired(draw, np.arange(end - draw.shape[1], end))
            for draw, end in zip(differences, ends, strict=True)
        ]
    )


def test_a_gain_that_every_case_shows_has_no_spread() -> None:
    found = gained(np.full((2, 9), 0.25), np.full((2, 7), 0.25))
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.p < 0.001


def test_draws_that_disagree_widen_the_interval_however_many_cases_they_have() -> None:
    found = gained(*(np.full((1, 1000), level) for level in (1.0, -1.0, 0.5)))
    assert found.low < 0 < found.high
    assert found.p > 0.3


def test_of_one_draw_and_one_seed_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, (1, 400))
    found = gained(values)
    standard_error = values.std() / 20
    assert found.high - found.low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)


def test_of_one_draw_the_luck_of_its_seeds_is_in_the_interval_whatever_the_number_of_cases() -> None:
    luck = np.random.default_rng(0).normal(0.3, 1, (30, 1))
    found = gained(np.broadcast_to(luck, (30, 900)))
    standard_error = luck.std() / 30**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)


@pytest.mark.parametrize("seeds", [2, 4])
def test_few_seeds_spread_as_their_standard_error_says(seeds: int) -> None:
    luck = np.random.default_rng(0).normal(0.3, 1, (seeds, 1))
    draw = comparison.Paired(np.broadcast_to(luck, (seeds, 30)), np.arange(30))
    means = comparison._resampled_means([draw], 10_000, np.random.default_rng(1))
    assert means.std() == pytest.approx(stats.sem(luck[:, 0]), rel=0.03)


def test_the_cases_of_a_patient_count_as_one() -> None:
    patients = np.random.default_rng(0).normal(0.3, 1, (1, 40))
    found = comparison.gain([comparison.Paired(np.repeat(patients, 25, axis=1), np.repeat(np.arange(40), 25))])
    alone = gained(patients)
    assert found.mean == pytest.approx(alone.mean)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.02)


def test_a_case_that_several_draws_test_counts_once() -> None:
    cases = np.random.default_rng(0).normal(0.3, 1, (1, 60))
    often = comparison.gain([comparison.Paired(cases, np.arange(60)) for _ in range(4)])
    alone = gained(cases)
    assert (often.low, often.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    apart = gained(*(cases for _ in range(4)))
    assert apart.high - apart.low == pytest.approx((alone.high - alone.low) / 2, rel=0.1)


@pytest.mark.parametrize("groups", [4, 8])
def test_a_few_cases_show_no_more_than_a_few_cases_can(groups: int) -> None:
    """The interval is about that of Student's t; and no test of n cases has a p-value below 2^(1-n)."""
    values = np.random.default_rng(3).normal(0.3, 1, (1, groups))
    found = gained(values)
    error = stats.sem(values[0]) * stats.t.ppf(0.975, groups - 1)
    assert found.high - found.low == pytest.approx(2 * error, rel=0.2)
    assert gained(np.linspace(0.9, 1.1, groups)[None]).p == 2.0 ** (1 - groups)


def test_many_folds_of_a_case_each_have_an_interval() -> None:
    folds = [comparison.Paired(np.full((2, 1), 0.5), np.array([n])) for n in range(20)]
    found = comparison.gain(folds)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))


def test_nothing_is_no_gain() -> None:
    for nothing in ([], [np.empty((2, 0))]):
        with pytest.raises(ValueError, match="at least one"):
            gained(*nothing)


def test_holm_is_holms_own_arithmetic() -> None:
    assert comparison.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert comparison.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


# ------------------------------------------------------------------------------------------------------- segmenters


@pytest.mark.parametrize("name", segmenters.SEGMENTERS)
def test_a_segmenter_gives_a_logit_a_pixel_and_follows_from_its_seed(name: str) -> None:
    one, two, other = (segmenters.build(name, seed).eval() for seed in (1, 1, 2))
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert one(x).shape == (2, 1, 64, 96)
        assert torch.equal(one(x), two(x))
        assert not torch.equal(one(x), other(x))


def test_an_unknown_segmenter_is_refused() -> None:
    with pytest.raises(ValueError, match="there are unet"):
        segmenters.build("nnunet", 0)


def test_augmentation_moves_image_and_mask_together() -> None:
    masks = training.Pairs.of([disc(n) for n in range(6)], 64).masks
    images, moved = training.augmented(0.2 + 0.6 * masks.expand(-1, 3, -1, -1), masks, torch.Generator().manual_seed(3))
    assert not torch.equal(moved, masks)
    for image, mask in zip(images, moved[:, 0].bool(), strict=True):
        assert image[:, mask].mean() > image[:, ~mask].mean() + 0.2
        edge = (image.mean(0) > image.mean(0)[mask].mean() / 2 + image.mean(0)[~mask].mean() / 2) != mask
        assert edge.float().mean() < 0.03


def test_the_loss_is_least_where_the_mask_is_and_flat_nowhere_else() -> None:
    mask = torch.from_numpy(disc(1)[1])[None, None].float()
    right, wrong = (training.segmentation_loss(sign * 20 * (2 * mask - 1), mask) for sign in (1, -1))
    assert right < 0.01 < 2 < wrong


LEARNED = training.Pairs.of([disc(n) for n in range(8)], 64)


def trained(settings: Evaluation, synthetic: training.Pairs | None = None, mixing: Mixing = "joint") -> torch.nn.Module:
    network = segmenters.build("unet", 1)
    *_, (steps, network) = training.fit(network, LEARNED, synthetic, settings, settings.steps, 5, mixing)
    assert steps == settings.steps
    return network


def test_the_same_seed_gives_the_same_weights() -> None:
    synthetic = training.Pairs.of([disc(n) for n in range(8, 12)], 64)
    settings = Evaluation(steps=4, batch_size=4, pretrain_steps=3)
    one, two = (trained(settings, synthetic) for _ in range(2))
    for ours, theirs in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_pretraining_ends_where_real_pairs_begin_and_counts_their_steps_alone() -> None:
    synthetic = training.Pairs.of([disc(n) for n in range(8, 12)], 64)
    settings = Evaluation(steps=2, batch_size=4, pretrain_steps=3, every=1)
    seen: list[int] = []
    fitting = training.fit(segmenters.build("unet", 1), LEARNED, synthetic, settings, 2, 5, "pretrain", seen.append)
    assert [steps for steps, _ in fitting] == [1, 2]
    assert seen == [-3, -2, -1, 0, 1]


def test_synthetic_pairs_fall_to_none_before_the_longest_training_ends() -> None:
    settings = Evaluation(steps=90, batch_size=6)
    beside = [training.synthetic_beside(settings, step, "falling") for step in range(90)]
    assert beside[0] == 6
    assert beside == sorted(beside, reverse=True)
    assert beside[30] == 3
    assert set(beside[60:]) == {0}
    assert {training.synthetic_beside(settings, step, "joint") for step in range(90)} == {6}
    assert [training.synthetic_beside(settings, step, "pretrain") for step in (-1, 0)] == [6, 0]


def test_a_segmenter_learns_discs() -> None:
    torch.set_num_threads(1)
    network = trained(Evaluation(steps=100, batch_size=4, learning_rate=3e-3, ema_decay=0.9))
    for image, mask in map(disc, (50, 51)):
        assert figures.figures(training.predict(network, image, 64), mask).dice > 0.8


# ----------------------------------------------------------------------------------------------------------- splits


def test_a_group_is_a_patient_or_the_same_picture_and_whoever_shares_either() -> None:
    vectors = np.eye(5, dtype=np.float32)
    vectors[3] = vectors[1]
    assert splits.groups(["a", "a", None, None, None], vectors, 0.97) == [0, 0, 1, 0, 2]


def test_a_draw_keeps_groups_apart_and_trains_on_one_case_of_each() -> None:
    group_of = [n // 2 for n in range(40)]
    drawn = splits.draw(group_of, train=6, extra=4, test=7, seed=1)
    of = [{group_of[i] for i in part} for part in (drawn.train, drawn.extra, drawn.test)]
    assert [len(part) for part in (drawn.train, drawn.extra, drawn.test)] == [6, 4, 7]
    assert [len(groups) for groups in of[:2]] == [6, 4]
    assert len(of[0] | of[1] | of[2]) == sum(map(len, of))
    assert splits.draw(group_of, 6, 4, 7, seed=1) == drawn != splits.draw(group_of, 6, 4, 7, seed=2)
    with pytest.raises(ValueError, match="20 groups"):
        splits.draw(group_of, 16, 4, 7, seed=1)


def test_folds_hold_every_case_once_and_no_group_twice() -> None:
    group_of = [n // 3 for n in range(30)]
    parts = splits.folds(group_of, 4, seed=0)
    assert sorted(i for part in parts for i in part) == list(range(30))
    for part in parts:
        assert all({i for i, g in enumerate(group_of) if g == group_of[member]} <= set(part) for member in part)
    with pytest.raises(ValueError, match="cannot be cut"):
        splits.folds([0, 0, 1], 3, seed=0)


# ----------------------------------------------------------------------------------------------------------- trials

QUICK = Evaluation(segmenter="unet", size=64, steps=6, every=2, batch_size=2, inner_folds=3)


def test_a_stop_is_chosen_with_every_case_held_aside_once() -> None:
    real = [disc(n) for n in range(6)]
    told: list[tuple[int, int]] = []
    curve = trials.stop_curve(trials.Material(real), QUICK, 3, lambda *step: told.append(step), CPU)
    assert sorted(curve) == [2, 4, 6]
    assert told[-1] == (17, 18)
    assert [step for step, _ in told] == sorted(step for step, _ in told)


def test_a_draw_tests_one_case_of_each_patient_before_the_second_of_any() -> None:
    group_of = [n // 10 for n in range(80)]
    drawn = splits.draw(group_of, train=2, extra=1, test=6, seed=0)
    assert sorted(group_of[place] for place in (*drawn.train, *drawn.extra, *drawn.test[:5])) == list(range(8))
    assert len(drawn.test) == 6


@pytest.mark.parametrize(("groups", "trainings"), [("aabbaa", 2), ("aabbcc", 3), ("aaaaaa", 3), ("", 3)])
def test_a_group_is_held_aside_as_a_whole_where_there_are_several(groups: str, trainings: int) -> None:
    told: list[tuple[int, int]] = []
    material = trials.Material([disc(n) for n in range(6)], groups=[ord(one) for one in groups])
    trials.stop_curve(material, QUICK, 3, lambda *step: told.append(step), CPU)
    assert told[-1] == (6 * trainings - 1, 6 * trainings)


def test_the_stop_is_not_chosen_by_a_single_lucky_step() -> None:
    assert trials.best_stop({50: 0.5, 100: 0.9, 150: 0.4, 200: 0.7, 250: 0.75, 300: 0.74, 350: 0.6}) == 250


def test_of_stops_that_are_as_good_the_last_is_taken() -> None:
    level = {80: 0.754, 160: 0.851, 240: 0.844, 320: 0.840, 400: 0.843, 480: 0.843}
    assert trials.best_stop(level) == 480
    assert trials.best_stop(level | {400: 0.80, 480: 0.78}) == 240


def test_pairs_that_show_a_case_held_aside_have_no_part_in_choosing_the_stop() -> None:
    real = [disc(n) for n in range(6)]
    everywhere = frozenset(range(6))
    shown = trials.Material(real, [disc(9)], [everywhere])
    assert trials.stop_curve(shown, QUICK, 3, lambda *_: None, CPU) == trials.stop_curve(
        trials.Material(real), QUICK, 3, lambda *_: None, CPU
    )


class Counted(Sequence[trials.Pair]):
    """Pairs read when asked for, and how many were in memory at once."""

    def __init__(self, count: int) -> None:
        self.count, self.now, self.most = count, 0, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: Any) -> Any:
        if place >= self.count:
            raise IndexError
        image, mask = disc(place)
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(mask, self._gone)
        return image, mask

    def _gone(self) -> None:
        self.now -= 1


def test_no_more_than_a_few_pairs_are_in_memory_at_their_full_size() -> None:
    """The one in hand and the next: thousands of photographs would not fit."""
    real, synthetic = Counted(9), Counted(12)
    material = trials.Material(real, synthetic, [frozenset()] * 12)
    trials.stop_curve(material, QUICK, 3, lambda *_: None, CPU)
    trials.trained(material, QUICK, 2, 3, lambda *_: None, CPU)
    assert 0 < real.most <= 2
    assert 0 < synthetic.most <= 2


# ----------------------------------------------------------------------------------------------------------- report

ARMS = (
    Arm(name=REAL),
    Arm(name="real x0.5", share=0.5),
    Arm(name="real x2", share=2),
    Arm(name="synthetic 90 joint", source="synthetic", pairs=90),
)


def rows(gained: float, noise: float = 0.01) -> list[Row]:
    """Three splits, two seeds: Dice rises by 0.1 with each doubling of the cases, and by ``gained`` with the pairs."""
    rng = np.random.default_rng(0)
    level = {"real x0.5": 0.6, REAL: 0.7, "real x2": 0.8, "synthetic 90 joint": 0.7 + gained}
    found = []
    for arm in ARMS:
        for split in range(3):
            for seed in range(2):
                for case in range(20):
                    dice = float(np.clip(level[arm.name] + rng.normal(0, noise), 0, 1))
                    found.append(
                        Row(
                            split=split,
                            arm=arm.name,
                            seed=seed,
                            steps=100,
                            real=round(30 * arm.share),
                            case=f"{split}-{case}",
                            area=(case + 1) / 100,
                            dice=dice,
                            nsd=dice,
                            hd95=0.1,
                        )
                    )
    return found


@pytest.mark.parametrize(
    ("gained", "verdict", "words"),
    [(0.05, "helps", "worth about"), (0.0, "adds nothing", "add nothing"), (-0.05, "harms", "make segmentation worse")],
)
def test_the_verdict_follows_the_interval(gained: float, verdict: str, words: str) -> None:
    *_, synthetic = report.arm_results(rows(gained), ARMS)
    assert synthetic.verdict == verdict
    assert report.headline(report.arm_results(rows(gained), ARMS), ARMS) == (synthetic, ARMS[-1])
    assert words in report.in_words(synthetic, ARMS[-1], 30)
    assert synthetic.gain is not None
    assert synthetic.gain.low <= 100 * gained <= synthetic.gain.high


def test_annotation_equivalents_are_read_off_the_learning_curve() -> None:
    *_, synthetic = report.arm_results(rows(0.05, noise=0.001), ARMS)
    assert synthetic.equivalents is not None
    assert synthetic.equivalents.mean == pytest.approx(30 * 2**0.5 - 30, abs=0.5)
    assert not synthetic.at_least
    *_, beyond = report.arm_results(rows(0.15), ARMS)
    assert beyond.at_least
    assert beyond.equivalents is not None
    assert beyond.equivalents.mean == pytest.approx(30)


def test_arms_are_compared_on_the_runs_that_both_have() -> None:
    """A lucky seed that only one of the arms has had is not the arm's merit."""
    found = [
        row.model_copy(update={"dice": row.dice - 0.2 * row.seed}) for row in rows(0.05, noise=0.0) if row.split == 0
    ]
    unfinished = [row for row in found if row.seed == 0 or row.arm in (REAL, "real x0.5")]
    (_, half, twice, synthetic) = report.arm_results(unfinished, ARMS)
    assert [result.gain and result.gain.mean for result in (half, twice, synthetic)] == pytest.approx([-10, 10, 5])
    assert [point.dice for point in report.learning_curve(unfinished, ARMS)] == pytest.approx([0.5, 0.6, 0.7])


def test_a_curve_that_falls_by_chance_is_made_to_rise_and_a_flat_one_gives_no_reading() -> None:
    curve = report.learning_curve(rows(0.0), ARMS)
    assert [point.real for point in curve] == [15, 30, 60]
    assert report._rising([(15, 0.6), (30, 0.8), (60, 0.7)]) == [(15, 0.6), (30, 0.75), (60, 0.75)]
    flat = (CurvePoint(real=15, dice=0.7), CurvePoint(real=30, dice=0.7))
    gained = Interval(mean=1, low=0.1, high=2)
    assert report.annotation_equivalents(gained, flat, rows(0.0)) == (None, False)
    assert report.annotation_equivalents(Interval(mean=1, low=-0.1, high=2), curve, rows(0.0)) == (None, False)
    short = (CurvePoint(real=15, dice=0.6), CurvePoint(real=30, dice=0.7))
    real = [row for row in rows(0.0) if row.arm == REAL]
    assert report.annotation_equivalents(gained, short, real) == (None, False)
    level = (*short, CurvePoint(real=45, dice=0.7), CurvePoint(real=60, dice=0.7))
    assert report.annotation_equivalents(gained, level, real) == (None, False), "more cases would gain nothing"


def test_the_spread_between_seeds_is_that_of_their_means() -> None:
    found = [row.model_copy(update={"dice": 0.5 + 0.02 * row.seed}) for row in rows(0.0) if row.arm == REAL]
    assert report.seed_spread(found) == pytest.approx(100 * 0.02 / 2**0.5)
    assert report.seed_spread([row for row in found if row.seed == 0]) is None


def test_gains_by_size_hold_each_case_once() -> None:
    sizes = report.gains_by_size(rows(0.05), "synthetic 90 joint")
    assert sum(size.cases for size in sizes) == 60
    assert all(size.gain.low > 0 for size in sizes)
