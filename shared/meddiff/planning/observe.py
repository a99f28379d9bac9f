"""Reads what exists of a job. Markers are small and immutable; of a long job only what lies beyond its watermark is
listed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from meddiff.contracts.evaluation import Split
from meddiff.contracts.jobs import End, EvaluateSpec, FinetuneSpec, GenerateSpec, Spec
from meddiff.contracts.tasks import Marker, Stage, TaskFault
from meddiff.planning import evaluation
from meddiff.planning.leases import Leases
from meddiff.planning.plan import Observed
from meddiff.planning.selection import Entry, Tally, fold, is_full
from meddiff.store.keys import JobKeys
from meddiff.store.objects import NotFound, ObjectStore, StoreError

_SPEC: TypeAdapter[Spec] = TypeAdapter(Annotated[Spec, Field(discriminator="kind")])
_SHARD_STAGES: tuple[Stage, ...] = ("masks", "inpainting", "quality")


@lru_cache(maxsize=1024)
def read_spec(store: ObjectStore, tenant: str, job_id: str) -> Spec:
    """What was asked. Raises ``NotFound``: there is no such job."""
    return _SPEC.validate_json(store.get(JobKeys(tenant, job_id).spec))


@lru_cache(maxsize=1024)
def read_marker(store: ObjectStore, tenant: str, job_id: str, stage: Stage, shard: int) -> Marker:
    """What a finished task left. Raises ``NotFound``: it is not finished."""
    return store.get_json(JobKeys(tenant, job_id).done(stage, shard), Marker)


def observe(store: ObjectStore, leases: Leases | None, spec: Spec) -> Observed:
    """All that the plan needs to know of a job that has not ended; ``leases`` only spare it from reading all again. To
    stop, a job needs none of its records, so one that is damaged or lost does not keep it from that."""
    present = store.children(f"{JobKeys(spec.tenant, spec.id).root}/")
    cancelled = "cancel.json" in present
    try:
        return _observed(store, leases, spec, present, cancelled)
    except (ValidationError, NotFound, StoreError, KeyError):
        if not cancelled:
            raise
        return Observed(cancelled=True)


def _observed(
    store: ObjectStore, leases: Leases | None, spec: Spec, present: Collection[str], cancelled: bool
) -> Observed:
    keys = JobKeys(spec.tenant, spec.id)
    faults = _faults(store, keys) if "faults" in present else {}
    if isinstance(spec, GenerateSpec):
        tally = observe_tally(store, leases, spec) if "done" in present else Tally()
        beyond = _done_beyond(store, keys, tally.shards) if "done" in present else {}
        return Observed(beyond, tally=tally, faults=faults, cancelled=cancelled)
    done = _done(store, keys) if "done" in present else {}
    imported = _output(store, spec, "import") if 0 in done.get("import", ()) else None
    if isinstance(spec, FinetuneSpec):
        return Observed(done, imported, faults=faults, cancelled=cancelled)
    split = _output(store, spec, "split")["splits"] if 0 in done.get("split", ()) else None
    splits = None if split is None else tuple(Split.model_validate(one) for one in split)
    reported = _output(store, spec, "report") if 0 in done.get("report", ()) else None
    children = _children(store, spec, imported, splits) if imported is not None and splits is not None else {}
    return Observed(
        done, imported, faults=faults, cancelled=cancelled, splits=splits, reported=reported, children=children
    )


def _children(
    store: ObjectStore, spec: EvaluateSpec, imported: dict[str, Any], splits: tuple[Split, ...]
) -> dict[str, End | None]:
    children: list[FinetuneSpec | GenerateSpec] = [*evaluation.finetunes(spec, imported, splits)]
    children += evaluation.generates(spec, imported, splits)
    found: dict[str, End | None] = {}
    for child in children:
        keys = JobKeys(child.tenant, child.id)
        try:
            found[child.id] = store.get_json(keys.end, End)
        except NotFound:
            if store.exists(keys.spec):
                found[child.id] = None
    return found


def observe_tally(store: ObjectStore, leases: Leases | None, spec: GenerateSpec) -> Tally:
    """The tally of a generate job up to its watermark: carried on from the cached one, or from nothing."""
    known = leases.tally(spec.tenant, spec.id) if leases is not None else Tally()
    if is_full(known, spec):
        return known
    tally = fold(known, list(_scored(store, spec, known.shards)), spec)
    if leases is not None and tally.shards > known.shards:
        leases.keep_tally(spec.tenant, spec.id, tally)
    return tally


def _scored(store: ObjectStore, spec: GenerateSpec, first: int) -> Iterator[list[Entry]]:
    """Candidates of the scored shards from ``first`` on, up to the first gap."""
    keys = JobKeys(spec.tenant, spec.id)
    for expected, shard in enumerate(_shards(store, keys, "quality", first), start=first):
        if shard != expected:
            return
        marker = store.get_json(keys.done("quality", shard), Marker)
        yield [Entry.model_validate(candidate) for candidate in marker.output["candidates"]]


def _output(store: ObjectStore, spec: Spec, stage: Stage, shard: int = 0) -> dict[str, Any]:
    return read_marker(store, spec.tenant, spec.id, stage, shard).output


def _done(store: ObjectStore, keys: JobKeys) -> dict[Stage, frozenset[int]]:
    found: dict[Any, set[int]] = {}
    for key in store.list(keys.done_root):
        stage, name = key.removeprefix(keys.done_root).split("/")
        found.setdefault(stage, set()).add(int(name.removesuffix(".json")))
    return {stage: frozenset(shards) for stage, shards in found.items()}


def _done_beyond(store: ObjectStore, keys: JobKeys, watermark: int) -> dict[Stage, frozenset[int]]:
    done = {stage: frozenset(_shards(store, keys, stage, watermark)) for stage in _SHARD_STAGES}
    return done | {"manifest": frozenset(_shards(store, keys, "manifest", 0))}


def _shards(store: ObjectStore, keys: JobKeys, stage: Stage, first: int) -> Iterator[int]:
    """Shards of a stage that are done, from ``first`` on, ascending."""
    folder = f"{keys.done_root}{stage}/"
    for key in store.list(folder, start_after=keys.done(stage, first - 1) if first else None):
        yield int(key.removeprefix(folder).removesuffix(".json"))


def _faults(store: ObjectStore, keys: JobKeys) -> dict[tuple[Stage, int], tuple[str, ...]]:
    errors: dict[tuple[Stage, int], tuple[str, ...]] = {}
    for key in store.list(keys.faults_root):
        try:
            fault = store.get_json(key, TaskFault)
        except NotFound:
            continue
        task = (fault.stage, fault.shard)
        errors[task] = (*errors.get(task, ()), fault.error)
    return errors
