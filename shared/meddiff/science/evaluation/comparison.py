"""What the difference between two arms means: a hierarchical paired bootstrap, and Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 10_000
BLOCK = 1000  # Resamples that are in memory at once.


@dataclass(frozen=True)
class Gain:
    """Mean difference, its percentile interval, and a two-sided p-value from the same resamples."""

    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Paired:
    """Differences of one draw of the training cases (seeds, cases), and the group of each case (cases,): those of one
    patient, or of one case in several draws, have the same number."""

    values: NDArray[np.float64]
    group_of: NDArray[np.int_]


def gain(differences: Sequence[Paired], seed: int = 0, level: float = 0.95) -> Gain:
    """Of paired differences, a draw of the training cases each.

    Three things are resampled: the draws, whose cases share what was trained on; in every draw its seeds, whose cases
    share the luck of a training; and, crossed with both, the groups of test cases (Owen and Eckles, Annals of Applied
    Statistics 2012), for images of one patient share the patient, and a case that several draws test is one case. The
    deviations from the mean add up, those of n seeds sqrt(n / (n - 1)) times as large and all of them wider by
    Student's t of the groups over the normal quantile, for few of anything show less than how they spread (Hesterberg,
    The American Statistician 2015). No p-value lies below that of n groups which
    all say the same, 2^(1-n). Raises ``ValueError`` where there is no difference.
    """
    if not differences or any(draw.values.size == 0 for draw in differences):
        raise ValueError("a gain needs at least one draw, and a case in each")
    rng = np.random.default_rng(seed)
    mean, of_draws = mean_of(differences), np.array([draw.values.mean() for draw in differences])
    between = of_draws[rng.integers(len(differences), size=(RESAMPLES, len(differences)))].mean(axis=1)
    within = np.concatenate([_resampled_means(differences, BLOCK, rng) for _ in range(0, RESAMPLES, BLOCK)])
    groups = len(np.unique(np.concatenate([draw.group_of for draw in differences])))
    means = mean + _widening(groups) * (between + within - 2 * mean)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    p = min(1.0, max(2 * (beyond * RESAMPLES + 1) / (RESAMPLES + 1), 2.0 ** (1 - groups)))
    return Gain(mean, float(low), float(high), float(p))


def _widening(groups: int) -> float:
    """Of one group nothing is known: its deviations, all zero, stay."""
    return 1.0 if groups < 2 else float(stats.t.ppf(0.975, groups - 1) / stats.norm.ppf(0.975))


def mean_of(differences: Sequence[Paired]) -> float:
    """The mean over draws of the mean difference in each."""
    return float(np.mean([draw.values.mean() for draw in differences]))


def _resampled_means(draws: Sequence[Paired], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means (resamples,) over all draws, their seeds and the groups of their cases drawn with replacement."""
    found = np.zeros(resamples)
    weights = _weights_of_cases([draw.group_of for draw in draws], resamples, rng)
    for draw, of_cases in zip(draws, weights, strict=True):
        of_seeds = len(draw.values)
        counts = rng.multinomial(of_seeds, np.full(of_seeds, 1 / of_seeds), size=resamples)
        seeds = 1 + (counts - 1) * np.sqrt(of_seeds / max(of_seeds - 1, 1))
        found += ((seeds @ draw.values) * of_cases).sum(axis=1) / (of_seeds * of_cases.sum(axis=1))
    return found / len(draws)


def _weights_of_cases(
    groups: Sequence[NDArray[np.int_]], resamples: int, rng: np.random.Generator
) -> list[NDArray[np.float64]]:
    """How much each case of each draw (resamples, cases) counts in a resample of the groups of all draws: by weights
    (Rubin's Bayesian bootstrap, 1981) that vary as counts of drawing with replacement do and are never zero, so that no
    draw is left without a case."""
    names, places = np.unique(np.concatenate(groups), return_inverse=True)
    count = len(names)
    drawn = rng.gamma((count - 1) / count, size=(resamples, count)) if count > 1 else np.ones((resamples, 1))
    return [drawn[:, one] for one in np.split(places, np.cumsum([len(one) for one in groups])[:-1])]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values of a family of tests, adjusted after Holm (1979)."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
