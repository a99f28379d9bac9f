"""``make chaos RUNS=40``: the services under fire, run by run, and what came of it."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "science")]

from rig import Rig
from runs import Chaos, write_models


def main() -> int:
    """Prints each run and the sum; 1 where a run broke an invariant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=int)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for logs and data, kept afterwards")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        write_models(folder / "models")
        rig = Rig(folder, folder / "models", arguments.first_seed, {})
        try:
            return _runs(Chaos(rig), range(arguments.first_seed, arguments.first_seed + arguments.runs))
        finally:
            rig.close()


def _runs(chaos: Chaos, seeds: range) -> int:
    print("a quiet day is known", flush=True)
    jobs, right, begun = 0, 0, time.monotonic()
    faults, recoveries = Counter[str](), Counter[str]()
    for done, seed in enumerate(seeds, start=1):
        outcome = chaos.run(seed)
        jobs += outcome.jobs
        faults += outcome.faults
        recoveries += outcome.recoveries
        right += not outcome.wrong
        for fault in outcome.wrong:
            print(fault)
        left = (time.monotonic() - begun) / done * (len(seeds) - done)
        told = "right" if not outcome.wrong else "WRONG"
        print(f"seed {seed}: {told}; {', '.join(outcome.faults)}; about {left / 60:.0f} min left", flush=True)
    print(f"{right} of {len(seeds)} right; {jobs} jobs; faults: {dict(faults)}; recoveries: {dict(recoveries)}")
    return 0 if right == len(seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
