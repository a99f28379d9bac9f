"""The shell around every task: takes the lease, runs the stage, leaves the marker, and plans the job again.

A service is a module with ``STAGES: dict[Stage, Callable[[Work], Outcome]]`` and a ``__main__`` that calls ``main``. A
stage reads objects, calls the science and writes objects; running it twice writes the same objects twice.
"""

from __future__ import annotations

import importlib
import mmap
import os
import shutil
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args
from uuid import uuid4

import celery
import structlog
from celery import signals
from kombu.exceptions import OperationalError
from meddiff import metrics
from meddiff.contracts.jobs import Spec
from meddiff.contracts.problems import ProblemError
from meddiff.contracts.tasks import KILLED, STORE_FAULT, Marker, Queue, Stage, Task, TaskFault
from meddiff.planning.dispatch import SOON, advance, fill, finish
from meddiff.planning.leases import Leases, Live
from meddiff.planning.observe import read_marker, read_spec
from meddiff.planning.plan import Ending
from meddiff.planning.queues import RUN, Sender, celery_app
from meddiff.settings import Settings
from meddiff.store.keys import JobKeys, ModelKeys
from meddiff.store.objects import NotFound, ObjectStore, StoreError, StoreUnavailable
from meddiff.telemetry import configure_logs
from prometheus_client import start_http_server
from redis import RedisError
from threadpoolctl import threadpool_limits

HEARTBEAT_SECONDS = 3.0
READY_CHECK_SECONDS = 0.1
REPORT_SECONDS = 1.0
STOP_CHECK_SECONDS = 1.0
KEPT_MODELS = 4
KEPT_CHECKPOINTS = 2
CHECKPOINT_IN_USE = 900.0  # Seconds; a worker beside this one, on the same disk, may still be uploading it.
LONGEST_PAUSE = 300.0  # Seconds before a task that failed is sent again,
STORE_PAUSE = 60.0  # or one that the store did not let work, longer each time.
LONGEST_STORE_PAUSE = 4 * 3600.0
REDIS_SECONDS = 1.0  # Between attempts to renew a lease while Redis is away.

Result = Literal["done", "dropped", "stopped", "failed", "fault", "unavailable"]

# Bytes shared by parent and child. The parent sets one on SIGTERM: the task stops at the next step, and another worker
# takes it up. The child sets the other once it has imported its stages.
_leaving = mmap.mmap(-1, 1)
_ready = mmap.mmap(-1, 1)

log = structlog.get_logger()


class Stopped(Exception):
    """The task lets go: its job has ended, its lease is another's, or the worker is leaving."""


@dataclass(frozen=True)
class Outcome:
    """What a stage did: ``units`` (steps, candidates, cases) for the speed, and ``output`` for the marker, a function
    of the job's spec and the fingerprint alone."""

    units: int
    output: Mapping[str, Any] = field(default_factory=dict)


StageFunction = Callable[["Work"], Outcome]


class Work:
    """A task in hand: everything its stage may ask for."""

    def __init__(
        self, task: Task, spec: Any, store: ObjectStore, leases: Leases, settings: Settings, lease: _Lease
    ) -> None:
        self.spec = spec
        self.store = store
        self.settings = settings
        self.tenant = task.tenant
        self.stage = task.stage
        self.shard = task.shard
        self.keys = JobKeys(task.tenant, task.job_id)
        self.log = structlog.get_logger()
        self._task = task
        self._leases = leases
        self._lease = lease
        self._since = time.time()
        self._reported = 0.0
        self._checked = 0.0
        self._ended = False

    @cached_property
    def scratch(self) -> Path:
        """The job's folder on this machine's disk; it outlives the task and may vanish between two."""
        folder = self.settings.scratch / "jobs" / self.tenant / self._task.job_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def model_scratch(self) -> Path:
        """The folder on this machine's disk where files of the job's model lie."""
        return self.settings.scratch / "models" / self.tenant / str(self.spec.model_id)

    def marker(self, stage: Stage, shard: int) -> Marker:
        """The marker of a task this one builds on. Raises ``NotFound``."""
        return read_marker(self.store, self.tenant, self._task.job_id, stage, shard)

    def markers(self, stage: Stage) -> list[Marker]:
        """Every marker of a stage, in order of shards."""
        return [self.store.get_json(key, Marker) for key in self.store.list(f"{self.keys.done_root}{stage}/")]

    def progress(self, done: int, total: int, unit: str, **info: float | int | str) -> None:
        """Tells how far the task is, at most once a second; whether anyone hears it makes no difference. Raises
        ``Stopped`` where the task is to let go."""
        self.raise_if_stopped()
        self.tell(done, total, unit, **info)

    def tell(self, done: int, total: int, unit: str, **info: float | int | str) -> None:
        """``progress`` of a stage that asks ``should_stop`` by itself, for it has something to leave behind."""
        now = time.monotonic()
        if now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        live = Live(
            stage=self.stage, shard=self.shard, done=done, total=total, unit=unit, since=self._since, now=time.time(),
            info=info,
        )  # fmt: skip
        try:
            self._leases.report(self._task, live)
        except RedisError:
            self.log.debug("progress not reported")

    @property
    def leaving(self) -> bool:
        """Whether the worker was asked to leave while the task is still its own."""
        return _leaving[0] != 0 and not self._lease.lost and not self._ended

    def should_stop(self) -> bool:
        """Whether to let go at this step; cheap enough to be asked at every one. The store is asked once a second."""
        if _leaving[0] != 0 or self._lease.lost:
            return True
        now = time.monotonic()
        if not self._ended and now - self._checked >= STOP_CHECK_SECONDS:
            self._checked = now
            with suppress(StoreUnavailable):  # To work on it need not be there.
                self._look()
        return self._ended

    def _look(self) -> None:
        present = self.store.children(f"{self.keys.root}/")
        self._ended = "end.json" in present or "cancel.json" in present

    def raise_if_stopped(self) -> None:
        """Raises ``Stopped`` where ``should_stop``."""
        if self.should_stop():
            raise Stopped

    def raise_if_ended(self) -> None:
        """``raise_if_stopped`` that asks the store now: before something becomes visible to others."""
        self._look()
        self.raise_if_stopped()


