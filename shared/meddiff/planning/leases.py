"""What Redis knows: who works on what, who is alive, how far a task is. All of it may vanish at any moment; then work
is sent again and nothing else happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import redis
from pydantic import Field
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from meddiff.contracts.base import Contract
from meddiff.contracts.tasks import Queue, Stage, Task
from meddiff.planning.selection import Tally

_SENT = "sent"  # A lease's value while its message waits in the queue; afterwards it is the token of who runs it.
_HEARTBEAT_SECONDS = 10.0
_KEEP_SECONDS = 3600

# Takes or renews: the lease is mine if nobody runs the task, also where a flush has taken it from under me.
_TAKE = """
local holder = redis.call('GET', KEYS[1])
if not holder or holder == ARGV[3] or holder == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 1
end
return 0
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


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


@dataclass(frozen=True)
class Snapshot:
    """Leases and workers at one moment. ``leases`` maps a task's lease key to its holder."""

    leases: Mapping[str, str]
    workers: Mapping[str, int]

    def holds(self, task: Task) -> bool:
        """Whether ``task`` waits in its queue or runs."""
        return _lease(task) in self.leases

    def in_flight(self, queue: Queue) -> int:
        """Tasks of ``queue`` that wait in it or run."""
        return sum(key.startswith(f"lease:{queue}:") for key in self.leases)

    def running(self, queue: Queue) -> int:
        """Tasks of ``queue`` that run."""
        return sum(key.startswith(f"lease:{queue}:") and holder != _SENT for key, holder in self.leases.items())

    def runs(self, tenant: str, job_id: str) -> bool:
        """Whether a worker runs a task of this job."""
        return any(f":{tenant}:{job_id}:" in key and holder != _SENT for key, holder in self.leases.items())


class Leases:
    """Leases, heartbeats, live progress and caches. A lease lasts ``seconds`` unless it is renewed.

    Every method raises ``redis.RedisError`` where Redis cannot be reached within the retry policy.
    """

    def __init__(self, client: redis.Redis, seconds: float) -> None:
        self.client = client
        self.seconds = seconds

    @classmethod
    def connect(cls, url: str, seconds: float) -> Leases:
        """Over a client whose one retry policy is six tries within about five seconds."""
        retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=2.0), retries=6)
        return cls(redis.Redis.from_url(url, retry=retry, socket_timeout=5, socket_connect_timeout=2), seconds)

    def reserve(self, task: Task) -> bool:
        """Before ``task`` is sent: whether nobody else has sent it within the lease's time, or runs it."""
        return bool(self.client.set(_lease(task), _SENT, nx=True, px=self._milliseconds))

    def take(self, task: Task, token: str) -> bool:
        """Whether the holder of ``token`` is the one to run ``task``, now and for the lease's time.

        Taking again renews; ``False`` says that another worker runs it.
        """
        return bool(self.client.eval(_TAKE, 1, _lease(task), token, str(self._milliseconds), _SENT))

    def release(self, task: Task, token: str = _SENT) -> None:
        """The holder of ``token`` lets go; somebody else's lease stays."""
        self.client.eval(_RELEASE, 1, _lease(task), token)
        self.client.hdel(_live(task.tenant, task.job_id), f"{task.stage}:{task.shard}")

    def snapshot(self) -> Snapshot:
        """Every lease and every live worker."""
        keys = sorted(self._scan("lease:*"))
        holders = self.client.mget(keys) if keys else []
        workers = Counter(key.split(":")[1] for key in self._scan("worker:*"))
        found = zip(keys, cast(list[bytes | None], holders), strict=True)
        return Snapshot({key: holder.decode() for key, holder in found if holder is not None}, workers)

    def backlog(self, queue: Queue) -> int:
        """Messages in the broker's list: a bound on sending again, never a source of truth."""
        return int(self.client.llen(queue))

    def heartbeat(self, queue: Queue, worker: str) -> None:
        """``worker`` serves ``queue`` for the next seconds; to be repeated every few."""
        self.client.set(f"worker:{queue}:{worker}", 1, px=int(_HEARTBEAT_SECONDS * 1000))

    def retire(self, queue: Queue, worker: str) -> None:
        """``worker`` serves ``queue`` no longer."""
        self.client.delete(f"worker:{queue}:{worker}")

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
        self.client.set(f"tally:{tenant}:{job_id}", tally.to_bytes(), ex=_KEEP_SECONDS)

    def tally(self, tenant: str, job_id: str) -> Tally:
        """The newest tally kept, or the empty one."""
        data = cast(bytes | None, self.client.get(f"tally:{tenant}:{job_id}"))
        return Tally() if data is None else Tally.from_bytes(data)

    def lead(self, token: str, seconds: float) -> bool:
        """Whether the holder of ``token`` leads the sweep for the next ``seconds``."""
        return bool(self.client.eval(_TAKE, 1, "leader:sweep", token, str(int(seconds * 1000)), _SENT))

    def _scan(self, pattern: str) -> Iterator[str]:
        return (cast(bytes, key).decode() for key in self.client.scan_iter(pattern, count=1000))

    @property
    def _milliseconds(self) -> int:
        return int(self.seconds * 1000)


def _lease(task: Task) -> str:
    return f"lease:{task.queue}:{task.tenant}:{task.job_id}:{task.stage}:{task.shard}"


def _live(tenant: str, job_id: str) -> str:
    return f"live:{tenant}:{job_id}"
