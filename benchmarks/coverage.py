"""How often the intervals of an evaluation hold the truth, where the truth is known: simulated gains of zero.

python -m benchmarks.coverage

The spreads are those of the rows of ``docs/experiments``, in points of Dice: between cases 5, of a case in a run 7, and
between seeds and between draws as each line says.
"""

from __future__ import annotations

import numpy as np
from meddiff.science.evaluation.comparison import Paired, gain

REPEATS = 400
OF_CASES, OF_A_CASE_IN_A_RUN = 5.0, 7.0
SHAPES = (  # Draws, seeds, cases, spread between draws, spread between seeds.
    (1, 3, 39, 0.0, 1.5),
    (1, 4, 40, 0.0, 1.0),
    (3, 4, 15, 0.5, 1.5),
    (3, 4, 40, 0.5, 1.0),
    (3, 4, 40, 1.0, 1.5),
    (3, 4, 60, 1.5, 1.0),
    (5, 4, 6, 0.5, 1.5),
)


def main() -> None:
    rng = np.random.default_rng(0)
    print("draws, seeds, cases | between draws, between seeds | held, width")
    for draws, seeds, cases, of_draws, of_seeds in SHAPES:
        found = []
        for _ in range(REPEATS):
            differences = [
                rng.normal(0, of_draws)
                + rng.normal(0, of_seeds, (seeds, 1))
                + rng.normal(0, OF_CASES, cases)
                + rng.normal(0, OF_A_CASE_IN_A_RUN, (seeds, cases))
                for _ in range(draws)
            ]
            found.append(gain([Paired.of_single_cases(draw) for draw in differences]))
        held = np.mean([one.low <= 0 <= one.high for one in found])
        width = np.mean([one.high - one.low for one in found])
        print(f"{draws}, {seeds}, {cases} | {of_draws}, {of_seeds} | {held:.3f}, {width:.1f}", flush=True)


if __name__ == "__main__":
    main()
