"""What the figures of an evaluation say: gains with their intervals, the learning curve, and a verdict in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from meddiff.contracts.evaluation import REAL, Arm, ArmResult, CurvePoint, Interval, Row, SizeGain, Verdict
from meddiff.science.evaluation.comparison import Gain, Paired, gain, holm, mean_of

POINTS = 100.0
LEAST_SIZED = 5  # Cases of a size, below which nothing is said of it.
LEAST_RISE = 1e-4  # Of the learning curve, in Dice.


def arm_results(rows: Sequence[Row], arms: Sequence[Arm]) -> tuple[ArmResult, ...]:
    """Each arm that has rows, with its gain over real only; the p-values are adjusted over the arms after Holm."""
    by_arm = _by_arm(rows)
    gains = {
        arm.name: gain(change)
        for arm in arms
        if arm.name != REAL and (change := differences(by_arm[arm.name], by_arm[REAL]))
    }
    adjusted = holm({name: found.p for name, found in gains.items()})
    curve = learning_curve(rows, arms)
    return tuple(
        _result(arm, by_arm[arm.name], gains.get(arm.name), adjusted.get(arm.name), curve, by_arm[REAL])
        for arm in arms
        if by_arm[arm.name]
    )


def _result(
    arm: Arm,
    rows: Sequence[Row],
    found: Gain | None,
    p: float | None,
    curve: Sequence[CurvePoint],
    real: Sequence[Row],
) -> ArmResult:
    runs = _by_run(rows)
    interval = None if found is None else _points(found)
    equivalents, at_least = (None, False) if interval is None else annotation_equivalents(interval, curve, real)
    return ArmResult(
        name=arm.name,
        runs=len(runs),
        real=float(np.mean([row.real for row in rows])),
        pairs=arm.pairs,
        steps=tuple(sorted({row.steps for row in rows})),
        dice=_mean(rows, "dice"),
        nsd=_mean(rows, "nsd"),
        hd95=_mean(rows, "hd95"),
        spread=seed_spread(rows),
        gain=interval,
        p=p,
        verdict=None if interval is None else verdict(interval),
        equivalents=equivalents if arm.source is not None else None,
        at_least=at_least if arm.source is not None else False,
    )


def differences(arm: Sequence[Row], against: Sequence[Row]) -> list[Paired]:
    """Of each split, the Dice under one arm less that under the other, for the runs that both have."""
    ours, theirs = _by_run(arm), _by_run(against)
    values: dict[int, list[list[float]]] = defaultdict(list)
    cases: dict[int, list[Row]] = {}
    for split, seed in sorted(ours.keys() & theirs.keys()):
        one, other = ({row.case: row for row in runs[split, seed]} for runs in (ours, theirs))
        if both := sorted(one.keys() & other.keys()):
            values[split].append([one[case].dice - other[case].dice for case in both])
            cases[split] = [one[case] for case in both]
    numbers: dict[str | int, int] = {}
    group_of = {
        split: np.array(
            [numbers.setdefault(row.case if row.group is None else row.group, len(numbers)) for row in rows]
        )
        for split, rows in cases.items()
    }
    return [Paired(np.array(runs), group_of[split]) for split, runs in values.items()]


def seed_spread(rows: Sequence[Row]) -> float | None:
    """Standard deviation of a run's mean Dice between the seeds of a split, in points; None below two seeds."""
    means: dict[int, list[float]] = defaultdict(list)
    for (split, _), run in sorted(_by_run(rows).items()):
        means[split].append(_mean(run, "dice"))
    variances = [float(np.var(values, ddof=1)) for values in means.values() if len(values) > 1]
    return POINTS * float(np.sqrt(np.mean(variances))) if variances else None


def learning_curve(rows: Sequence[Row], arms: Sequence[Arm]) -> tuple[CurvePoint, ...]:
    """Dice of the arms of real cases alone, by the number of cases: that of ``real`` and each one's mean difference
    from it; made to rise (pool adjacent violators), for more cases do not make a segmenter worse but by chance."""
    by_arm = _by_arm(rows)
    real, points = by_arm[REAL], []
    for arm in arms:
        some = by_arm[arm.name]
        if arm.source is None and (arm.name == REAL or arm.share != 1) and (change := differences(some, real)):
            points.append((float(np.mean([row.real for row in some])), _mean(real, "dice") + mean_of(change)))
    return tuple(CurvePoint(real=count, dice=dice) for count, dice in _rising(sorted(points)))


