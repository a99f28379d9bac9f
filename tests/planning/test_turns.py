"""Whose turn it is: tenants by what they have had, a tenant's jobs by their place. On a real Redis."""

from __future__ import annotations

from collections import Counter

import pytest
from jobspecs import JOB, finetune, generate
from meddiff.contracts.requests import Priority
from meddiff.contracts.tasks import Task
from meddiff.planning.leases import InLine, Leases
from meddiff.planning.turns import place, wait
from meddiff.settings import Settings
from pydantic import ValidationError


@pytest.fixture
def leases(settings: Settings) -> Leases:
    return Leases.connect(settings.redis_url, 60, weights={"heavy": 3.0})


def served(leases: Leases, turns: int, seconds: dict[str, float] | None = None) -> Counter[str]:
    """Seconds that each tenant gets of so many turns, a turn of each as long as told."""
    had: Counter[str] = Counter()
    for _ in range(turns):
        turn = leases.next_turn("masks")
        assert turn is not None
        taken = (seconds or {}).get(turn[0], 1.0)
        leases.charge("masks", turn[0], taken)
        had[turn[0]] += taken
    return had


def test_tenants_have_equal_shares_however_many_jobs_each_has(leases: Leases) -> None:
    for n in range(20):
        leases.offer("many", f"job{n}", n, {"masks"})
    leases.offer("few", "job", 0, {"masks"})
    assert served(leases, 100) == {"many": 50, "few": 50}


def test_shares_are_of_time_and_weighed(leases: Leases) -> None:
    for tenant in ("heavy", "light", "slow"):
        leases.offer(tenant, "job", 0, {"masks"})
    had = served(leases, 600, {"slow": 10.0})
    assert had["heavy"] == pytest.approx(3 * had["light"], rel=0.1)
    assert had["slow"] == pytest.approx(had["light"], rel=0.2)


def test_time_not_asked_for_is_not_saved_up(leases: Leases) -> None:
    leases.offer("early", "job", 0, {"masks"})
    served(leases, 50)
    leases.offer("late", "job", 0, {"masks"})
    assert served(leases, 20) == {"early": 10, "late": 10}


def test_who_comes_back_quickly_has_not_lost_count(leases: Leases) -> None:
    """A job with one task at a time leaves the queue at each turn and returns."""
    leases.offer("wide", "job", 0, {"masks"})
    had: Counter[str] = Counter()
    for _ in range(40):
        leases.offer("narrow", "job", 0, {"masks"})
        turn = leases.next_turn("masks")
        assert turn is not None
        leases.charge("masks", turn[0], 1.0)
        had[turn[0]] += 1
        if turn[0] == "narrow":
            leases.withdraw("narrow", "job", "masks")
    assert had == {"wide": 20, "narrow": 20}


def test_of_a_tenants_jobs_the_one_with_the_first_place_is_next(leases: Leases) -> None:
    leases.offer("a", "second", 2.0, {"masks", "quality"})
    leases.offer("a", "first", 1.0, {"masks"})
    assert leases.next_turn("masks") == ("a", "first")
    assert leases.next_turn("quality") == ("a", "second")
    leases.withdraw("a", "first", "masks")
    assert leases.next_turn("masks") == ("a", "second")
    leases.offer("a", "second", 2.0, {"quality"})
    assert leases.next_turn("masks") is None
    leases.withdraw("a", "second")
    assert leases.next_turn("quality") is None


def test_a_short_job_passes_a_long_one_and_equal_ones_keep_their_order(leases: Leases) -> None:
    for stage, seconds in (("inpainter", 60.0), ("inpainting", 8.0)):
        leases.learn(stage, seconds)  # type: ignore[arg-type]
    long, short = generate(10_000), generate(8)
    hours_later = short.model_copy(update={"created_at": short.created_at.replace(hour=2)})
    next_day = short.model_copy(update={"created_at": short.created_at.replace(day=3)})
    assert place(leases, hours_later) < place(leases, long) < place(leases, next_day)
    assert place(leases, finetune()) == place(leases, finetune())


@pytest.mark.parametrize(("sooner", "later"), [("high", "normal"), ("normal", "low")])
def test_priority_is_a_head_start_and_no_more(leases: Leases, sooner: Priority, later: Priority) -> None:
    def asked(priority: Priority, day: int, minute: int) -> float:
        spec = generate(8)
        request = spec.request.model_copy(update={"priority": priority})
        created = spec.created_at.replace(day=day, minute=minute)
        return place(leases, spec.model_copy(update={"request": request, "created_at": created}))

    assert asked(sooner, 1, 59) < asked(later, 1, 0)
    assert asked(sooner, 3, 0) > asked(later, 1, 0)


def in_line(tenant: str, place: float, seconds: float) -> InLine:
    return InLine(tenant=tenant, job_id=f"{tenant}-{place}", place=place, seconds=seconds)


def test_who_waits_alone_has_all_workers() -> None:
    assert wait(in_line("a", 0, 30), [], workers=3, weights={}) == 10
    assert wait(in_line("a", 0, 30), [], workers=0, weights={}) == 30  # One is expected to come.


def test_one_waits_for_earlier_jobs_of_the_tenant_and_shares_with_other_tenants() -> None:
    mine, earlier, later = in_line("a", 2, 10), in_line("a", 1, 20), in_line("a", 3, 500)
    assert wait(mine, [earlier, later], 1, {}) == 30
    assert wait(mine, [later, in_line("b", 0, 4)], 1, {}) == 14  # Half of the worker, until b is done.
    assert wait(mine, [in_line("b", 0, 500)], 2, {"b": 4.0}) == 25  # A fifth of two workers.


def test_of_jobs_with_equal_places_one_is_before_the_other() -> None:
    """As the child jobs of an evaluation have."""
    one, other = (InLine(tenant="a", job_id=job_id, place=5.0, seconds=10.0) for job_id in ("1", "2"))
    assert [wait(one, [other], 1, {}), wait(other, [one], 1, {})] == [10.0, 20.0]


def test_a_line_tells_what_nobody_has_begun_and_each_job_is_in_the_one_it_needs_longest(leases: Leases) -> None:
    leases.learn("inpainting", 3.0)
    leases.offer("a", JOB, 7.0, {"inpainting"}, {"masks": 5, "inpainting": 6, "quality": 6})
    leases.offer("b", "other", 8.0, {"masks"}, {"masks": 3})
    task = Task(tenant="a", job_id=JOB, stage="inpainting", shard=0)
    assert leases.take(task, "token")
    lines = leases.lines(leases.took(), leases.workers())
    assert lines["inpainting"] == [InLine(tenant="a", job_id=JOB, place=7.0, seconds=15.0)]
    assert lines["masks"] == [InLine(tenant="b", job_id="other", place=8.0, seconds=3.0)]
    leases.withdraw("a", JOB)
    assert leases.lines(leases.took(), leases.workers())["inpainting"] == []


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_tenant_cannot_be_given_no_share_or_less(weight: float) -> None:
    with pytest.raises(ValidationError, match=r"tenant_weights\.radiology"):
        Settings(tenant_weights={"radiology": weight})
