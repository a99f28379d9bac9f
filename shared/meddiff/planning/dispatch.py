"""Level-triggered dispatch: observe, plan, send what is due, end what has ended. Anyone may call it at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime

import structlog

from meddiff.contracts.base import Stored
from meddiff.contracts.jobs import End, Spec
from meddiff.contracts.tasks import Queue, Task
from meddiff.planning.leases import Leases, Snapshot
from meddiff.planning.observe import observe, read_spec
from meddiff.planning.plan import Ending, plan
from meddiff.store.keys import JobKeys, active, newest
from meddiff.store.objects import NotFound, ObjectStore

Send = Callable[[Task], None]

ACTIVE = "active/"
# Tasks in flight for each live worker. Training segments are long and their order matters: the next is chosen when one
# ends. The others are short, so one waits while one runs.
DEPTH: dict[Queue, int] = {"datasets": 2, "training": 1, "masks": 2, "inpainting": 2, "quality": 2}

log = structlog.get_logger()


class Cancel(Stored):
    """``cancel.json``: a request to stop."""

    requested_at: datetime


def advance(store: ObjectStore, leases: Leases, send: Send, tenant: str, job_id: str) -> None:
    """Takes one job a step further: sends its due tasks as far as their queues have room, or ends it.

    A job that has ended, or never was, is dropped from the active ones.
    """
    keys = JobKeys(tenant, job_id)
    try:
        spec = read_spec(store, tenant, job_id)
    except NotFound:
        store.delete([active(tenant, job_id)])
        return
    if store.exists(keys.end):
        store.delete([active(tenant, job_id)])
        return
    if spec.parent is not None and store.exists(JobKeys(tenant, spec.parent).end):
        cancel(store, tenant, job_id, datetime.now(UTC))
    observed = observe(store, leases, spec)
    going_on = [child for child, end in observed.children.items() if end is None]
    for child_id in going_on:  # Again, for who submitted it may have been cut off before.
        store.put(active(tenant, child_id), b"")
    decision = plan(spec, observed)
    if decision.ending is None:
        for child in decision.children:
            submit(store, child)
        _send(leases, send, decision.due)
        return
    for child_id in going_on:
        cancel(store, tenant, child_id, datetime.now(UTC))
    if observed.cancelled and (going_on or leases.snapshot().runs(tenant, job_id)):
        return
    finish(store, spec, decision.ending)
    if spec.parent is not None:
        advance(store, leases, send, tenant, spec.parent)


def submit(store: ObjectStore, spec: Spec) -> None:
    """The job exists from its spec on. It is listed before that and active after, for a sweep drops what has no spec;
    submitting it again changes nothing."""
    store.put(newest(spec.tenant, spec.id), b"")
    store.put_json(JobKeys(spec.tenant, spec.id).spec, spec)
    store.put(active(spec.tenant, spec.id), b"")


def cancel(store: ObjectStore, tenant: str, job_id: str, now: datetime) -> None:
    """Asks the job to stop; asking again, or after its end, changes nothing. Raises ``NotFound``."""
    read_spec(store, tenant, job_id)
    store.put_json(JobKeys(tenant, job_id).cancel, Cancel(requested_at=now))


def finish(store: ObjectStore, spec: Spec, ending: Ending) -> None:
    """Ends the job, unless it has ended already: of several endings the first one counts."""
    end = End(
        status=ending.status, finished_at=datetime.now(UTC), result=ending.result, problem=ending.problem
    )  # fmt: skip
    if store.create_json(JobKeys(spec.tenant, spec.id).end, end):
        log.info("job ended", tenant=spec.tenant, job=spec.id, status=ending.status)
    store.delete([active(spec.tenant, spec.id)])


def active_jobs(store: ObjectStore) -> list[tuple[str, str]]:
    """(tenant, job id) of the jobs that have not ended, the oldest first: a UUIDv7 sorts by its time of creation."""
    found = (tuple(key.removeprefix(ACTIVE).split("/")) for key in store.list(ACTIVE))
    return sorted(((tenant, job_id) for tenant, job_id in found), key=lambda job: job[1])


def sweep(store: ObjectStore, leases: Leases, send: Send, token: str, seconds: float = 30.0) -> bool:
    """Plans every active job again, in order of creation, if the holder of ``token`` leads; says whether it does.

    One job's failure does not keep the others from being planned.
    """
    if not leases.lead(token, seconds):
        return False
    for tenant, job_id in active_jobs(store):
        if not leases.lead(token, seconds):
            return False
        try:
            advance(store, leases, send, tenant, job_id)
        except Exception as error:
            log.warning("job not planned", tenant=tenant, job=job_id, error=type(error).__name__)
    return True


def _send(leases: Leases, send: Send, due: Iterable[Task]) -> None:
    snapshot = leases.snapshot()
    room: dict[Queue, int] = {}
    for task in due:
        if task.queue not in room:
            room[task.queue] = _room(leases, snapshot, task.queue)
        if room[task.queue] > 0 and not snapshot.holds(task) and leases.reserve(task):
            send(task)
            room[task.queue] -= 1


def _room(leases: Leases, snapshot: Snapshot, queue: Queue) -> int:
    """How many tasks the queue takes now. The broker's list counts too, so that a task whose message waits longer than
    its lease lasts is not sent over and over."""
    limit = max(1, DEPTH[queue] * snapshot.workers.get(queue, 0))
    return limit - max(snapshot.in_flight(queue), snapshot.running(queue) + leases.backlog(queue))
