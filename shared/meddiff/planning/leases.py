"""What Redis knows: who works on what, who is alive, how far a task is. All of it may vanish at any moment; then work
is sent again and nothing else happens."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import redis
from pydantic import Field
from redis.backoff import NoBackoff
from redis.retry import Retry

from meddiff.contracts.base import Contract
from meddiff.contracts.tasks import QUEUE_OF, Queue, Stage, Task
from meddiff.planning import scripts
from meddiff.planning.selection import Tally
from meddiff.store.retry import RetryPolicy

_AWAY = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ReadOnlyError, redis.exceptions.OutOfMemoryError)
_HEARTBEAT_SECONDS = 10.0
_KEEP_SECONDS = 3600
_AT_ONCE = 500  # Members given to one script.
_LOOK_SECONDS = 60.0
_LOOKS_A_SECOND = 2.0


Clock = Callable[[], float]
T = TypeVar("T")


RETRIES = RetryPolicy(first=0.05, longest=2.0, deadline=5.0)
"""Of calls to Redis, where nobody waits for the answer but a worker."""


class PatientRedis(redis.Redis):
    """A client whose every command is tried again under ``policy``; the client itself tries once."""

    policy = RETRIES

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        once = super().execute_command
        return self.policy(lambda: once(*arguments, **options), is_away)  # type: ignore[no-untyped-call]


def is_away(error: Exception) -> bool:
    """Whether Redis may do it later: it is not there, starts, is full, or is a replica that is about to be promoted."""
    return isinstance(error, _AWAY)


class Live(Contract):
    """How far a running task is: ``done`` of ``total`` in ``unit`` since ``since`` (seconds since the epoch), and what
    else it tells, such as the loss."""

    stage: Stage
    shard: int
    done: int = 0
    total: int = 0
    unit: str = ""
    since: float
    now: float
    info: dict[str, float | int | str] = Field(default_factory=dict)


class InLine(Contract):
    """What a job has left to do in a queue that no worker has begun: so many seconds. ``place`` orders the jobs of a
    tenant."""

    tenant: str
    job_id: str
    place: float
    seconds: float


class Leases:
    """Leases, turns, heartbeats, live progress and caches. A lease lasts ``seconds`` unless it is renewed. ``weights``:
    the shares of tenants whose share is not 1. ``clock`` (seconds) stands in for Redis's own where time is simulated.

    Every method raises ``redis.RedisError`` where Redis cannot be reached within the retry policy.
    """

    def __init__(
        self, client: redis.Redis, seconds: float, weights: Mapping[str, float] = {}, clock: Clock | None = None
    ) -> None:
        self.client = client
        self.seconds = seconds
        self.weights = weights
        self._clock = clock

    @classmethod
    def connect(
        cls, url: str, seconds: float, weights: Mapping[str, float] = {}, retry: RetryPolicy = RETRIES
    ) -> Leases:
        """Over a client of its own, whose one retry policy is ``retry``."""
        client = PatientRedis.from_url(
            url, retry=Retry(NoBackoff(), 0), socket_timeout=5, socket_connect_timeout=2
        )  # fmt: skip
        assert isinstance(client, PatientRedis)
        client.policy = retry
        return cls(client, seconds, weights)

    # --------------------------------------------------------------------------------------------------------- tasks

    def reserve(self, tasks: Sequence[Task]) -> tuple[Task | None, bool]:
        """Before a task is sent: the first of ``tasks`` (of one queue) that neither waits in it nor runs nor pauses,
        which counts as sent from here on, and whether there are others like it."""
        for some in _some_at_once(tasks):
            keys = [*_queue_keys(some[0].queue)[:2], _paused(some[0].queue)]
            place, free = self._run(scripts.RESERVE, keys, self._milliseconds, *map(_name, some))
            if place:
                return some[place - 1], free > 1 or some[-1] != tasks[-1]
        return None, False

    def take(self, task: Task, token: str) -> bool:
        """Whether the holder of ``token`` is the one to run ``task``, now and for the lease's time.

        Taking again renews; ``False`` says that another worker runs it.
        """
        return bool(self._run(scripts.TAKE, _task_keys(task), self._milliseconds, _name(task), token))

    def release(self, task: Task, token: str = "") -> None:
        """The holder of ``token`` lets go, without one whoever sent it; somebody else's lease stays."""
        self._run(scripts.RELEASE, _task_keys(task), _name(task), token)
        self.client.hdel(_live(task.tenant, task.job_id), f"{task.stage}:{task.shard}")

    def pause(self, task: Task, seconds: float) -> None:
        """The task is not sent again for so long."""
        self._run(scripts.UNTIL, [_paused(task.queue)], int(seconds * 1000), _name(task))

    def expired(self) -> list[tuple[str, str]]:
        """(tenant, job id) of tasks whose lease has run out since this was last asked: their messages are lost, or who
        ran them is gone; and of those whose pause is over."""
        found = cast(list[bytes], self._run(scripts.EXPIRED, (), *QUEUES))
        return sorted({(name[0], name[1]) for name in (task.decode().split("/") for task in found)})

    def in_flight(self, queue: Queue) -> int:
        """Tasks of ``queue`` that wait in it or run."""
        return sum(self.tasks(queue))

    def runs(self, tenant: str, job_id: str) -> bool:
        """Whether a worker runs a task of this job."""
        return bool(self.running_of(tenant, job_id))

    def running_of(self, tenant: str, job_id: str) -> list[tuple[Stage, int]]:
        """Stage and shard of the job's tasks that run."""
        found = cast(list[bytes], self._run(scripts.BEYOND, [_running_of(tenant, job_id)]))
        names = (task.decode().split("/") for task in found)
        return [(cast(Stage, stage), int(shard)) for _, _, stage, shard in names]

    def rooms(self, depths: Mapping[Queue, int]) -> dict[Queue, int]:
        """How many tasks each queue takes now: its depth for each live worker, at least one in all, and none where
        nobody has anything due. The broker's list counts too, so that a task whose message waits longer than its lease
        lasts is not sent over and over."""
        pairs = [item for pair in depths.items() for item in pair]
        return dict(zip(depths, cast(list[int], self._run(scripts.ROOMS, (), *pairs)), strict=True))

    def backlog(self, queue: Queue) -> int:
        """Messages in the broker's list: a bound on sending again, never a source of truth."""
        return int(self.client.llen(queue))

    # ----------------------------------------------------------------------------------------------------- planning

    def look_after(self, tenant: str, job_id: str, seconds: float) -> None:
        """The sweep plans the job again in so many seconds."""
        self._run(scripts.UNTIL, ["look"], int(seconds * 1000), f"{tenant}/{job_id}")

    def look_later(self, tenant: str, job_id: str) -> None:
        """The sweep plans the job again in a minute, or in as long as it takes to do so two times a second."""
        jobs = self.client.zcard("look")
        self.look_after(tenant, job_id, max(_LOOK_SECONDS, jobs / _LOOKS_A_SECOND))

    def unknown(self, jobs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of ``jobs`` (tenant, job id) that the sweep never planned, or that a flush took."""
        found: list[tuple[str, str]] = []
        for some in _some_at_once(jobs):
            known = self.client.zmscore("look", ["/".join(job) for job in some])
            found += [job for job, moment in zip(some, known, strict=True) if moment is None]
        return found

    def late(self) -> list[tuple[str, str]]:
        """Jobs that the sweep is to plan now, the latest first."""
        found = cast(list[bytes], self._run(scripts.LATE, ["look"]))
        return [(job[0], job[1]) for job in (member.decode().split("/") for member in found)]

    def lead(self, token: str, seconds: float) -> bool:
        """Whether the holder of ``token`` leads the sweep for the next ``seconds``."""
        return bool(self._run(scripts.LEAD, ["leader:sweep"], int(seconds * 1000), token))

    # -------------------------------------------------------------------------------------------------------- turns

    def offer(
        self, tenant: str, job_id: str, place: float, queues: Iterable[Queue], left: Mapping[Stage, int] = {}
    ) -> None:
        """The job has something due in ``queues`` and in no other; ``place`` orders the jobs of a tenant; ``left``:
        how many of its tasks are not done yet, for those who wait behind it."""
        due = set(queues)
        flags = [item for queue in QUEUES for item in (queue, int(queue in due))]
        self.client.eval(scripts.OFFER, 0, tenant, job_id, str(place), *flags)
        self.client.hset("left", f"{tenant}/{job_id}", json.dumps([place, left]))

    def withdraw(self, tenant: str, job_id: str, queue: Queue | None = None) -> None:
        """The job has nothing due in ``queue``; without one, it has ended."""
        flags = [item for one in QUEUES if queue in (None, one) for item in (one, 0)]
        self.client.eval(scripts.OFFER, 0, tenant, job_id, "0", *flags)
        if queue is None:
            self.client.hdel("left", f"{tenant}/{job_id}")
            self.client.zrem("look", f"{tenant}/{job_id}")  # Last: as long as it is there, a sweep comes back to it.

    def lines(self, took: Mapping[Stage, float], workers: Mapping[Queue, int]) -> dict[Queue, list[InLine]]:
        """Who has something left to do in each queue, and how much, where a task of a stage takes what it ``took``. A
        job is in the line that it needs longest: in the others it waits for itself."""
        running: Counter[tuple[str, Stage]] = Counter()
        for queue in QUEUES:
            for task in cast(list[bytes], self._run(scripts.BEYOND, [f"running:{queue}"])):
                tenant, job_id, stage, _ = task.decode().split("/")
                running[f"{tenant}/{job_id}", cast(Stage, stage)] += 1
        found: dict[Queue, list[InLine]] = {queue: [] for queue in QUEUES}
        for (tenant, job_id), (place, left) in self.left().items():
            seconds: defaultdict[Queue, float] = defaultdict(float)
            for stage, tasks in left.items():
                waiting = max(0, tasks - running[f"{tenant}/{job_id}", stage])
                seconds[QUEUE_OF[stage]] += waiting * took.get(stage, 1.0)
            queue = max(seconds, key=lambda queue: seconds[queue] / max(1, workers[queue]))
            found[queue].append(InLine(tenant=tenant, job_id=job_id, place=place, seconds=seconds[queue]))
        return found

    def left(self) -> dict[tuple[str, str], tuple[float, dict[Stage, int]]]:
        """By tenant and job that has not ended: its place, and how many of its tasks are not done."""
        told = cast(dict[bytes, bytes], self.client.hgetall("left"))
        found = {}
        for job, value in told.items():
            tenant, job_id = job.decode().split("/")
            place, left = json.loads(value)
            found[tenant, job_id] = (float(place), left)
        return found

    def waiting(self, queue: Queue) -> set[tuple[str, str]]:
        """(tenant, job id) of those that have something due in ``queue``, or sent there, that no worker has taken."""
        tenants = [tenant.decode() for tenant in cast(list[bytes], self.client.zrange(f"turns:{queue}", 0, -1))]
        jobs = {name: cast(list[bytes], self.client.zrange(f"turns:{queue}:{name}", 0, -1)) for name in tenants}
        sent = cast(list[bytes], self._run(scripts.BEYOND, [f"sent:{queue}"]))
        names = (task.decode().split("/") for task in sent)
        return {(name[0], name[1]) for name in names} | {(one, job.decode()) for one in jobs for job in jobs[one]}

    def tasks(self, queue: Queue) -> tuple[int, int]:
        """Tasks of ``queue`` that were sent and wait, and that run."""
        sent, running = self._count(f"sent:{queue}", f"running:{queue}")
        return sent, running

    def next_turn(self, queue: Queue) -> tuple[str, str] | None:
        """(tenant, job id) of who is next in ``queue``: of the tenants with something due the one that has had least,
        and of its jobs the first."""
        found = cast(list[bytes], self.client.eval(scripts.NEXT, 0, queue))
        return (found[0].decode(), found[1].decode()) if found else None

    def charge(self, queue: Queue, tenant: str, seconds: float) -> None:
        """The tenant has had so much more of ``queue``, divided by its weight. Who comes back after a pause starts
        where the others are (start-time fair queueing, Goyal et al., 1996): time not asked for is not saved up."""
        self.client.eval(scripts.CHARGE, 0, queue, tenant, str(seconds / self.weights.get(tenant, 1.0)))

    def correct(self, queue: Queue, tenant: str, seconds: float) -> None:
        """The tenant's task took so much more of ``queue``, or less, than it was charged."""
        self.client.eval(scripts.CORRECT, 0, queue, tenant, str(seconds / self.weights.get(tenant, 1.0)))

    # ------------------------------------------------------------------------------------------------------ workers

    def heartbeat(self, queue: Queue, worker: str) -> None:
        """``worker`` serves ``queue`` for the next seconds; to be repeated every few."""
        self._run(scripts.UNTIL, [f"workers:{queue}"], int(_HEARTBEAT_SECONDS * 1000), worker)

    def retire(self, queue: Queue, worker: str) -> None:
        """``worker`` serves ``queue`` no longer."""
        self.client.zrem(f"workers:{queue}", worker)

    def workers(self) -> dict[Queue, int]:
        """Live workers of every queue."""
        return dict(zip(QUEUES, self._count(*(f"workers:{queue}" for queue in QUEUES)), strict=True))

    def learn(self, stage: Stage, seconds: float) -> None:
        """A task of ``stage`` took so long."""
        known = cast(bytes | None, self.client.hget("seconds", stage))
        self.client.hset("seconds", stage, str(seconds if known is None else 0.8 * float(known) + 0.2 * seconds))

    def seconds_of(self, stage: Stage) -> float:
        """How long a task of ``stage`` takes, lately; 1 where none has told."""
        known = cast(bytes | None, self.client.hget("seconds", stage))
        return 1.0 if known is None else max(float(known), 1e-3)

    def took(self) -> dict[Stage, float]:
        """The same of every stage of which any task has told."""
        known = cast(dict[bytes, bytes], self.client.hgetall("seconds"))
        return {cast(Stage, stage.decode()): max(float(seconds), 1e-3) for stage, seconds in known.items()}

    # ---------------------------------------------------------------------------------------------- progress, caches

    def report(self, task: Task, live: Live) -> None:
        """Leaves a running task's progress for whoever asks."""
        key = _live(task.tenant, task.job_id)
        self.client.hset(key, f"{task.stage}:{task.shard}", live.model_dump_json())
        self.client.expire(key, _KEEP_SECONDS)

    def live(self, tenant: str, job_id: str) -> tuple[Live, ...]:
        """Progress of the job's running tasks, as far as it is known."""
        reports = cast(dict[bytes, bytes], self.client.hgetall(_live(tenant, job_id)))
        return tuple(Live.model_validate_json(report) for _, report in sorted(reports.items()))

    def keep_tally(self, tenant: str, job_id: str, tally: Tally) -> None:
        """Caches a tally, so that nobody folds the job's past again."""
        self.client.set(f"tally-2:{tenant}:{job_id}", tally.to_bytes(), ex=_KEEP_SECONDS)

    def tally(self, tenant: str, job_id: str) -> Tally:
        """The newest tally kept, or the empty one."""
        data = cast(bytes | None, self.client.get(f"tally-2:{tenant}:{job_id}"))
        return Tally() if data is None else Tally.from_bytes(data)

    def _run(self, script: str, keys: Sequence[str], *arguments: str | int) -> Any:
        now = "" if self._clock is None else str(int(self._clock() * 1000))
        return self.client.eval(script, len(keys), *keys, now, *map(str, arguments))

    def _count(self, *keys: str) -> list[int]:
        return cast(list[int], self._run(scripts.COUNT, keys))

    @property
    def _milliseconds(self) -> int:
        return int(self.seconds * 1000)


QUEUES: tuple[Queue, ...] = tuple(sorted(set(QUEUE_OF.values())))


def _some_at_once(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _AT_ONCE):
        yield items[start : start + _AT_ONCE]


def _name(task: Task) -> str:
    return f"{task.tenant}/{task.job_id}/{task.stage}/{task.shard}"


def _queue_keys(queue: Queue) -> list[str]:
    return [f"sent:{queue}", f"running:{queue}", f"holders:{queue}"]


def _paused(queue: Queue) -> str:
    return f"paused:{queue}"


def _task_keys(task: Task) -> list[str]:
    return [*_queue_keys(task.queue), _running_of(task.tenant, task.job_id)]


def _running_of(tenant: str, job_id: str) -> str:
    return f"running-of:{tenant}/{job_id}"


def _live(tenant: str, job_id: str) -> str:
    return f"live:{tenant}:{job_id}"
