"""A job that is cancelled lets go of its worker: told within seconds, and no processor time goes into it any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from meddiff import phantoms
from meddiff.client import Client
from meddiff.contracts.jobs import Job
from meddiff.embedded import stack
from meddiff.store.keys import JobKeys
from meddiff.store.objects import ObjectStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROMISED_SECONDS = 15.0
WATCHED_SECONDS = 4.0
QUICK = {
    "finetuning": {"steps": 6, "segment_steps": 6, "variants": 1, "preview_pairs": 0},
    "mask_generation": {"steps": 10, "segment_steps": 10, "sampling_steps": 4},
    "work": {"shard_size": 4},
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stack.Stack]:
    folder = tmp_path_factory.mktemp("cancel")
    yield stack.up(folder, inpainters=1)
    stack.down(folder)


def processor_seconds(running: stack.Stack, service: str) -> float:
    """Of a service's processes, so far."""
    (process,) = (member.process() for member in running.members if member.name.startswith(service))
    assert process is not None
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def cancelled(running: stack.Stack, client: Client, job: Job, service: str) -> tuple[float, float]:
    """Seconds until the job is cancelled, and the share of a core that its service uses afterwards."""
    begun = time.monotonic()
    client.cancel(job.id)
    assert client.wait(job.id).status == "cancelled"
    seconds = time.monotonic() - begun
    before = processor_seconds(running, service)
    began = time.monotonic()
    while time.monotonic() - began < WATCHED_SECONDS:
        time.sleep(0.1)
    return seconds, (processor_seconds(running, service) - before) / (time.monotonic() - began)


def steps_done(client: Client, job: Job) -> int:
    progress = client.job(job.id).progress
    return progress.done if progress is not None else 0


def test_a_cancelled_job_frees_its_worker(running: stack.Stack, tmp_path: Path) -> None:
    phantoms.write(tmp_path, pairs=12, backgrounds=2)
    store = ObjectStore.from_settings(running.settings)
    with Client(running.address) as client:
        dataset = client.upload(tmp_path).id
        endless = {**QUICK, "finetuning": {**QUICK["finetuning"], "steps": 100_000, "segment_steps": 50_000}}
        tuning = client.finetune(dataset, override=endless)
        keys = JobKeys("local", tuning.id)
        wait_for(lambda: store.exists(keys.done("calibrate", 0)) and steps_done(client, tuning) >= 3)
        seconds, share = cancelled(running, client, tuning, "trainer")
        assert seconds < PROMISED_SECONDS
        assert share < 0.3
        tuned = client.wait(client.finetune(dataset, name="quick", override=QUICK).id)
        assert tuned.status == "succeeded", tuned.problem
        painting = client.generate("quick", 20_000, override={"inpainting": {"solver_steps": 400}})
        wait_for(lambda: store.exists(JobKeys("local", painting.id).started("inpainting", 0)))
        seconds, share = cancelled(running, client, painting, "inpainter")
        assert seconds < PROMISED_SECONDS
        assert share < 0.3
