"""Taking away datasets, models and what jobs left, whole or resumably: what names a thing goes before its parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from meddiff.contracts.base import DatasetId, ModelId
from meddiff.contracts.jobs import EvaluateSpec, FinetuneSpec, Spec
from meddiff.contracts.models import ModelCard
from meddiff.contracts.problems import Fault, ProblemError
from meddiff.importing import is_dataset_id
from meddiff.planning.observe import read_marker, read_spec
from meddiff.store.keys import DatasetKeys, JobKeys, ModelKeys, job_of_newest, model_name, newest_root, tenant_root
from meddiff.store.objects import NotFound, ObjectStore

RECORD = ("spec.json", "end.json")
"""What stays of a job whose results are gone: that it was, and how it ended."""


@dataclass(frozen=True)
class Derived:
    """What was made from a dataset or with a model: models, and jobs with what they left."""

    models: tuple[ModelCard, ...]
    jobs: tuple[Spec, ...]


def remove_dataset(store: ObjectStore, tenant: str, dataset_id: DatasetId, *, derived: bool) -> None:
    """Removes a dataset, and with ``derived`` the models and pairs made from it.

    Raises ``ProblemError`` ``conflict`` with all that holds it: jobs that go on, and, without ``derived``, models and
    jobs made from it.
    """
    made = _from_dataset(store, tenant, dataset_id)
    _release(store, tenant, made, "dataset", derived=derived)
    for job in made.jobs:
        clear_job(store, tenant, job.id)
    for card in made.models:
        _remove_model(store, tenant, card)
    for job in made.jobs:
        if isinstance(job, FinetuneSpec):  # One that did not come to a model has left parts of it.
            store.delete_prefix(f"{ModelKeys(tenant, job.model_id).root}/")
    keys = DatasetKeys(tenant, dataset_id)
    store.delete([keys.dataset])
    store.delete_prefix(f"{keys.root}/")


def remove_model(store: ObjectStore, tenant: str, card: ModelCard, *, derived: bool) -> None:
    """Removes a model, and with ``derived`` the pairs made with it. Raises as ``remove_dataset`` does."""
    jobs = tuple(_specs(store, tenant))
    made = Derived((), _with_evaluations([spec for spec in jobs if _uses_model(spec, card.id)], jobs))
    _release(store, tenant, made, "model", derived=derived)
    for job in made.jobs:
        clear_job(store, tenant, job.id)
    _remove_model(store, tenant, card)


def clear_job(store: ObjectStore, tenant: str, job_id: str) -> None:
    """Removes what a job that has ended left, but its record."""
    store.delete(_results(store, tenant, job_id))
    store.abort_uploads(f"{JobKeys(tenant, job_id).root}/")


def _specs(store: ObjectStore, tenant: str) -> Iterator[Spec]:
    """Every job of the tenant, newest first. Raises ``ValidationError``, as ``_cards`` does."""
    for key in store.list(newest_root(tenant)):
        with suppress(NotFound):
            yield read_spec(store, tenant, job_of_newest(key))


def readable_cards(store: ObjectStore, tenant: str) -> Iterator[ModelCard]:
    """Every model of the tenant, in order of id, but those that a newer version wrote."""
    for model_id in store.children(tenant_root(tenant, "models")):
        with suppress(NotFound, ValidationError):
            yield store.get_json(ModelKeys(tenant, model_id).card, ModelCard)


def _cards(store: ObjectStore, tenant: str) -> Iterator[ModelCard]:
    """Every model of the tenant. Raises ``ValidationError``: of one that cannot be read nobody knows whether it goes
    too."""
    for model_id in store.children(tenant_root(tenant, "models")):
        with suppress(NotFound):
            yield store.get_json(ModelKeys(tenant, model_id).card, ModelCard)


def _from_dataset(store: ObjectStore, tenant: str, dataset_id: DatasetId) -> Derived:
    models = tuple(card for card in _cards(store, tenant) if card.dataset_id == dataset_id)
    of_models = {card.id for card in models}
    jobs = tuple(_specs(store, tenant))
    using = [
        spec
        for spec in jobs
        if dataset_id in _datasets(store, spec) or any(_uses_model(spec, model_id) for model_id in of_models)
    ]
    return Derived(models, _with_evaluations(using, jobs))


def _with_evaluations(using: Sequence[Spec], jobs: Sequence[Spec]) -> tuple[Spec, ...]:
    """The jobs ``using`` what is to go, and the evaluations whose pairs are theirs: given, or made by a child."""
    ids = {spec.id for spec in using}
    parents = {spec.parent for spec in using}
    read = [
        spec for spec in jobs if isinstance(spec, EvaluateSpec) and (spec.synthetic_job in ids or spec.id in parents)
    ]
    return tuple({spec.id: spec for spec in (*using, *read)}.values())


def _datasets(store: ObjectStore, spec: Spec) -> set[str | None]:
    """Ids of the datasets that a job reads."""
    if not isinstance(spec, FinetuneSpec | EvaluateSpec):
        return {spec.dataset_id, spec.request.masks, spec.request.backgrounds}
    uris = {spec.request.dataset_uri}
    if isinstance(spec, EvaluateSpec):
        uris |= {spec.request.test_uri or "", spec.model_dataset_id or ""}
    found: set[str | None] = {uri for uri in uris if is_dataset_id(uri)}
    with suppress(NotFound):
        imported = read_marker(store, spec.tenant, spec.id, "import", 0).output
        found |= {imported["dataset_id"], imported.get("test_dataset_id")}
    return found


def _uses_model(spec: Spec, model_id: ModelId) -> bool:
    return not isinstance(spec, FinetuneSpec) and spec.model_id == model_id


def _release(store: ObjectStore, tenant: str, made: Derived, what: str, *, derived: bool) -> None:
    going_on = [spec for spec in made.jobs if not store.exists(JobKeys(tenant, spec.id).end)]
    faults = [Fault(pointer=f"/jobs/{spec.id}", detail="the job goes on; cancel it first") for spec in going_on]
    if not derived:
        detail = f"made from this {what}; it goes too with ?derived=true"
        faults += [Fault(pointer=f"/models/{card.id}", detail=detail) for card in made.models]
        left = [spec for spec in made.jobs if spec not in going_on and any(_results(store, tenant, spec.id))]
        faults += [Fault(pointer=f"/jobs/{spec.id}", detail=detail) for spec in left]
    if faults:
        raise ProblemError("conflict", f"{len(faults)} thing(s) hold the {what}", faults)


def _results(store: ObjectStore, tenant: str, job_id: str) -> Iterator[str]:
    """Keys of what a job left beside its record. Folders tell nothing: a store may show one that is empty."""
    root = f"{JobKeys(tenant, job_id).root}/"
    return (key for key in store.list(root) if key.removeprefix(root) not in RECORD)


def _remove_model(store: ObjectStore, tenant: str, card: ModelCard) -> None:
    keys = ModelKeys(tenant, card.id)
    if card.name is not None:
        pointer = model_name(tenant, card.name)
        with suppress(NotFound):
            if json.loads(store.get(pointer))["model_id"] == card.id:
                store.delete([pointer])
    store.delete([keys.card])
    store.delete_prefix(f"{keys.root}/")
