"""The real planner, dispatcher and turns under a discrete clock, with tasks that take the time they are told to take.

Redis is real, its moments are the simulation's; the object store is a dictionary; a worker does what
``meddiff_services.worker`` does, but for the work. Everything follows from the seed.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import redis
from jobspecs import DATASET, imported, scored
from meddiff.contracts.base import canonical_json, sha256_hex
from meddiff.contracts.evaluation import Split
from meddiff.contracts.jobs import End, EvaluateSpec, GenerateSpec, Spec
from meddiff.contracts.tasks import Marker, Queue, Task
from meddiff.planning.dispatch import SOON, advance, cancel, submit, sweep
from meddiff.planning.leases import Leases, Live
from meddiff.planning.observe import read_spec
from meddiff.planning.selection import Entry, select
from meddiff.store.keys import JobKeys
from meddiff.store.objects import NotFound, ObjectStore, StoreError
from memory import MemoryStore

EPOCH = datetime(2026, 5, 1, tzinfo=UTC).timestamp()
LEASE_SECONDS = 9.0
SWEEP_SECONDS = 2.0
BEAT_SECONDS = 8.0
SECONDS: dict[str, float] = {
    "import": 1.0, "cache": 2.0, "inpainter": 6.0, "repair": 6.0, "mask_generator": 2.0, "backgrounds": 3.0,
    "calibrate": 1.0, "publish": 1.0, "masks": 0.5, "inpainting": 3.0, "quality": 0.5, "manifest": 0.5, "split": 1.0,
    "stop": 10.0, "segmenter": 5.0, "report": 1.0,
}  # fmt: skip
"""What a task of a stage takes, give or take a fifth."""

FLEET: dict[Queue, int] = {"datasets": 1, "training": 1, "masks": 1, "inpainting": 2, "quality": 1}
SPLITS = tuple(
    Split(train=tuple(f"{100 * s + n:064x}" for n in range(6)), test=tuple(f"{100 * s + n:064x}" for n in range(6, 9)))
    for s in range(2)
)


@dataclass(eq=False)
class SimulatedWorker:
    """``task`` and ``token``: what it runs; ``life`` grows when it is killed, and what was scheduled before is void."""

    queue: Queue
    name: str
    alive: bool = True
    life: int = 0
    paused_until: float = 0.0
    task: Task | None = None
    token: str = ""


@dataclass
class Simulation:
    """A fleet and its jobs. ``redelivered``: the share of messages that arrive twice."""

    client: redis.Redis
    seed: int
    workers: dict[Queue, int] = field(default_factory=lambda: dict(FLEET))
    weights: dict[str, float] = field(default_factory=dict)
    redelivered: float = 0.0
    rate: float = 0.6

    def __post_init__(self) -> None:
        self.client.flushall()
        self.random = random.Random(self.seed)
        self.now = EPOCH
        self.away_until = 0.0
        self.memory = MemoryStore(lambda: self.now, lambda: self.now < self.away_until)
        self.store = cast(ObjectStore, self.memory)
        self.leases = Leases(self.client, LEASE_SECONDS, self.weights, clock=lambda: self.now)
        self.fleet = [SimulatedWorker(q, f"{q}{n}") for q, count in self.workers.items() for n in range(count)]
        self.idle: dict[Queue, list[SimulatedWorker]] = defaultdict(list)
        self.busy_seconds: Counter[tuple[Queue, str]] = Counter()
        self.happened: Counter[str] = Counter()
        self.listeners: list[Callable[[Task], None]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for worker in self.fleet:
            self.idle[worker.queue].append(worker)
            self._beat(worker)
        self._sweep("gateway")

    # ---------------------------------------------------------------------------------------------------------- time

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        """``what`` happens in so many seconds."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), what))

    def run(self, until: Callable[[], bool], hours: float = 200.0) -> None:
        """Lets time pass until the condition holds. Fails where it does not within ``hours``."""
        last = self.now + 3600 * hours
        while not until():
            moment, _, what = heapq.heappop(self._events)
            assert moment < last, f"seed {self.seed}: no end within {hours} simulated hours"
            self.now = max(self.now, moment)
            what()

    # ---------------------------------------------------------------------------------------------------------- jobs

    def submit(self, spec: Spec) -> None:
        """As the gateway accepts it."""
        submit(self.store, spec)
        self._guarded(lambda: advance(self.store, self.leases, self.send, spec.tenant, spec.id))

    def cancel(self, spec: Spec) -> None:
        """Its tasks let go within a second."""
        self._guarded(lambda: cancel(self.store, spec.tenant, spec.id, datetime.fromtimestamp(self.now, UTC)))
        for worker in self.fleet:
            if worker.task is not None and worker.task.job_id == spec.id:
                self.at(1.0, lambda w=worker, life=worker.life, token=worker.token: self._finish(w, life, token))

    def ended(self, specs: Iterable[Spec]) -> bool:
        """Whether all of them have an end."""
        objects = self.memory._objects
        return all(JobKeys(spec.tenant, spec.id).end in objects for spec in specs)

    def end(self, spec: Spec) -> End:
        return self.store.get_json(JobKeys(spec.tenant, spec.id).end, End)

    def outputs(self, spec: Spec) -> dict[str, Any]:
        """What the job's markers say, but of a generate job the manifest alone: how many shards were made beyond the
        last one needed depends on how many were in flight."""
        root = JobKeys(spec.tenant, spec.id).done_root
        found = {key.removeprefix(root): self.store.get_json(key, Marker).output for key in self.store.list(root)}
        return {key: value for key, value in found.items() if not isinstance(spec, GenerateSpec) or "manifest" in key}

    # -------------------------------------------------------------------------------------------------------- mishaps

    def kill(self, worker: SimulatedWorker) -> None:
        """``kill -9``; a successor is there some seconds later."""
        worker.life += 1
        worker.alive, worker.task = False, None
        if worker in self.idle[worker.queue]:
            self.idle[worker.queue].remove(worker)
        self.at(self.random.uniform(1, 12), lambda life=worker.life: self._revive(worker, life))

    def pause(self, worker: SimulatedWorker, seconds: float) -> None:
        """``SIGSTOP``, and ``SIGCONT`` after so long: nothing it was about to do happens in between."""
        worker.paused_until = max(worker.paused_until, self.now + seconds)

    def flush(self) -> None:
        """Redis forgets everything, the queues too."""
        self.client.flushall()

    def second_leader(self) -> None:
        """Another sweep, whoever leads."""
        self.client.delete("leader:sweep")
        self._guarded(lambda: sweep(self.store, self.leases, self.send, "another"))

    def store_away(self, seconds: float) -> None:
        self.away_until = self.now + seconds

    def lose_message(self, luck: float) -> None:
        """A message of some queue is gone, where one waits."""
        waiting = [queue for queue in sorted(self.workers) if self.leases.backlog(queue)]
        if waiting:
            self.client.lpop(waiting[int(luck * len(waiting))])

    # -------------------------------------------------------------------------------------------------------- workers

    def send(self, task: Task) -> None:
        """The broker: a list of Redis, as Celery has it."""
        copies = 2 if self.random.random() < self.redelivered else 1
        self.happened["redelivered"] += copies - 1
        for _ in range(copies):
            self.client.rpush(task.queue, task.model_dump_json())
        for worker in self.idle[task.queue][:copies]:
            self.at(0.01, lambda w=worker, life=worker.life: self._fetch(w, life))

    def _fetch(self, worker: SimulatedWorker, life: int) -> None:
        if worker.life != life or worker.task is not None or worker not in self.idle[worker.queue]:
            return
        if self._later(worker, lambda: self._fetch(worker, life)):
            return
        message = cast(bytes | None, self.client.lpop(worker.queue))
        if message is not None:
            self.idle[worker.queue].remove(worker)
            self._begin(worker, Task.model_validate(json.loads(message)))

    def _begin(self, worker: SimulatedWorker, task: Task) -> None:
        keys = JobKeys(task.tenant, task.job_id)
        token = f"{worker.name}/{next(self._order)}"

        def taken() -> bool:
            try:
                read_spec(self.store, task.tenant, task.job_id)
            except NotFound:
                return False
            if any(self.store.exists(key) for key in (keys.end, keys.cancel, keys.done(task.stage, task.shard))):
                self.leases.release(task)
                return False
            return self.leases.take(task, token)

        if not self._guarded(taken, task):
            self._leave(worker, task)
            return
        worker.task, worker.token = task, token
        seconds = SECONDS[task.stage] * self.random.uniform(0.8, 1.2)
        life = worker.life
        self.leases.report(task, Live(stage=task.stage, shard=task.shard, since=self.now, now=self.now))
        self.at(seconds, lambda: self._finish(worker, life, token))
        self.at(LEASE_SECONDS / 3, lambda: self._renew(worker, life, token))
        self.busy_seconds[task.queue, task.tenant] += seconds  # type: ignore[assignment]

    def _renew(self, worker: SimulatedWorker, life: int, token: str) -> None:
        if worker.life != life or worker.token != token or worker.task is None:
            return
        if self._later(worker, lambda: self._renew(worker, life, token)):
            return
        if self.leases.take(worker.task, token):
            self.at(LEASE_SECONDS / 3, lambda: self._renew(worker, life, token))
        else:
            self.happened["lease lost"] += 1
            self._finish(worker, life, token, lost=True)

    def _finish(self, worker: SimulatedWorker, life: int, token: str, lost: bool = False) -> None:
        if worker.life != life or worker.token != token or worker.task is None:
            return
        if self._later(worker, lambda: self._finish(worker, life, token, lost)):
            return
        task = worker.task
        worker.task = None
        keys = JobKeys(task.tenant, task.job_id)

        def leave_marker() -> None:
            if lost or self.store.exists(keys.end) or self.store.exists(keys.cancel):
                return
            spec = read_spec(self.store, task.tenant, task.job_id)
            marker = Marker(
                stage=task.stage, shard=task.shard, units=self._units(spec, task), seconds=SECONDS[task.stage],
                worker=worker.name, output=self._output(spec, task),
            )  # fmt: skip
            self.store.put_json(keys.done(task.stage, task.shard), marker)
            self.leases.learn(task.stage, SECONDS[task.stage])

        self._guarded(leave_marker, task)
        self._guarded(lambda: self.leases.release(task, token))
        self._leave(worker, task)
        for listener in self.listeners:
            listener(task)

    def _leave(self, worker: SimulatedWorker, task: Task) -> None:
        self._guarded(
            lambda: advance(self.store, self.leases, self.send, task.tenant, task.job_id, freed={task.queue}), task
        )
        self.idle[worker.queue].append(worker)
        self.at(0.01, lambda life=worker.life: self._fetch(worker, life))

    def _guarded(self, what: Callable[[], Any], task: Task | None = None) -> Any:
        """What a service does where the store is away: lets it be, and has the job looked at soon."""
        try:
            return what()
        except StoreError:
            self.happened["store away"] += 1
            if task is not None:
                self.leases.look_after(task.tenant, task.job_id, SOON)
            return None

    def _later(self, worker: SimulatedWorker, what: Callable[[], None]) -> bool:
        """Whether the worker stands still; then ``what`` happens once it goes on."""
        if self.now >= worker.paused_until:
            return False
        self.at(worker.paused_until - self.now, what)
        return True

    def _revive(self, worker: SimulatedWorker, life: int) -> None:
        if worker.life == life:
            worker.alive = True
            self.idle[worker.queue].append(worker)
            self._beat(worker)
            self._fetch(worker, life)

    def _beat(self, worker: SimulatedWorker) -> None:
        life = worker.life

        def beat() -> None:
            if worker.life != life:
                return
            if not self._later(worker, beat):
                self.leases.heartbeat(worker.queue, worker.name)
                self.at(BEAT_SECONDS, beat)

        beat()

    def _sweep(self, token: str) -> None:
        def again() -> None:
            self._guarded(lambda: sweep(self.store, self.leases, self.send, token))
            self.at(SWEEP_SECONDS, again)

        self.at(SWEEP_SECONDS, again)

    # ---------------------------------------------------------------------------------------------------- what they do

    def _units(self, spec: Spec, task: Task) -> int:
        if isinstance(spec, GenerateSpec):
            return spec.recipe.work.shard_size
        part = spec.recipe.mask_generation if task.stage == "mask_generator" else spec.recipe.finetuning
        return part.segment_steps if task.stage in ("inpainter", "repair", "mask_generator") else 1

    def _output(self, spec: Spec, task: Task) -> dict[str, Any]:
        """A function of the job's spec and of what lies before the task, as a worker's is."""
        if task.stage == "import" and isinstance(spec, EvaluateSpec):
            return {"dataset_id": DATASET, "test_dataset_id": None, "prompt": None, "backgrounds": 0}
        if task.stage == "import":
            return imported()
        if task.stage == "split":
            return {"splits": [split.model_dump(mode="json") for split in SPLITS]}
        if isinstance(spec, GenerateSpec) and task.stage == "quality":
            return {"candidates": scored(spec, task.shard, self.rate)}
        if isinstance(spec, GenerateSpec) and task.stage == "manifest":
            return self._manifest(spec)
        if task.stage == "report":
            return {"verdict": "helps"}
        return {"shard": task.shard}

    def _manifest(self, spec: GenerateSpec) -> dict[str, Any]:
        keys = JobKeys(spec.tenant, spec.id)
        entries: list[Entry] = []
        for shard in itertools.count():
            try:
                marker = self.store.get_json(keys.done("quality", shard), Marker)
            except NotFound:
                break
            entries += [Entry.model_validate(candidate) for candidate in marker.output["candidates"]]
        chosen = select(entries, spec)
        accepted = [entry.index for entry in chosen.accepted]
        rejected = [(entry.index, reason) for entry, reason in chosen.rejected]
        return {"accepted": accepted, "sha256": sha256_hex(canonical_json([accepted, rejected, chosen.next_index]))}