def _rising(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    blocks: list[list[tuple[float, float]]] = []
    for point in points:
        blocks.append([point])
        while len(blocks) > 1 and _level(blocks[-2]) > _level(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return [(real, _level(block)) for block in blocks for real, _ in block]


def _level(block: Sequence[tuple[float, float]]) -> float:
    return float(np.mean([dice for _, dice in block]))


def annotation_equivalents(
    gained: Interval, curve: Sequence[CurvePoint], real: Sequence[Row]
) -> tuple[Interval | None, bool]:
    """How many more real cases would have gained as much: the curve between its points is linear in the logarithm of
    the number of cases. The second value: whether the curve ends below the mean gain, so that it is at least as many.
    None where no gain is shown, and where the curve has no point with more cases or does not rise to one: what cases
    that bring nothing are worth cannot be read. The interval's ends lie no further than the curve's."""
    if gained.low <= 0 or len(curve) < 2:
        return None, False
    numbers, dice = np.log([point.real for point in curve]), np.array([point.dice for point in curve])
    have = float(np.log(np.mean([row.real for row in real])))
    if numbers[-1] <= have + 1e-6:
        return None, False
    level = float(np.interp(have, numbers, dice))
    if dice[-1] - level <= LEAST_RISE:
        return None, False
    strictly = dice + 1e-9 * np.arange(len(dice))

    def more(points: float) -> float:
        there = float(np.interp(level + points / POINTS, strictly, numbers))
        return float(np.exp(there) - np.exp(have))

    at_least = level + gained.mean / POINTS > dice[-1]
    return Interval(mean=more(gained.mean), low=more(gained.low), high=more(gained.high)), bool(at_least)


def verdict(gained: Interval) -> Verdict:
    """By the interval: above zero, below it, or around it."""
    return "helps" if gained.low > 0 else "harms" if gained.high < 0 else "adds nothing"


def headline(results: Sequence[ArmResult], arms: Sequence[Arm]) -> tuple[ArmResult, Arm]:
    """The arm the verdict is of: the first with synthetic pairs, else with copy-paste, else with most real cases.
    Raises ``ValueError`` where there is none of them."""
    compared = {result.name: result for result in results if result.gain is not None}
    order = {"synthetic": 0, "copy-paste": 1, None: 2}
    best = min(
        (arm for arm in arms if arm.name in compared and arm.share >= 1),
        key=lambda arm: (order[arm.source], -arm.share),
    )
    return compared[best.name], best


def in_words(result: ArmResult, arm: Arm, trained_on: float) -> str:
    """The verdict on an arm as a clinician would say it; ``trained_on``: cases of the arm of real ones alone."""
    assert result.gain is not None
    points = f"{result.gain.mean:+.1f} points of Dice (95 % interval {result.gain.low:+.1f} to {result.gain.high:+.1f})"
    real = f"{trained_on:.0f} annotated cases"
    what = {"synthetic": "These synthetic pairs", "copy-paste": "Copied and pasted lesions"}.get(
        arm.source or "", f"{result.real:.0f} annotated cases in place of {trained_on:.0f}"
    )
    if arm.source is None:
        does = {"harms": "make segmentation worse", "adds nothing": "add nothing that the runs can show"}
        return f"{what} {does.get(result.verdict or '', 'help')}: {points}."
    if result.verdict == "harms":
        return f"{what} beside {real} make segmentation worse: {points}."
    if result.verdict == "adds nothing":
        return f"{what} add nothing to {real} that the runs can show: {points}."
    worth, more = "", 0 if result.equivalents is None else round(result.equivalents.mean)
    if more > 0:
        worth = f", worth {'at least' if result.at_least else 'about'} {more} more annotated case{'s' * (more > 1)}"
    return f"{what} help beside {real}: {points}{worth}."


def gains_by_size(rows: Sequence[Row], arm: str) -> tuple[SizeGain, ...]:
    """Gain of an arm on small, middling and large lesions: thirds of the test cases by area."""
    by_arm = _by_arm(rows)
    areas = {row.case: row.area for row in by_arm[REAL]}
    edges = np.quantile(list(areas.values()), [0, 1 / 3, 2 / 3, 1]).tolist()
    edges[-1] = float(np.nextafter(edges[-1], 2))
    found = []
    for low, high in pairwise(edges):
        inside = {case for case, area in areas.items() if low <= area < high}
        some = [[row for row in by_arm[name] if row.case in inside] for name in (arm, REAL)]
        groups = {row.case if row.group is None else row.group for row in some[1]}
        if len(groups) >= LEAST_SIZED and (change := differences(some[0], some[1])):
            found.append(SizeGain(low=low, high=high, cases=len(inside), gain=_points(gain(change))))
    return tuple(found)


def _points(found: Gain) -> Interval:
    return Interval(mean=POINTS * found.mean, low=POINTS * found.low, high=POINTS * found.high)


def _mean(rows: Sequence[Row], what: str) -> float:
    return float(np.mean([getattr(row, what) for row in rows]))


def _by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.arm].append(row)
    return found


def _by_run(rows: Sequence[Row]) -> dict[tuple[int, int], list[Row]]:
    found: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.split, row.seed].append(row)
    return found
