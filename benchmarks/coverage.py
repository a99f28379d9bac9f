"""How often the intervals of an evaluation hold the truth, where the truth is known: simulated gains of zero.

python -m benchmarks.coverage

The spreads are those of the rows of ``docs/experiments``, in points of Dice: between cases 5, of a case in a run 7, and
between seeds and between draws as each line says. Draws test cases from one pool, so some of them in several draws.
"""

from __future__ import annotations

import numpy as np
from meddiff.science.evaluation.comparison import Paired, gain

REPEATS = 400
OF_CASES, OF_A_CASE_IN_A_RUN = 5.0, 7.0
SHAPES = (  # Draws, seeds, cases, pool of cases, spread between draws, spread between seeds.
    (1, 2, 6, 6, 0.0, 1.0),
    (1, 2, 30, 30, 0.0, 2.0),
    (1, 2, 100, 100, 0.0, 1.0),
    (1, 2, 100, 100, 0.0, 2.5),
    (1, 4, 100, 100, 0.0, 2.5),
    (1, 4, 100, 100, 0.5, 1.0),  # The spread between draws cannot show in one: the interval is of this draw alone.
    (1, 3, 39, 39, 0.0, 1.5),
    (1, 4, 40, 40, 0.0, 1.0),
    (3, 4, 15, 1000, 0.5, 1.5),
    (3, 4, 40, 1000, 0.5, 1.0),
    (3, 4, 40, 70, 0.5, 1.0),
    (3, 4, 60, 100, 0.0, 0.5),
    (3, 4, 40, 1000, 1.0, 1.5),
    (3, 4, 60, 1000, 1.5, 1.0),
    (3, 4, 100, 1000, 2.0, 1.0),
    (5, 4, 6, 30, 0.5, 1.5),
)


def simulated(
    rng: np.random.Generator, draws: int, seeds: int, cases: int, pool: int, of_draws: float, of_seeds: float
) -> list[Paired]:
    """Differences of which the mean is zero; a case's own part is the same in every draw that tests it."""
    own = rng.normal(0, OF_CASES, pool)
    found = []
    for _ in range(draws):
        tested = rng.choice(pool, cases, replace=False)
        luck = rng.normal(0, of_draws) + rng.normal(0, of_seeds, (seeds, 1))
        found.append(Paired(luck + own[tested] + rng.normal(0, OF_A_CASE_IN_A_RUN, (seeds, cases)), tested))
    return found


def main() -> None:
    rng = np.random.default_rng(0)
    print("draws, seeds, cases, pool | between draws, between seeds | held, width")
    for shape in SHAPES:
        found = [gain(simulated(rng, *shape)) for _ in range(REPEATS)]
        held = np.mean([one.low <= 0 <= one.high for one in found])
        width = np.mean([one.high - one.low for one in found])
        print(f"{', '.join(map(str, shape[:4]))} | {shape[4]}, {shape[5]} | {held:.3f}, {width:.1f}", flush=True)


if __name__ == "__main__":
    main()
