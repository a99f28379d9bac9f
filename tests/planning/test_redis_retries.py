"""One policy for Redis: what is away is asked again until a deadline, what is wrong is not."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import redis
from meddiff.contracts.tasks import Task
from meddiff.embedded.servers import start_redis
from meddiff.planning.leases import Leases, is_away
from meddiff.planning.queues import Sender, celery_app
from meddiff.settings import Settings
from meddiff.store.retry import RetryPolicy

AWAY = "redis://127.0.0.1:1/0"
TASK = Task(tenant="local", job_id="0197f000-0000-7000-8000-000000000001", stage="masks")
BRIEF = RetryPolicy(first=0.02, longest=0.05, deadline=0.3)


def test_it_gives_up_at_the_deadline_and_not_before() -> None:
    leases = Leases.connect(AWAY, 5, retry=BRIEF)
    begun = time.monotonic()
    with pytest.raises(redis.ConnectionError):
        leases.in_flight("masks")
    assert BRIEF.deadline <= time.monotonic() - begun < 10


def test_a_send_is_tried_under_the_same_policy() -> None:
    send = Sender(celery_app(Settings(redis_url=AWAY)), BRIEF)
    begun = time.monotonic()
    with pytest.raises(Exception, match="refused"):
        send(TASK)
    assert BRIEF.deadline <= time.monotonic() - begun < 10


def test_a_redis_that_comes_back_is_found(tmp_path: Path) -> None:
    first = start_redis(tmp_path)
    port = first.url.rpartition(":")[2].partition("/")[0]
    leases = Leases.connect(first.url, 5, retry=RetryPolicy(deadline=20))
    assert leases.reserve([TASK]) == (TASK, False)
    first.stop()
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(leases.in_flight("masks")))
    asking.start()
    second = start_redis(tmp_path, int(port))
    asking.join(30)
    second.stop()
    assert found == [0]


def test_a_command_that_is_wrong_is_not_repeated(redis_url: str) -> None:
    leases = Leases.connect(redis_url, 5, retry=RetryPolicy(deadline=60))
    begun = time.monotonic()
    with pytest.raises(redis.ResponseError):
        leases.client.execute_command("NOSUCHCOMMAND")
    assert time.monotonic() - begun < 30
    assert not is_away(redis.ResponseError("wrong"))
    assert is_away(redis.exceptions.BusyLoadingError("loading"))


def test_a_redis_that_is_full_or_read_only_is_waited_for(tmp_path: Path) -> None:
    server = start_redis(tmp_path)
    leases = Leases.connect(server.url, 5, retry=RetryPolicy(deadline=20))
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", "1")
        threading.Timer(0.5, client.config_set, ("maxmemory", "0")).start()
        leases.heartbeat("masks", "worker")
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        threading.Timer(0.5, client.execute_command, ("REPLICAOF", "NO", "ONE")).start()
        leases.heartbeat("quality", "worker")
    workers = leases.workers()
    server.stop()
    assert (workers["masks"], workers["quality"]) == (1, 1)
