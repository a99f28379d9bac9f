"""What lies in the store and should not, and what should and does not: found by ``fsck``, removed by ``tidy``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import structlog
from pydantic import ValidationError

from meddiff.contracts.base import sha256_hex
from meddiff.contracts.jobs import End, FinetuneSpec, GenerateSpec, Spec
from meddiff.contracts.manifest import Manifest
from meddiff.planning.observe import read_spec
from meddiff.store.keys import DatasetKeys, JobKeys, ModelKeys, active, job_of_newest, newest_root, tenant_root
from meddiff.store.objects import NotFound, ObjectStore

log = structlog.get_logger()

GRACE = timedelta(hours=1)
"""What belongs to nothing may still be on its way to belong to something: an import, a job being accepted."""

FAILED_KEPT = timedelta(days=7)
"""How long what failed and cancelled jobs left stays, for whoever wants to know why."""

IDEMPOTENCY_KEPT = timedelta(days=30)
UPLOADS_KEPT = timedelta(days=1)

RECORD = frozenset({"spec.json", "end.json", "cancel.json", "faults", "logs", "done"})
"""What stays of a job that failed or was cancelled."""

TOP = frozenset({"t", "active", "idempotency", "keys", "audit"})

Kind = Literal["missing", "altered", "orphan", "unknown"]


@dataclass(frozen=True)
class Finding:
    """``missing``: a manifest names it and it is not there. ``altered``: its bytes are not those that the manifest
    names. ``orphan``: nothing needs it any more. ``unknown``: nothing of this service's writing; never removed."""

    kind: Kind
    key: str
    why: str


@dataclass
class Verified:
    """What ``fsck`` has looked at."""

    manifests: int = 0
    pictures: int = 0


def fsck(store: ObjectStore, now: datetime, verified: Verified) -> Iterator[Finding]:
    """Every manifest checked against its pictures' bytes, and everything in the bucket that no job, model or dataset
    owns. ``verified`` counts along."""
    readable = list(_readable(store))
    for tenant in store.children("t/"):
        if tenant not in readable:
            yield Finding("unknown", f"t/{tenant}", "a record that this version does not read: see the log")
    for tenant in readable:
        for spec in _specs(store, tenant):
            yield from _manifest_findings(store, spec, verified)
    yield from orphans(store, now)
    for name in store.children(""):
        if name not in TOP:
            yield Finding("unknown", name, "not of this service's writing")


def tidy(store: ObjectStore, now: datetime) -> int:
    """Removes every orphan and returns how many there were; a job whose request was cut off before it was made active
    is so now, and of one that failed long ago the faults are forgotten. Running it twice, or beside jobs that go on,
    does no harm."""
    for tenant in _readable(store):
        for spec in _specs(store, tenant):
            end = _end(store, spec)
            if end is not None:
                _forget_faults(store, spec, end, now)
            elif not store.exists(active(tenant, spec.id)):
                store.put(active(tenant, spec.id), b"")  # One that has ended meanwhile the sweep drops again.
    removed = 0
    for finding in orphans(store, now):
        store.delete([finding.key])  # At once: later it may belong to something again.
        removed += 1
    store.abort_uploads("", now - UPLOADS_KEPT)
    return removed


def _forget_faults(store: ObjectStore, spec: Spec, end: End, now: datetime) -> None:
    """Takes the faults, which name the user's files, out of the record of a job that failed long ago."""
    if end.problem is not None and end.problem.errors and now - end.finished_at > FAILED_KEPT:
        problem = end.problem.model_copy(update={"errors": ()})
        store.put_json(JobKeys(spec.tenant, spec.id).end, end.model_copy(update={"problem": problem}))


def orphans(store: ObjectStore, now: datetime) -> Iterator[Finding]:
    """What nothing needs: leftovers of jobs that have ended, parts of what was never finished or is removed."""
    for tenant in _readable(store):
        jobs = set(store.children(tenant_root(tenant, "jobs")))
        specs = {spec.id: spec for spec in _specs(store, tenant)}
        for job_id in sorted(jobs - set(specs)):
            yield from _all_old(store, f"{JobKeys(tenant, job_id).root}/", now, "a job without a spec")
        for spec in specs.values():
            yield from _left_by(store, spec, now)
        yield from _unlisted(store, tenant, now)
        yield from _unfinished_models(store, tenant, specs.values(), now)
        for dataset_id in store.children(tenant_root(tenant, "datasets")):
            keys = DatasetKeys(tenant, dataset_id)
            if not store.exists(keys.dataset):
                yield from _all_old(store, f"{keys.root}/", now, "a dataset that was not imported whole")
    for key in store.list("idempotency/"):
        with suppress(NotFound):
            if now - store.modified(key) > IDEMPOTENCY_KEPT:
                yield Finding("orphan", key, f"an idempotency key of more than {IDEMPOTENCY_KEPT.days} days ago")


