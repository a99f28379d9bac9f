"""``make simulate RUNS=3000``: seeded runs of the simulated fleet with mishaps, and what came of them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "planning")]

import redis
import structlog
from chaos import Outcome, chaotic_run
from meddiff.embedded.servers import start_redis

A_TURN = 25  # Runs that a process does on one Redis.


def some_runs(seeds: range) -> list[Outcome]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        server = start_redis(Path(folder))
        try:
            for seed in seeds:
                try:
                    found.append(chaotic_run(redis.Redis.from_url(server.url), seed))
                except Exception as error:
                    found.append(Outcome(wrong=[f"seed {seed}: {type(error).__name__}: {error}"]))
        finally:
            server.stop()
    return found


def main() -> int:
    """Prints progress and the sum; 1 where a run broke an invariant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=int)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    last = arguments.first_seed + arguments.runs
    turns = [range(first, min(first + A_TURN, last)) for first in range(arguments.first_seed, last, A_TURN)]
    begun, done = time.monotonic(), 0
    jobs, mishaps, recoveries, right = 0, Counter[str](), Counter[str](), 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for outcomes in pool.map(some_runs, turns):
            for outcome in outcomes:
                jobs += outcome.jobs
                mishaps += outcome.mishaps
                recoveries += outcome.recoveries
                right += not outcome.wrong
                for fault in outcome.wrong:
                    print(fault)
            done += len(outcomes)
            left = (time.monotonic() - begun) / done * (arguments.runs - done)
            print(f"{done}/{arguments.runs} runs, {right} right, about {left / 60:.0f} min left", flush=True)
    print(f"{right} of {arguments.runs} right; {jobs} jobs; mishaps: {dict(mishaps)}; met: {dict(recoveries)}")
    return 0 if right == arguments.runs else 1


if __name__ == "__main__":
    sys.exit(main())
