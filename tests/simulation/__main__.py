"""``make simulate RUNS=3000``: seeded runs of the simulated fleet with mishaps, and what came of them. ``make fleet``:
fleets of growing size, what planning a pair costs in each and what its estimates are worth."""

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
from scale import busy_fleet

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
    parser.add_argument("runs", type=int, nargs="?", default=0)
    parser.add_argument("--fleet", metavar="JOBS:INPAINTERS[:PAIRS]", action="append", default=[])
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    for size in arguments.fleet:
        told_of_fleet(*map(int, size.split(":")))
    return simulated(arguments.first_seed, arguments.runs) if arguments.runs else 0


def told_of_fleet(jobs: int, inpainters: int, pairs: int | None = None) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        server = start_redis(Path(folder))
        try:
            found = busy_fleet(redis.Redis.from_url(server.url), jobs, inpainters, pairs)
        finally:
            server.stop()
    worth = f"{100 * found.good_estimates:.0f} % of {len(found.ratios)} estimates within 30 %"
    cost = f"{found.calls_per_pair:.1f} store calls a pair"
    size = "8 to 200" if pairs is None else pairs
    print(
        f"{jobs} jobs of {size} pairs, {inpainters} inpainters: {cost}, {worth} ({time.monotonic() - begun:.0f} s)",
        flush=True,
    )


def simulated(first: int, runs: int) -> int:
    """Seeded runs: 1 where any was wrong."""
    last = first + runs
    turns = [range(begin, min(begin + A_TURN, last)) for begin in range(first, last, A_TURN)]
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
            left = (time.monotonic() - begun) / done * (runs - done)
            print(f"{done}/{runs} runs, {right} right, about {left / 60:.0f} min left", flush=True)
    print(f"{right} of {runs} right; {jobs} jobs; mishaps: {dict(mishaps)}; met: {dict(recoveries)}")
    return 0 if right == runs else 1


if __name__ == "__main__":
    sys.exit(main())