class _Lease:
    """A running task's lease, renewed in the background until the ``with`` block is left."""

    def __init__(self, leases: Leases, task: Task, token: str) -> None:
        self.lost = False
        self._leases, self._task, self._token = leases, task, token
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> _Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()
        try:
            self._leases.release(self._task, self._token)
        except RedisError:
            log.debug("lease left to expire")

    def _renew(self) -> None:
        pause = self._leases.seconds / 3
        while not self._left.wait(pause):
            try:
                kept = self._leases.take(self._task, self._token)
            except RedisError:  # It may come back without its memory: the lease has to be there before the sweep looks.
                pause = min(REDIS_SECONDS, self._leases.seconds / 3)
                continue
            pause = self._leases.seconds / 3
            if not kept:
                metrics.LEASES_LOST.labels(self._task.stage).inc()
                self.lost = True
                return


class Worker:
    """Runs tasks one at a time. ``stages`` is the import path of the service's tasks, imported at its first use, so
    that torch lives in the process that works."""

    def __init__(self, settings: Settings, stages: str, name: str, send: Callable[[Task], None]) -> None:
        self.settings = settings
        self.name = name
        self._stages = stages
        self._send = send
        self._job_id = ""

    @cached_property
    def store(self) -> ObjectStore:
        return ObjectStore.from_settings(self.settings)

    @cached_property
    def leases(self) -> Leases:
        s = self.settings
        return Leases.connect(s.redis_url, s.lease_seconds, s.tenant_weights)

    @cached_property
    def stages(self) -> Mapping[Stage, StageFunction]:
        found: Mapping[Stage, StageFunction] = importlib.import_module(self._stages).STAGES
        return found

    def run(self, task: Task) -> Result:
        """Runs ``task``, unless it needs none: its job has ended, its marker exists, another worker runs it.

        Never raises for what goes wrong in a stage: a ``ProblemError`` ends the job, anything else leaves a fault
        record, so does a run before this one whose process was killed, and what is merely out of reach is left to be
        sent again.
        """
        started = time.monotonic()
        structlog.contextvars.bind_contextvars(tenant=task.tenant, job=task.job_id, stage=task.stage, shard=task.shard)
        try:
            self._tidy(task.job_id)
            result = self._run(task)
            if result == "fault":
                self.leases.look_after(task.tenant, task.job_id, SOON)
                fill(self.store, self.leases, self._send, {task.queue})
            else:
                advance(self.store, self.leases, self._send, task.tenant, task.job_id, freed={task.queue})
        except (StoreError, RedisError, OperationalError) as error:
            self._look_soon(task)
            result = "unavailable"
            log.warning("left to be sent again", error=type(error).__name__)
        except Exception as error:  # Before or after the stage: a record that this version cannot read.
            self._look_soon(task)
            result = "unavailable"
            log.error("left to be sent again", error=type(error).__name__, trace=_places(error))
        finally:
            structlog.contextvars.clear_contextvars()
        metrics.TASK_SECONDS.labels(task.stage, result).observe(time.monotonic() - started)
        return result

    def _look_soon(self, task: Task) -> None:
        with suppress(RedisError):  # Else the sweep finds the lease run out, or nothing known of the job.
            self.leases.look_after(task.tenant, task.job_id, SOON)

    def _run(self, task: Task) -> Result:
        keys = JobKeys(task.tenant, task.job_id)
        try:
            spec = read_spec(self.store, task.tenant, task.job_id)
        except NotFound:
            return "dropped"
        structlog.contextvars.bind_contextvars(trace=spec.trace_id)
        if any(self.store.exists(key) for key in (keys.end, keys.cancel, keys.done(task.stage, task.shard))):
            self.leases.release(task)
            return "dropped"
        token = f"{self.name}/{uuid4().hex}"
        if not self.leases.take(task, token):
            return "dropped"
        with _Lease(self.leases, task, token) as lease:
            if self.store.exists(started := keys.started(task.stage, task.shard)):
                self.store.delete([started])
                self._put_fault(task, KILLED)
                return "fault"
            self.store.put(started, token.encode())
            # Killed, a task leaves neither way; ended by its time limit it leaves by SystemExit: its record stays.
            try:
                result = self._attempt(task, spec, lease)
            except Exception:
                self._forget(started, lease)
                raise
            self._forget(started, lease)
            return result

    def _forget(self, started: str, lease: _Lease) -> None:
        if not lease.lost:  # Else the record is another's by now.
            self.store.delete([started])

    def _attempt(self, task: Task, spec: Spec, lease: _Lease) -> Result:
        work = Work(task, spec, self.store, self.leases, self.settings, lease)
        started = time.monotonic()
        work.tell(0, 0, "")
        try:
            try:
                outcome = self.stages[task.stage](work)
            finally:
                seconds = time.monotonic() - started
                self._charge(task, seconds)
            marker = Marker(
                stage=task.stage,
                shard=task.shard,
                units=outcome.units,
                seconds=seconds,
                worker=self.name,
                output=dict(outcome.output),
            )
            self.store.put_json(work.keys.done(task.stage, task.shard), marker)
            self.leases.learn(task.stage, seconds)
        except Stopped:
            log.info("task stopped")
            return "stopped"
        except ProblemError as error:
            log.info("job failed", problem=error.problem.type)
            finish(self.store, spec, Ending("failed", problem=error.problem))
            return "failed"
        except StoreUnavailable:
            self.store.ping()  # It is there, and does not give or take one object: seldom a fault of the task's.
            log.error("task failed", error=STORE_FAULT)
            self.leases.pause(task, STORE_PAUSE)
            earlier = self._put_fault(task, STORE_FAULT)
            self.leases.pause(task, min(STORE_PAUSE * 3**earlier, LONGEST_STORE_PAUSE))
            return "fault"
        except RedisError:
            raise
        except Exception as error:
            self._record(task, error)
            return "fault"
        log.info("task done", units=outcome.units, seconds=round(seconds, 3))
        return "done"

    def _charge(self, task: Task, seconds: float) -> None:
        """What the task took is its tenant's, however it ended."""
        with suppress(RedisError):
            self.leases.correct(task.queue, task.tenant, seconds - self.leases.seconds_of(task.stage))

    def _tidy(self, job_id: str) -> None:
        """``tidy`` whenever the work turns to another job."""
        if job_id != self._job_id:
            self._job_id = job_id
            with suppress(OSError):  # Another process of this machine may tidy as well.
                tidy(self.settings.scratch, self.store)

    def _record(self, task: Task, error: Exception) -> None:
        """A fault record: the kind of error and where it arose, none of the data it arose from."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} in {where.name}, {Path(where.filename).name}:{where.lineno}"
        log.error("task failed", error=what, trace=_places(error))
        earlier = self._put_fault(task, what)
        self.leases.pause(task, min(self.settings.fault_pause_seconds * 4**earlier, LONGEST_PAUSE))

    def _put_fault(self, task: Task, what: str) -> int:
        """Says how many there were before."""
        keys = JobKeys(task.tenant, task.job_id)
        n = sum(1 for _ in self.store.list(keys.faults(task.stage, task.shard)))
        fault = TaskFault(stage=task.stage, shard=task.shard, error=what, worker=self.name)
        self.store.put_json(keys.fault(task.stage, task.shard, n), fault)
        return n


def tidy(scratch: Path, store: ObjectStore) -> None:
    """Removes from this disk what jobs that have ended left, models that are deleted, and all but the newest models and
    checkpoints: a checkpoint of Stable Diffusion is 13 GiB, and tenants take turns with every segment."""
    for folder in (scratch / "jobs").glob("*/*"):
        if store.exists(JobKeys(folder.parent.name, folder.name).end):
            shutil.rmtree(folder, ignore_errors=True)
    now, written = time.time(), dict[Path, float]()
    for path in (scratch / "jobs").glob("*/*/*.*.safetensors"):
        with suppress(FileNotFoundError):
            written[path] = path.stat().st_mtime
    for path in sorted(written, key=written.__getitem__)[:-KEPT_CHECKPOINTS]:
        if now - written[path] > CHECKPOINT_IN_USE:
            path.unlink(missing_ok=True)
    models = sorted((scratch / "models").glob("*/*"), key=lambda folder: folder.stat().st_mtime)
    for folder in models:
        if folder in models[:-KEPT_MODELS] or not store.exists(ModelKeys(folder.parent.name, folder.name).card):
            shutil.rmtree(folder, ignore_errors=True)


def _tidy_now_and_then(settings: Settings, left: threading.Event) -> None:
    """``tidy`` in a worker that may have nothing to do: what is deleted is to go from its disk too."""
    store = ObjectStore.from_settings(settings)
    while not left.wait(settings.tidy_seconds):
        with suppress(StoreError, OSError, ValueError):
            tidy(settings.scratch, store)


def _places(error: BaseException) -> list[str]:
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]


def main(service: str, queues: Sequence[Queue], stages: str) -> None:
    """Serves ``queues`` with the ``STAGES`` of the module ``stages`` until SIGTERM: a Celery worker with one child, in
    which alone ``stages`` is imported.

    On SIGTERM it takes no further task, the running one stops at its next step, and the process leaves with 0.
    """
    settings = Settings()
    configure_logs(service)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # Threads that spin for long hold up whoever shares their cores.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Pages of 2 MiB (decisions/0014).
    app = celery_app(settings)
    name = f"{service}-{os.getpid()}@{socket.gethostname()}"
    worker = Worker(settings, stages, name, Sender(app))
    beat = _Heartbeat(settings, queues, name)
    left = threading.Event()

    @app.task(name=RUN, bind=True)  # type: ignore[untyped-decorator]
    def run(self: celery.Task, tenant: str, job_id: str, stage: Stage, shard: int) -> None:
        if self.request.delivery_info.get("redelivered"):
            metrics.TASKS_REDELIVERED.labels(stage).inc()
            log.info("task delivered again", tenant=tenant, job=job_id, stage=stage, shard=shard)
        worker.run(Task(tenant=tenant, job_id=job_id, stage=stage, shard=shard))

    def child_started(**_: Any) -> None:
        try:
            stages_found = sorted(worker.stages)
        except Exception as error:
            log.error("worker cannot start", error=f"{type(error).__name__}: {error}", trace=_places(error))
            os.kill(os.getppid(), signal.SIGTERM)
            return
        threadpool_limits(1, user_api="blas")  # Threads for small products hold up the other workers.
        for stage in worker.stages:
            metrics.LEASES_LOST.labels(stage)
            metrics.TASKS_REDELIVERED.labels(stage)
            for result in get_args(Result):
                metrics.TASK_SECONDS.labels(stage, result)
        if settings.metrics_port is not None:
            start_http_server(settings.metrics_port, addr=settings.host)
        _ready[0] = 1
        log.info("worker ready", stages=stages_found, queues=list(queues))

    def leave(**_: Any) -> None:
        _leaving[0] = 1
        left.set()
        beat.stop()

    def ready(**_: Any) -> None:
        beat.start()
        threading.Thread(target=_tidy_now_and_then, args=(settings, left), name="tidy", daemon=True).start()

    signals.worker_process_init.connect(child_started, weak=False)
    signals.worker_ready.connect(ready, weak=False)
    signals.worker_shutting_down.connect(leave, weak=False)
    app.worker_main(
        [
            "worker", "--pool=prefork", "--concurrency=1", f"--queues={','.join(queues)}", f"--hostname={name}",
            "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=WARNING",
        ]
    )  # fmt: skip


class _Heartbeat:
    """Tells dispatchers, from the parent and also while a long task runs, that this worker is alive, once its child
    can work."""

    def __init__(self, settings: Settings, queues: Sequence[Queue], name: str) -> None:
        self._settings, self._queues, self._name = settings, queues, name
        self._left = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._left.set()

    def _beat(self) -> None:
        leases = Leases.connect(self._settings.redis_url, self._settings.lease_seconds)
        while _ready[0] == 0 and not self._left.wait(READY_CHECK_SECONDS):
            pass
        while not self._left.is_set():
            self._tell(leases.heartbeat)
            self._left.wait(HEARTBEAT_SECONDS)
        self._tell(leases.retire)

    def _tell(self, what: Callable[[Queue, str], None]) -> None:
        try:
            for queue in self._queues:
                what(queue, self._name)
        except RedisError as error:
            log.warning("heartbeat not heard", error=type(error).__name__)