def _readable(store: ObjectStore) -> Iterator[str]:
    """The tenants all of whose jobs can be read; of another, written by a newer version or damaged, nothing may be told
    to be needed by none."""
    for tenant in store.children("t/"):
        try:
            for spec in _specs(store, tenant):
                _end(store, spec)
        except ValidationError as error:
            log.warning("records not readable", tenant=tenant, kind=error.title)
            continue
        yield tenant


def _specs(store: ObjectStore, tenant: str) -> Iterator[Spec]:
    for job_id in store.children(tenant_root(tenant, "jobs")):
        with suppress(NotFound):
            yield read_spec(store, tenant, job_id)


def _end(store: ObjectStore, spec: Spec) -> End | None:
    try:
        return store.get_json(JobKeys(spec.tenant, spec.id).end, End)
    except NotFound:
        return None


def _manifest(store: ObjectStore, spec: Spec) -> Manifest | None:
    try:
        return store.get_json(JobKeys(spec.tenant, spec.id).manifest, Manifest)
    except ValidationError as error:
        log.warning("manifest not readable", tenant=spec.tenant, job=spec.id, kind=error.title)
    except NotFound:
        pass
    return None


def _manifest_findings(store: ObjectStore, spec: Spec, verified: Verified) -> Iterator[Finding]:
    manifest = _manifest(store, spec)
    if manifest is None:
        return
    verified.manifests += 1
    for pair in manifest.pairs:
        for picture in (pair.image, pair.label, pair.shape, pair.guide):
            verified.pictures += 1
            try:
                data = store.get(picture.key)
            except NotFound:
                yield Finding("missing", picture.key, f"the manifest of job {spec.id} names it")
                continue
            if sha256_hex(data) != picture.sha256:
                yield Finding("altered", picture.key, f"not the bytes that the manifest of job {spec.id} names")


def _left_by(store: ObjectStore, spec: Spec, now: datetime) -> Iterator[Finding]:
    """What a job that has ended left and nobody will read."""
    end = _end(store, spec)
    if end is None:
        return
    keys = JobKeys(spec.tenant, spec.id)
    present = set(store.children(f"{keys.root}/"))
    if end.status in ("failed", "cancelled"):
        if now - end.finished_at > FAILED_KEPT:
            why = f"left by a job that {end.status} more than {FAILED_KEPT.days} days ago"
            yield from _below(store, keys, present - RECORD, why)
        return
    yield from _below(store, keys, present & {"cache", "checkpoints", "started"}, "a training that has ended")
    if isinstance(spec, GenerateSpec) and "candidates" in present:
        if not store.exists(keys.manifest):
            yield from _below(store, keys, {"candidates"}, "a candidate of a job whose results were removed")
            return
        if (manifest := _manifest(store, spec)) is None:
            return
        named = {picture.key for pair in manifest.pairs for picture in (pair.image, pair.label, pair.shape, pair.guide)}
        for key in store.list(keys.candidates_root):
            if key not in named:
                yield Finding("orphan", key, "a candidate beyond the last one needed")


def _below(store: ObjectStore, keys: JobKeys, names: Iterable[str], why: str) -> Iterator[Finding]:
    for name in sorted(names):
        whole = f"{keys.root}/{name}"
        if store.exists(whole):
            yield Finding("orphan", whole, why)
        yield from (Finding("orphan", key, why) for key in store.list(f"{whole}/"))


def _unlisted(store: ObjectStore, tenant: str, now: datetime) -> Iterator[Finding]:
    """Places in the list of jobs whose job was never accepted."""
    for key in store.list(newest_root(tenant)):
        if not store.exists(JobKeys(tenant, job_of_newest(key)).spec):
            yield from _all_old(store, key, now, "in the list of jobs, and there is no such job")


def _unfinished_models(store: ObjectStore, tenant: str, specs: Iterable[Spec], now: datetime) -> Iterator[Finding]:
    coming = {spec.model_id for spec in specs if isinstance(spec, FinetuneSpec) and _end(store, spec) is None}
    for model_id in sorted(set(store.children(tenant_root(tenant, "models"))) - coming):
        keys = ModelKeys(tenant, model_id)
        if not store.exists(keys.card):
            yield from _all_old(store, f"{keys.root}/", now, "a model that was not published whole")
    for key in store.list(tenant_root(tenant, "names")):
        with suppress(NotFound):
            if not store.exists(ModelKeys(tenant, json.loads(store.get(key))["model_id"]).card):
                yield Finding("orphan", key, "the name of a model that is no longer there")


def _all_old(store: ObjectStore, prefix: str, now: datetime, why: str) -> Iterator[Finding]:
    for key in store.list(prefix):
        with suppress(NotFound):
            if now - store.modified(key) > GRACE:
                yield Finding("orphan", key, why)
