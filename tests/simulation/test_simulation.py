"""The planner under a discrete clock: with mishaps as on a quiet day, at a flat cost, and fair."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from chaos import chaotic_run
from meddiff.embedded.servers import RedisServer
from scale import busy_fleet, contention, fair_finish


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


def wrong(client: redis.Redis, seeds: range) -> list[str]:
    return [fault for seed in seeds for fault in chaotic_run(client, seed).wrong]


def test_whatever_goes_wrong_every_job_ends_as_on_a_quiet_day(client: redis.Redis) -> None:
    assert wrong(client, range(8)) == []


@pytest.mark.slow
def test_whatever_goes_wrong_in_many_runs(client: redis.Redis) -> None:
    assert wrong(client, range(1000, 1040)) == []


def test_a_run_is_a_function_of_its_seed(client: redis.Redis) -> None:
    assert chaotic_run(client, 7) == chaotic_run(client, 7)


@pytest.mark.slow
def test_in_a_large_fleet_a_pair_costs_the_same_and_estimates_hold(client: redis.Redis) -> None:
    small, large = busy_fleet(client, jobs=10, inpainters=1), busy_fleet(client, jobs=60, inpainters=8)
    assert large.calls_per_pair < 1.2 * small.calls_per_pair
    assert large.good_estimates > 0.7


def test_no_tenant_waits_for_more_than_its_share(client: redis.Redis) -> None:
    loads = {"many": [40] * 12, "few": [40], "two": [60] * 2, "heavy": [40] * 4}
    assert max(contention(client, loads, inpainters=4).values()) < 1.3


def test_the_fair_share_is_that_of_a_fluid() -> None:
    finish = fair_finish({"a": 10.0, "b": 30.0}, workers=2, weights={})
    assert finish == {"a": 10.0, "b": 20.0}
    assert fair_finish({"a": 20.0, "b": 10.0}, 1, {"a": 2.0}) == {"a": 30.0, "b": 30.0}
