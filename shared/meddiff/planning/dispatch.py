"""Level-triggered dispatch: observe, plan, send what is due, end what has ended. Anyone may call it at any time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime

import structlog
from redis import RedisError

from meddiff.contracts.base import Stored
from meddiff.contracts.jobs import End, Spec
from meddiff.contracts.tasks import Queue, Task
from meddiff.metrics import JOBS_ENDED
from meddiff.planning.leases import Leases
from meddiff.planning.observe import observe, read_spec
from meddiff.planning.plan import Ending, plan
from meddiff.planning.progress import tasks_left
from meddiff.planning.turns import place
from meddiff.store.keys import JobKeys, active, newest
from meddiff.store.objects import NotFound, ObjectStore, StoreError, StoreUnavailable

Send = Callable[[Task], None]

ACTIVE = "active/"
# Tasks in flight for each live worker. Training segments are long and their order matters: the next is chosen when one
# ends. The others are short, so one waits while one runs.
DEPTH: dict[Queue, int] = {"datasets": 2, "training": 1, "masks": 2, "inpainting": 2, "quality": 2}
SOON = 2.0  # Seconds after which a job is looked at again that waits for a worker to let go, or has met a fault.

log = structlog.get_logger()


class Cancel(Stored):
    """``cancel.json``: a request to stop."""

    requested_at: datetime


def advance(
    store: ObjectStore, leases: Leases, send: Send, tenant: str, job_id: str, freed: Collection[Queue] = ()
) -> None:
    """Takes one job a step further, or ends it; then fills the queues that it has something due in, and those of
    ``freed``, with whatever is next there."""
    due = _step(store, leases, tenant, job_id)
    fill(store, leases, send, {task.queue for task in due} | set(freed), {(tenant, job_id): due})


def fill(
    store: ObjectStore,
    leases: Leases,
    send: Send,
    queues: Collection[Queue],
    planned: dict[tuple[str, str], tuple[Task, ...]] | None = None,
) -> None:
    """Sends to each queue, as far as it has room, what is due of the jobs whose turn it is; ``planned``: what is known
    to be due."""
    planned = {} if planned is None else planned
    for queue, room in leases.rooms({queue: DEPTH[queue] for queue in sorted(queues)}).items():
        while room > 0 and (turn := leases.next_turn(queue)) is not None:
            if turn not in planned:
                planned[turn] = _step_or_nothing(store, leases, *turn)
            task, more = leases.reserve([task for task in planned[turn] if task.queue == queue])
            if task is not None:
                leases.charge(queue, task.tenant, leases.seconds_of(task.stage))
            if not more:  # After the charge, for a tenant with nothing due has no place that it could be charged at.
                leases.withdraw(*turn, queue)
            if task is not None:
                send(task)
                room -= 1


def _step(store: ObjectStore, leases: Leases, tenant: str, job_id: str) -> tuple[Task, ...]:
    """Plans one job and ends it, starts its child jobs, or offers what is due, which is returned.

    A job that has ended, or never was, is dropped from the active ones.
    """
    keys = JobKeys(tenant, job_id)
    try:
        spec = read_spec(store, tenant, job_id)
    except NotFound:
        _drop(store, leases, tenant, job_id)
        return ()
    if store.exists(keys.end):
        _drop(store, leases, tenant, job_id)
        if spec.parent is not None:  # Which waits for it, and may not know: a worker ends a job that failed.
            leases.look_after(tenant, spec.parent, 0)
        return ()
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
        leases.look_later(tenant, job_id)  # First: the sweep comes back to whatever is left half done here.
        leases.offer(
            tenant, job_id, place(leases, spec), {task.queue for task in decision.due}, tasks_left(spec, observed)
        )
        return decision.due
    for child_id in going_on:
        cancel(store, tenant, child_id, datetime.now(UTC))
        leases.look_after(tenant, child_id, 0)
    if observed.cancelled and (going_on or leases.runs(tenant, job_id)):
        leases.withdraw(tenant, job_id)
        leases.look_after(tenant, job_id, SOON)
        return ()
    finish(store, spec, decision.ending)
    leases.withdraw(tenant, job_id)
    if spec.parent is not None:
        leases.look_after(tenant, spec.parent, 0)
    return ()


def _step_or_nothing(store: ObjectStore, leases: Leases, tenant: str, job_id: str) -> tuple[Task, ...]:
    """``_step``; a job that cannot be planned, for a record of its own is damaged or not given, does not keep the
    others from it. Raises ``StoreError`` where the store as a whole does not answer."""
    try:
        return _step(store, leases, tenant, job_id)
    except RedisError:
        raise
    except Exception as error:
        if isinstance(error, StoreError):
            store.ping()
        log.warning("job not planned", tenant=tenant, job=job_id, error=type(error).__name__)
        leases.withdraw(tenant, job_id)
        leases.look_later(tenant, job_id)
        return ()


def _drop(store: ObjectStore, leases: Leases, tenant: str, job_id: str) -> None:
    store.delete([active(tenant, job_id)])
    leases.withdraw(tenant, job_id)


def submit(store: ObjectStore, spec: Spec) -> None:
    """The job exists from its spec on. It is listed before that and active after, for a sweep drops what has no spec;
    submitting it again changes nothing. Where the store fails after the spec the job is accepted all the same: whoever
    submitted it plans it next, and the hourly tidy makes it active."""
    store.put(newest(spec.tenant, spec.id), b"")
    store.put_json(JobKeys(spec.tenant, spec.id).spec, spec)
    with suppress(StoreUnavailable):
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
        JOBS_ENDED.labels(spec.kind, ending.status).inc()
        log.info("job ended", tenant=spec.tenant, job=spec.id, status=ending.status, trace=spec.trace_id)
    store.delete([active(spec.tenant, spec.id)])


def active_jobs(store: ObjectStore) -> list[tuple[str, str]]:
    """(tenant, job id) of the jobs that have not ended, the oldest first: a UUIDv7 sorts by its time of creation."""
    found = (tuple(key.removeprefix(ACTIVE).split("/")) for key in store.list(ACTIVE))
    return sorted(((tenant, job_id) for tenant, job_id in found), key=lambda job: job[1])


def sweep(store: ObjectStore, leases: Leases, send: Send, token: str, seconds: float = 30.0) -> bool:
    """If the holder of ``token`` leads: plans the active jobs that nothing is known of, that were not looked at for
    long, or whose tasks were lost, then fills every queue. Says whether it leads.

    One job's failure does not keep the others from being planned.
    """
    if not leases.lead(token, seconds):
        return False
    unknown = leases.unknown(active_jobs(store))
    for tenant, job_id in dict.fromkeys([*leases.expired(), *unknown, *leases.late()]):
        if not leases.lead(token, seconds):
            return False
        _step_or_nothing(store, leases, tenant, job_id)
    fill(store, leases, send, DEPTH)
    return True
