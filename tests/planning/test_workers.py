"""Real worker processes on a real Redis and a real S3 server, with stages that do next to nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobspecs import finetune, generate, imported, scored, small
from meddiff.contracts.jobs import End, FinetuneSpec, Spec
from meddiff.contracts.tasks import QUEUE_OF, Marker, Task, TaskFault
from meddiff.embedded.servers import start_redis
from meddiff.planning.dispatch import active_jobs, advance, cancel, finish, submit, sweep
from meddiff.planning.jobs import read_job
from meddiff.planning.leases import Leases
from meddiff.planning.plan import Ending, finetune_steps
from meddiff.planning.queues import Sender, celery_app
from meddiff.planning.selection import Entry, Tally, budget, fold, is_full
from meddiff.settings import Settings
from meddiff.store.keys import JobKeys, active
from meddiff.store.objects import NotFound, ObjectStore

QUEUES = sorted(set(QUEUE_OF.values()))
JOBS = [f"0197f000-0000-7000-8000-00000000000{n}" for n in range(6)]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"lease_seconds": 3.0})


@pytest.fixture
def leases(settings: Settings) -> Leases:
    return Leases.connect(settings.redis_url, settings.lease_seconds)


class Cluster:
    """Workers, and the sweep that the gateway would do."""

    def __init__(self, settings: Settings, store: ObjectStore, leases: Leases, folder: Path) -> None:
        self.store, self.leases = store, leases
        self._settings, self._folder = settings, folder
        self._send = Sender(celery_app(settings))
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_worker(
        self, *queues: str, stages: str = "trivial_stages", task_seconds: int = 600
    ) -> subprocess.Popen[bytes]:
        here = Path(__file__).parent
        s = self._settings
        environment = os.environ | {
            "PYTHONPATH": str(here),
            "MEDDIFF_REDIS_URL": s.redis_url,
            "MEDDIFF_S3_ENDPOINT": s.s3_endpoint,
            "MEDDIFF_S3_ACCESS_KEY": s.s3_access_key.get_secret_value(),
            "MEDDIFF_S3_SECRET_KEY": s.s3_secret_key.get_secret_value(),
            "MEDDIFF_S3_BUCKET": s.s3_bucket,
            "MEDDIFF_SCRATCH": str(s.scratch),
            "MEDDIFF_LEASE_SECONDS": str(s.lease_seconds),
            "MEDDIFF_TASK_SECONDS": str(task_seconds),
            "MEDDIFF_FAULT_PAUSE_SECONDS": "0.2",
            "TMPDIR": str(self._folder),  # What a killed worker leaves.
        }
        with (self._folder / f"worker{len(self.workers)}.log").open("wb") as out:
            worker = subprocess.Popen(
                [sys.executable, str(here / "serve.py"), stages, *(queues or QUEUES)],
                env=environment,
                stdout=out,
                stderr=out,
            )
        self.workers.append(worker)
        return worker

    def submit(self, spec: Spec) -> JobKeys:
        keys = JobKeys(spec.tenant, spec.id)
        self.store.put_json(keys.spec, spec)
        self.store.put(active(spec.tenant, spec.id), b"")
        return keys

    def until(self, condition: Callable[[], Any], seconds: float = 40.0) -> Any:
        """What ``condition`` gives once it is true, sweeping meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            sweep(self.store, self.leases, self._send, "test")
            if result := condition():
                return result
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s:\n{self.logs()}")

    def end_of(self, keys: JobKeys) -> End | None:
        try:
            return self.store.get_json(keys.end, End)
        except NotFound:
            return None

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self._folder.glob("worker*.log")))

    def stop(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in self.workers:
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


@pytest.fixture
def cluster(settings: Settings, store: ObjectStore, leases: Leases, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(settings, store, leases, tmp_path)
    yield cluster
    cluster.stop()


def markers(store: ObjectStore, keys: JobKeys) -> dict[tuple[str, int], Any]:
    found = [store.get_json(key, Marker) for key in store.list(keys.done_root)]
    return {(marker.stage, marker.shard): marker.output for marker in found}


def running_on(leases: Leases, worker: subprocess.Popen[bytes]) -> Callable[[], bool]:
    return lambda: any(f"-{worker.pid}@" in holder for holder in _holders(leases).values())


def test_a_job_waits_for_those_of_its_tenant_that_come_before_it(cluster: Cluster) -> None:
    """An urgent one comes before older ones, and other tenants' jobs take turns with it."""
    store, leases = cluster.store, cluster.leases
    urgent = finetune(job_id=JOBS[3])
    urgent = urgent.model_copy(update={"request": urgent.request.model_copy(update={"priority": "high"})})
    elsewhere = finetune(job_id=JOBS[0]).model_copy(update={"tenant": "another"})
    for spec in (elsewhere, finetune(job_id=JOBS[1]), finetune(job_id=JOBS[2]), urgent):
        cluster.submit(spec)
        advance(store, leases, lambda task: None, spec.tenant, spec.id)
    positions = {job: read_job(store, leases, "local", job).queue_position for job in JOBS[1:4]}
    assert positions == {JOBS[1]: 2, JOBS[2]: 3, JOBS[3]: 1}


def test_both_kinds_of_job_survive_a_killed_worker_and_a_flush(cluster: Cluster) -> None:
    store, leases = cluster.store, cluster.leases
    trained, made = finetune(job_id=JOBS[0]), generate(24, start_index=40, job_id=JOBS[1])
    first, second = cluster.submit(trained), cluster.submit(made)
    assert read_job(store, leases, "local", JOBS[0]).status == "queued"
    assert read_job(store, leases, "local", JOBS[1]).queue_position == 2
    victim = cluster.start_worker()
    cluster.start_worker()
    cluster.until(running_on(leases, victim))
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    cluster.start_worker()
    cluster.until(lambda: store.exists(second.done("quality", 1)))
    leases.client.flushall()
    ends = cluster.until(lambda: (a, b) if (a := cluster.end_of(first)) and (b := cluster.end_of(second)) else None)

    assert [end.status for end in ends] == ["succeeded", "succeeded"]
    steps = finetune_steps(trained.recipe, imported())
    expected = {(step.stage, shard) for step in steps for shard in range(step.shards)} | {("import", 0)}
    assert set(markers(store, first)) == expected
    tally = Tally()
    while not is_full(tally, made) and tally.shards < budget(made):
        tally = fold(tally, [[Entry.model_validate(c) for c in scored(made, tally.shards)]], made)
    assert ends[1].result == {"accepted": 24, "requested": 24, "next_start_index": 40 + tally.judged}
    cluster.until(lambda: active_jobs(store) == [])
    for spec in (trained, made):
        job = read_job(store, leases, "local", spec.id)
        assert job.status == "succeeded"
        assert job.progress is not None
        assert job.progress.done == job.progress.total
        assert job.started_at is not None
        assert job.created_at <= job.started_at <= (job.finished_at or job.started_at)


def test_workers_outlive_a_redis_that_starts_anew(settings: Settings, store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    first = start_redis(tmp_path / "redis")
    mine = settings.model_copy(update={"redis_url": first.url})
    leases = Leases.connect(first.url, settings.lease_seconds)
    cluster = Cluster(mine, store, leases, tmp_path)
    second = None
    try:
        worker = cluster.start_worker()
        before = cluster.submit(finetune(job_id=JOBS[0]))
        cluster.until(lambda: store.exists(before.done("cache", 0)))
        first.stop()
        second = start_redis(tmp_path / "redis", int(first.url.rpartition(":")[2].partition("/")[0]))
        after = cluster.submit(generate(8, job_id=JOBS[1]))
        cluster.until(lambda: cluster.end_of(before) and cluster.end_of(after), 90)
        assert worker.poll() is None
    finally:
        cluster.stop()
        (second or first).stop()


def test_a_problem_ends_the_job_at_once(cluster: Cluster) -> None:
    cluster.start_worker("datasets")
    spec = _with_metadata(finetune(job_id=JOBS[0]), fault="import")
    keys = cluster.submit(spec)
    end = cluster.until(lambda: cluster.end_of(keys))
    assert end.status == "failed"
    assert end.problem.type.endswith("invalid-dataset")
    assert [fault.pointer for fault in end.problem.errors] == ["a.png"]
    assert markers(cluster.store, keys) == {}


def test_poison_ends_the_job_after_three_tries_and_tells_nothing_of_the_data(cluster: Cluster) -> None:
    cluster.start_worker()
    keys = cluster.submit(_with_metadata(finetune(job_id=JOBS[0]), fault="inpainter"))
    end = cluster.until(lambda: cluster.end_of(keys))
    assert end.status == "failed"
    assert end.problem.type.endswith("task-failed")
    assert "Shard 0 of stage inpainter" in end.problem.detail
    assert len(list(cluster.store.list(keys.faults("inpainter", 0)))) == 3
    stored = b"".join(cluster.store.get(key) for key in cluster.store.list(keys.faults_root))
    assert b"user's data" not in stored + cluster.store.get(keys.end)
    assert "user's data" not in cluster.logs()


def test_cancel_takes_effect_at_the_next_step(cluster: Cluster) -> None:
    worker = cluster.start_worker()
    keys = cluster.submit(_with_metadata(finetune(job_id=JOBS[0]), endless="inpainter"))
    held = _lease_of("inpainter", cluster.leases)
    cluster.until(lambda: f"-{worker.pid}@" in held())
    cancel(cluster.store, "local", JOBS[0], datetime.now(UTC))
    assert read_job(cluster.store, cluster.leases, "local", JOBS[0]).status in ("cancelling", "cancelled")
    end = cluster.until(lambda: cluster.end_of(keys), 10)
    assert end.status == "cancelled"
    assert not cluster.leases.runs("local", JOBS[0])
    assert not cluster.store.exists(keys.done("inpainter", 0))


def test_a_child_whose_parent_has_ended_is_cancelled(cluster: Cluster) -> None:
    cluster.start_worker()
    parent, child = finetune(job_id=JOBS[0]), finetune(job_id=JOBS[1]).model_copy(update={"parent": JOBS[0]})
    finish(cluster.store, parent, Ending("failed"))
    keys = cluster.submit(child)
    assert cluster.until(lambda: cluster.end_of(keys)).status == "cancelled"


def test_a_child_that_a_worker_has_ended_is_known_to_its_parent_at_once(store: ObjectStore, leases: Leases) -> None:
    child = finetune(job_id=JOBS[1]).model_copy(update={"parent": JOBS[0]})
    submit(store, child)
    leases.look_later("local", JOBS[0])
    finish(store, child, Ending("failed"))
    assert leases.late() == []
    advance(store, leases, lambda task: None, "local", child.id)
    assert leases.late() == [("local", JOBS[0])]


def test_a_leaving_worker_stops_at_the_next_step_and_another_takes_up_the_task(cluster: Cluster) -> None:
    leaving = cluster.start_worker()
    cluster.submit(_with_metadata(finetune(job_id=JOBS[0]), endless="inpainter"))
    held = _lease_of("inpainter", cluster.leases)
    cluster.until(lambda: f"-{leaving.pid}@" in held())
    staying = cluster.start_worker()
    began = time.monotonic()
    leaving.terminate()
    assert leaving.wait(10) == 0
    cluster.until(lambda: f"-{staying.pid}@" in held())
    assert time.monotonic() - began < 10


def test_a_child_killed_alone_is_replaced_and_its_task_taken_up_again(cluster: Cluster) -> None:
    worker = cluster.start_worker()
    cluster.submit(_with_metadata(finetune(job_id=JOBS[0]), endless="inpainter"))
    held = _lease_of("inpainter", cluster.leases)
    first = cluster.until(lambda: holder if f"-{worker.pid}@" in (holder := held()) else "")
    for child in psutil.Process(worker.pid).children():
        child.kill()
    cluster.until(lambda: f"-{worker.pid}@" in (holder := held()) and holder != first)


def test_a_task_that_always_kills_its_process_ends_its_job(cluster: Cluster) -> None:
    cluster.start_worker()
    keys = cluster.submit(_with_metadata(finetune(job_id=JOBS[0]), killed="inpainter"))
    end = cluster.until(lambda: cluster.end_of(keys), 150)
    assert end.problem.type.endswith("task-failed")
    assert "want of memory" in end.problem.detail


def test_a_task_that_hangs_is_ended_and_that_is_not_forgotten(cluster: Cluster) -> None:
    cluster.start_worker(task_seconds=6)
    keys = cluster.submit(_with_metadata(finetune(job_id=JOBS[0]), hangs="inpainter"))
    fault = cluster.until(lambda: next(iter(cluster.store.list(keys.faults("inpainter", 0))), None), 90)
    assert "ended from outside" in cluster.store.get_json(fault, TaskFault).error


def test_a_worker_that_cannot_import_its_stages_never_counts_and_leaves(cluster: Cluster) -> None:
    worker = cluster.start_worker("masks", stages="no_such_module")
    assert worker.wait(30) == 0
    assert set(cluster.leases.workers().values()) == {0}
    assert "no_such_module" in cluster.logs()


def test_progress_and_estimate_while_it_trains(cluster: Cluster) -> None:
    cluster.start_worker()
    recipe = small(finetuning={"steps": 400, "segment_steps": 10})
    cluster.submit(finetune(recipe, job_id=JOBS[0]))
    job = cluster.until(
        lambda: found if (found := read_job(cluster.store, cluster.leases, "local", JOBS[0])).eta_seconds else None
    )
    assert job.status == "running"
    assert job.progress is not None
    assert job.progress.total == 405
    assert job.progress.unit == "steps"
    assert job.queue_position is None


def test_queues_stay_shallow(cluster: Cluster) -> None:
    """Without a worker one task a queue is in flight, however much is due and however often it is planned."""
    for n in range(4):
        cluster.submit(generate(100, job_id=JOBS[n]))
    seen: list[int] = []
    cluster.until(lambda: seen.append(cluster.leases.in_flight("masks")) or len(seen) == 8)
    assert set(seen) == {1}
    time.sleep(cluster.leases.seconds)  # The lease of the waiting message runs out: it is not sent again.
    cluster.until(lambda: seen.append(cluster.leases.in_flight("masks")) or len(seen) == 12)
    assert cluster.leases.backlog("masks") == 1


def test_one_runs_a_task_at_a_time(leases: Leases) -> None:
    task = Task(tenant="local", job_id=JOBS[0], stage="masks", shard=3)
    assert leases.reserve([task]) == (task, False)
    assert leases.reserve([task]) == (None, False)
    assert leases.take(task, "a")
    assert not leases.take(task, "b")
    assert leases.take(task, "a"), "taking again renews"
    leases.release(task, "b")
    assert leases.running_of("local", JOBS[0]) == [("masks", 3)]
    leases.client.flushall()
    assert leases.take(task, "a"), "a flush takes nothing from who still works"
    assert not leases.take(task, "b")
    leases.release(task, "a")
    assert (leases.in_flight("masks"), leases.runs("local", JOBS[0])) == (0, False)


def test_of_several_tasks_the_first_free_one_is_reserved(leases: Leases) -> None:
    tasks = [Task(tenant="local", job_id=JOBS[0], stage="masks", shard=n) for n in range(1201)]
    assert leases.reserve(tasks) == (tasks[0], True)
    assert leases.take(tasks[1], "a")
    assert leases.reserve(tasks[:3]) == (tasks[2], False)
    for task in tasks[:1200]:
        leases.take(task, "a")
    assert leases.reserve(tasks) == (tasks[1200], False)
    assert leases.in_flight("masks") == 1201


def test_what_ran_out_is_told_once(settings: Settings, leases: Leases) -> None:
    brief = Leases(leases.client, 0.05)
    sent, run = (Task(tenant="local", job_id=JOBS[n], stage="masks", shard=0) for n in range(2))
    brief.reserve([sent])
    brief.take(run, "a")
    _wait(lambda: leases.in_flight("masks") == 0)
    assert leases.expired() == [("local", JOBS[0]), ("local", JOBS[1])]
    assert leases.expired() == []
    assert leases.reserve([sent]) == (sent, False)


def test_one_leader_sweeps(leases: Leases) -> None:
    assert leases.lead("a", 5)
    assert not leases.lead("b", 5)
    assert leases.lead("a", 0.05)
    _wait(lambda: leases.lead("b", 5))
    assert not leases.lead("a", 5)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _with_metadata(spec: FinetuneSpec, **metadata: str) -> FinetuneSpec:
    return spec.model_copy(update={"request": spec.request.model_copy(update={"metadata": metadata})})


def _lease_of(stage: str, leases: Leases) -> Callable[[], str]:
    return lambda: next((holder for task, holder in _holders(leases).items() if f"/{stage}/" in task), "")


def _holders(leases: Leases) -> dict[str, str]:
    """Who runs which task."""
    found = (leases.client.hgetall(f"holders:{queue}") for queue in QUEUES)
    return {task.decode(): holder.decode() for of_queue in found for task, holder in of_queue.items()}
