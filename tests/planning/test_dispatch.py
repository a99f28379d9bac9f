"""What is sent when, and that one job's trouble is its own. On a real Redis and a real S3 server."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import pytest
from jobspecs import finetune, generate, small
from meddiff.contracts.jobs import End
from meddiff.contracts.tasks import Marker, Task
from meddiff.planning.dispatch import advance, cancel, fill, submit, sweep
from meddiff.planning.jobs import read_job
from meddiff.planning.leases import Leases
from meddiff.settings import Settings
from meddiff.store.keys import JobKeys
from meddiff.store.objects import ObjectStore, StoreUnavailable

JOBS = [f"0197f000-0000-7000-8000-00000000000{n}" for n in range(6)]


class Withholding(ObjectStore):
    """A store that answers, but does not give or take one key."""

    withheld = ""

    def get(self, key: str) -> bytes:
        if key == self.withheld:
            raise StoreUnavailable("SlowDownRead")
        return super().get(key)

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        if key == self.withheld:
            raise StoreUnavailable("SlowDownWrite")
        super().put(key, data, content_type)


@pytest.fixture
def leases(settings: Settings) -> Leases:
    return Leases.connect(settings.redis_url, 60)


@pytest.fixture
def withholding(store: ObjectStore, settings: Settings) -> Withholding:
    return Withholding.from_settings(settings)  # type: ignore[return-value]


def test_a_job_whose_record_is_not_given_keeps_no_other_from_its_turn(withholding: Withholding, leases: Leases) -> None:
    stuck, other = (JobKeys("local", job) for job in JOBS[:2])
    for job in JOBS[:2]:
        submit(withholding, finetune(job_id=job))
    marker = Marker(stage="import", shard=0, units=1, seconds=1, worker="w", output={})
    withholding.put_json(stuck.done("import", 0), marker)
    withholding.withheld = stuck.done("import", 0)
    sent: list[Task] = []
    assert sweep(withholding, leases, sent.append, "one")
    assert [task.job_id for task in sent] == [JOBS[1]]
    cancel(withholding, "local", JOBS[0], datetime.now(UTC))
    advance(withholding, leases, sent.append, "local", JOBS[0])
    assert withholding.get_json(stuck.end, End).status == "cancelled"
    assert not withholding.exists(other.end)


@pytest.mark.parametrize("damage", [b"{", b'{"of_tomorrow": 1}'])
def test_a_job_with_a_damaged_record_can_be_cancelled(store: ObjectStore, leases: Leases, damage: bytes) -> None:
    submit(store, finetune(job_id=JOBS[0]))
    keys = JobKeys("local", JOBS[0])
    store.put(keys.done("import", 0), damage)
    cancel(store, "local", JOBS[0], datetime.now(UTC))
    assert read_job(store, leases, "local", JOBS[0]).status == "cancelling"
    advance(store, leases, lambda task: None, "local", JOBS[0])
    assert store.get_json(keys.end, End).status == "cancelled"


def test_where_the_store_is_away_the_sweep_fails_as_a_whole(settings: Settings, store: ObjectStore) -> None:
    submit(store, finetune(job_id=JOBS[0]))

    class Away(Withholding):
        withheld = JobKeys("local", JOBS[0]).spec

        def ping(self) -> None:
            raise StoreUnavailable("gone")

    with pytest.raises(StoreUnavailable):
        sweep(Away.from_settings(settings), Leases.connect(settings.redis_url, 60), lambda task: None, "one")


def test_a_request_that_was_written_down_is_accepted(withholding: Withholding, leases: Leases) -> None:
    spec = finetune(job_id=JOBS[0])
    withholding.withheld = f"active/local/{spec.id}"
    submit(withholding, spec)
    sent: list[Task] = []
    advance(withholding, leases, sent.append, "local", spec.id)
    assert [task.stage for task in sent] == ["import"]


def test_a_tenant_with_one_task_at_a_time_gets_its_share_and_no_more(store: ObjectStore, leases: Leases) -> None:
    """The queue knows it only while something of it is due: it starts where the others are, each time."""
    wide = generate(400, recipe=small(work={"attempts": 1.0}), job_id=JOBS[0])
    narrow = generate(4, recipe=small(work={"attempts": 1.0}), job_id=JOBS[1])
    narrow = narrow.model_copy(update={"tenant": "narrow"})
    for spec in (wide, narrow):
        submit(store, spec)
    had: Counter[str] = Counter()
    sent: list[Task] = []
    for turn in range(60):
        if turn >= 20:
            advance(store, leases, sent.append, "narrow", narrow.id)
        advance(store, leases, sent.append, "local", wide.id)
        fill(store, leases, sent.append, {"masks"})
        for task in sent:
            had[task.tenant] += turn >= 20
            leases.release(task)
        sent.clear()
    assert had["narrow"] == pytest.approx(had["local"], abs=2)


def test_what_a_task_took_beyond_its_estimate_is_charged(leases: Leases) -> None:
    leases.offer("slow", "job", 0, {"masks"})
    leases.offer("quick", "job", 0, {"masks"})
    had: Counter[str] = Counter()
    for _ in range(110):
        turn = leases.next_turn("masks")
        assert turn is not None
        leases.charge("masks", turn[0], 1.0)
        leases.correct("masks", turn[0], 9.0 if turn[0] == "slow" else 0.0)
        had[turn[0]] += 1
    assert had["quick"] == pytest.approx(10 * had["slow"], rel=0.1)


def test_a_task_that_pauses_is_not_sent_and_then_its_job_is_planned(leases: Leases) -> None:
    task = Task(tenant="local", job_id=JOBS[0], stage="masks", shard=3)
    other = task.model_copy(update={"shard": 4})
    leases.pause(task, 60)
    assert leases.reserve([task, other]) == (other, False)
    assert leases.expired() == []
    leases.pause(task, 0)
    assert leases.expired() == [("local", JOBS[0])]
    assert leases.reserve([task]) == (task, False)
