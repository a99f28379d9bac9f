"""A few runs of ``make chaos``, and three kinds of fault at chosen moments."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "science")]

from meddiff.store.keys import JobKeys
from rig import SERVICES, Rig
from runs import ENDS_WITHIN, KINDS, TENANT, WORKERS, Chaos, difference, write_models

RUNS = 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    folder = tmp_path_factory.mktemp("chaos")
    write_models(folder / "models")
    rig = Rig(folder, folder / "models", seed=0, more={})
    try:
        yield Chaos(rig)
    finally:
        rig.close()


def test_under_fire_every_job_ends_as_on_a_quiet_day(chaos: Chaos) -> None:
    assert [fault for seed in range(RUNS) for fault in chaos.run(seed).wrong] == []


def test_a_trainer_killed_twice_loses_no_more_than_the_segments_in_hand(chaos: Chaos) -> None:
    job = chaos.submit("finetune", chaos.finetune(), "killed twice")
    keys = JobKeys(TENANT, job)
    before = {}
    for segment in (1, 2):
        wait_for(chaos, job, keys.done("inpainter", segment))
        chaos.rig.kill("trainer")
        before |= {key: chaos.store.modified(key) for key in chaos.store.list(keys.done_root)}
    chaos.end(job)
    assert difference(chaos.quiet["finetune"], chaos.result("finetune", job)) is None
    assert {key: chaos.store.modified(key) for key in before} == before


def test_a_redis_flushed_three_times_changes_no_pair(chaos: Chaos) -> None:
    job = chaos.submit("generate", chaos.generate(), "flushed")
    for shard in (0, 1, 2):
        wait_for(chaos, job, JobKeys(TENANT, job).done("quality", shard))
        chaos.rig.client().flushall()
    chaos.end(job)
    assert difference(chaos.quiet["generate"], chaos.result("generate", job)) is None
    lines = [line for name in WORKERS for line in chaos.rig.log_lines(name, "task done") if line["job"] == job]
    again = len(lines) - len({(line["stage"], line["shard"]) for line in lines})
    print(f"{again} of {len(lines)} tasks were done twice")
    assert again <= 3 * (len(WORKERS) - 1)  # Each worker's task in hand, but the trainer's.


def test_tasks_delivered_again_while_they_run_change_nothing(chaos: Chaos, tmp_path: Path) -> None:
    """The broker takes every task for lost after a second, and a slow store makes each of the longer ones run for more
    than that on any machine."""
    write_models(tmp_path / "models")
    hasty = {"MEDDIFF_VISIBILITY_TIMEOUT": "1", "MEDDIFF_REDELIVERY_SECONDS": "1"}
    rig = Rig(tmp_path, tmp_path / "models", seed=1, more=hasty)
    rig.to_s3.delay = 0.1
    try:
        found = Chaos(rig).quiet
        again = [line for name in SERVICES for line in rig.log_lines(name, "task delivered again")]
    finally:
        rig.close()
    stages = Counter(str(line["stage"]) for line in again)
    print(f"delivered again: {dict(stages)}")
    assert stages.keys() >= {"inpainter", "inpainting", "segmenter"}
    for kind in KINDS:
        assert difference(chaos.quiet[kind], found[kind]) is None


def wait_for(chaos: Chaos, job: str, key: str) -> None:
    deadline = time.monotonic() + ENDS_WITHIN
    while not chaos.store.exists(key):
        assert time.monotonic() < deadline, f"{key} did not come"
        assert not chaos.ended(job), f"the job ended without {key}"
        time.sleep(0.02)
