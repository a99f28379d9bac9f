"""Jobs as a caller sees them: read from the store, with what Redis knows where it knows anything."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

import redis

from meddiff.contracts.base import Stored
from meddiff.contracts.jobs import End, FinetuneSpec, Job, Spec
from meddiff.contracts.tasks import Marker, Stage
from meddiff.planning.dispatch import active_jobs
from meddiff.planning.leases import Leases
from meddiff.planning.observe import observe, read_marker, read_spec
from meddiff.planning.plan import Observed
from meddiff.planning.progress import Measured, ended, snapshot
from meddiff.store.keys import JobKeys
from meddiff.store.objects import NotFound, ObjectStore

RECENT = 3  # Markers of a stage that its speed is taken from.


class Cancel(Stored):
    """``cancel.json``: a request to stop."""

    requested_at: datetime


def read_job(store: ObjectStore, leases: Leases, tenant: str, job_id: str) -> Job:
    """The job as it stands. Raises ``NotFound``. Without Redis it is told without live progress and position."""
    spec = read_spec(store, tenant, job_id)
    keys = JobKeys(tenant, job_id)
    try:
        return ended(spec, store.get_json(keys.end, End), _started_at(store, spec))
    except NotFound:
        pass
    try:
        observed = observe(store, leases, spec)
    except redis.RedisError:
        observed = observe(store, None, spec)
    return snapshot(spec, observed, _measure(store, leases, spec, observed))


def cancel(store: ObjectStore, tenant: str, job_id: str, now: datetime) -> None:
    """Asks the job to stop; asking again, or after its end, changes nothing. Raises ``NotFound``."""
    read_spec(store, tenant, job_id)
    store.put_json(JobKeys(tenant, job_id).cancel, Cancel(requested_at=now))


def _measure(store: ObjectStore, leases: Leases, spec: Spec, observed: Observed) -> Measured:
    speeds = {
        stage: speed for stage, shards in _finished(observed).items() if (speed := _speed(store, spec, stage, shards))
    }
    started_at = _started_at(store, spec)
    position = None
    if not observed.done and not observed.tally.shards:
        position = 1 + sum(job_id < spec.id for _, job_id in active_jobs(store))
    try:
        leased = leases.snapshot()
        live = leases.live(spec.tenant, spec.id)
        running = leased.runs(spec.tenant, spec.id)
        return Measured(speeds, live, running, leased.workers, position, started_at)
    except redis.RedisError:
        return Measured(speeds, started_at=started_at, position=position)


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
    first: Stage = "import" if isinstance(spec, FinetuneSpec) else "masks"
    try:
        marker: Marker = read_marker(store, spec.tenant, spec.id, first, 0)
        written = store.modified(JobKeys(spec.tenant, spec.id).done(first, 0))
    except NotFound:
        return None
    return max(spec.created_at, written - timedelta(seconds=marker.seconds))
