"""What the difference between two arms means: a hierarchical paired bootstrap, and Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
BLOCK = 500  # Resamples that are in memory at once.


@dataclass(frozen=True)
class Gain:
    """Mean difference, its percentile interval, and a two-sided p-value from the same resamples."""

    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Paired:
    """Differences of one draw of the training cases (seeds, cases), and the group of each case (cases,), 0 and up:
    cases of one patient share it."""

    values: NDArray[np.float64]
    group_of: NDArray[np.int_]

    @classmethod
    def of_single_cases(cls, values: NDArray[np.float64]) -> Paired:
        return cls(values, np.arange(values.shape[1]))


def gain(differences: Sequence[Paired], seed: int = 0, level: float = 0.95) -> Gain:
    """Of paired differences, a draw of the training cases each.

    Draws are resampled, and within each its seeds and, crossed with them, its groups of test cases (Davison and Hinkley
    1997, section 3.8; Owen 2007): the cases of one draw share what they were trained on, those of one seed the luck of
    a training, and those of one patient the patient, so cases alone would promise too much. Raises ``ValueError`` where
    there is no difference.
    """
    if not differences or any(draw.values.size == 0 for draw in differences):
        raise ValueError("a gain needs at least one draw, and a case in each")
    rng = np.random.default_rng(seed)
    count = len(differences)
    of_draw = np.stack([_resampled_means(draw, RESAMPLES, count, rng) for draw in differences])
    chosen = rng.integers(count, size=(RESAMPLES, count))
    means = of_draw[chosen, np.arange(RESAMPLES)[:, None], np.arange(count)].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    p = min(1.0, 2 * (beyond * RESAMPLES + 1) / (RESAMPLES + 1))
    return Gain(mean_of(differences), float(low), float(high), float(p))


def mean_of(differences: Sequence[Paired]) -> float:
    """The mean over draws of the mean difference in each."""
    return float(np.mean([draw.values.mean() for draw in differences]))


def _resampled_means(draw: Paired, resamples: int, repeats: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of a draw's values, seeds and groups drawn with replacement: (resamples, repeats)."""
    found = np.empty((resamples, repeats))
    of_seeds, of_groups = len(draw.values), int(draw.group_of.max()) + 1
    for repeat in range(repeats):
        for first in range(0, resamples, BLOCK):
            block = found[first : first + BLOCK, repeat]
            seeds, groups = (rng.multinomial(n, np.full(n, 1 / n), size=len(block)) for n in (of_seeds, of_groups))
            cases = groups[:, draw.group_of]
            block[:] = ((seeds @ draw.values) * cases).sum(axis=1) / (of_seeds * cases.sum(axis=1))
    return found


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values of a family of tests, adjusted after Holm (1979)."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
