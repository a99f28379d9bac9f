"""Jobs as a caller sees them: read from the store, with what Redis knows where it knows anything."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from functools import lru_cache

import redis
from pydantic import ValidationError

from meddiff.contracts.jobs import End, EvaluateSpec, GenerateSpec, Job, Spec
from meddiff.contracts.tasks import Marker, Queue, Stage
from meddiff.planning import evaluation
from meddiff.planning.dispatch import active_jobs
from meddiff.planning.leases import InLine, Leases
from meddiff.planning.observe import observe, read_marker, read_spec
from meddiff.planning.plan import Observed
from meddiff.planning.progress import Measured, ended, snapshot
from meddiff.planning.turns import place
from meddiff.store.keys import JobKeys
from meddiff.store.objects import NotFound, ObjectStore

LATELY = 2.0  # Seconds that a queue position may be old.
LINES_LATELY = 1.0  # The same of the lines that an estimate goes by.
RECENT = 3  # Markers of a stage that its speed is taken from.


def read_job(
    store: ObjectStore, leases: Leases | None, tenant: str, job_id: str, clock: Callable[[], float] = time.time
) -> Job:
    """The job as it stands; without ``leases``, or where Redis is away, without live progress. Raises ``NotFound``."""
    spec = read_spec(store, tenant, job_id)
    keys = JobKeys(tenant, job_id)
    try:
        return ended(spec, store.get_json(keys.end, End), _started_at(store, spec))
    except NotFound:
        pass
    try:
        observed = observe(store, leases, spec)
    except redis.RedisError:
        leases = None
        observed = observe(store, leases, spec)
    return snapshot(spec, observed, _measure(store, leases, spec, observed, clock()))


@lru_cache(maxsize=4)
def _active_lately(store: ObjectStore, moment: int) -> list[tuple[str, str]]:
    """``active_jobs`` within a moment: many ask for their position at once."""
    return active_jobs(store)


@lru_cache(maxsize=4)
def _places_lately(leases: Leases, moment: int) -> dict[tuple[str, str], float]:
    """The places of all jobs that were planned and have not ended, within a moment."""
    return {job: place for job, (place, _) in leases.left().items()}


def _position(store: ObjectStore, places: Mapping[tuple[str, str], float], spec: Spec, own: float) -> int:
    """1 for the first of the tenant's jobs that have not ended: by their ``places``, where one has none yet by its id,
    which is as old as the job. Tenants take turns, so those of others lie not before it."""
    active = _active_lately(store, int(time.monotonic() / LATELY))
    others = [job for job in active if job[0] == spec.tenant and job[1] != spec.id]
    return 1 + sum((places.get(job, own), job[1]) < (own, spec.id) for job in others)


@lru_cache(maxsize=4)
def _lines_lately(leases: Leases, moment: int) -> dict[Queue, list[InLine]]:
    """The lines of all queues, within a moment."""
    return leases.lines(leases.took(), leases.workers())


def _measure(store: ObjectStore, leases: Leases | None, spec: Spec, observed: Observed, now: float) -> Measured:
    speeds = {
        stage: speed for stage, shards in _finished(observed).items() if (speed := _speed(store, spec, stage, shards))
    }
    started_at = _started_at(store, spec)
    waits = not observed.done and not observed.tally.shards
    known = Measured(speeds, position=_position(store, {}, spec, 0.0) if waits else None, started_at=started_at)
    if leases is None:
        return known
    try:
        workers, took = leases.workers(), leases.took()
        lines = _lines_lately(leases, int(now / LINES_LATELY)) if speeds else {}
        own = place(leases, spec)
        mine = next((one.place for line in lines.values() for one in line if one.job_id == spec.id), None)
        return replace(
            known,
            position=_position(store, _places_lately(leases, int(now / LATELY)), spec, own) if waits else None,
            live=leases.live(spec.tenant, spec.id),
            running=leases.running_of(spec.tenant, spec.id),
            workers=workers,
            children_seconds=_children_seconds(store, leases, spec, observed, max(1, workers.get("training", 0)))
            if isinstance(spec, EvaluateSpec)
            else 0,
            took=took,
            now=now,
            lines=lines,
            place=own if mine is None else mine,
            weights=leases.weights,
        )
    except redis.RedisError:
        return known


def _children_seconds(
    store: ObjectStore, leases: Leases, spec: EvaluateSpec, observed: Observed, trainers: int
) -> float | None:
    """What the child jobs will still take: each as long as those of its kind that have ended, or as the one that goes
    on expects, of which the last to end expects to wait for the others. None where neither tells."""
    if observed.imported is None or observed.splits is None:
        return None
    left = 0.0
    families = (
        evaluation.finetunes(spec, observed.imported, observed.splits),
        evaluation.generates(spec, observed.imported, observed.splits),
    )
    for children in families:
        jobs = [read_job(store, leases, one.tenant, one.id) for one in children if one.id in observed.children]
        taken = [
            (job.finished_at - job.started_at).total_seconds()
            for job in jobs
            if job.finished_at is not None and job.started_at is not None
        ]
        coming = [job.eta_seconds for job in jobs if job.finished_at is None and job.eta_seconds is not None]
        each = statistics.mean(taken) if taken else max(coming, default=None)
        waiting = len(children) - len(taken) - len(coming)
        if each is None and waiting and children is families[0]:
            return None
        left += max(coming, default=0.0) + waiting * (each or 0.0) / (trainers if children is families[0] else 1)
    return left


def _finished(observed: Observed) -> dict[Stage, Collection[int]]:
    finished: dict[Stage, Collection[int]] = dict(observed.done)
    for stage in ("masks", "inpainting", "quality"):
        if observed.tally.shards and not finished.get(stage):
            finished[stage] = range(max(0, observed.tally.shards - RECENT), observed.tally.shards)
    return finished


def _speed(store: ObjectStore, spec: Spec, stage: Stage, shards: Collection[int]) -> float | None:
    """Seconds for a unit over the most recent markers of a stage."""
    markers = [read_marker(store, spec.tenant, spec.id, stage, shard) for shard in sorted(shards)[-RECENT:]]
    units = sum(marker.units for marker in markers)
    return sum(marker.seconds for marker in markers) / units if units else None


def _started_at(store: ObjectStore, spec: Spec) -> datetime | None:
    """When the first task began: its marker's time of writing, less what it took."""
    first: Stage = "masks" if isinstance(spec, GenerateSpec) else "import"
    try:
        marker: Marker = read_marker(store, spec.tenant, spec.id, first, 0)
        written = store.modified(JobKeys(spec.tenant, spec.id).done(first, 0))
    except (NotFound, ValidationError):
        return None
    return max(spec.created_at, written - timedelta(seconds=marker.seconds))
