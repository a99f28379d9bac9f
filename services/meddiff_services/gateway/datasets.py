"""``/datasets``: judged and imported at once, every fault in one answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import IO, Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Response
from meddiff.contracts.dataset import Dataset, DatasetList, DatasetSummary, ValidationReport
from meddiff.contracts.problems import Fault, ProblemError, problem
from meddiff.importing import (
    Archive,
    Source,
    import_dataset,
    is_dataset_id,
    load_dataset,
    open_source,
    validate,
)
from meddiff.planning.removal import remove_dataset
from meddiff.store.keys import tenant_root
from pydantic import ValidationError

from meddiff_services.gateway.access import Here
from meddiff_services.gateway.backends import Backends
from meddiff_services.gateway.bodies import SOURCE_BODY, dataset_source
from meddiff_services.gateway.pages import Cursor, Derived, Limit, page, shown_last
from meddiff_services.gateway.problems import documented

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=documented("unauthenticated", "forbidden"))

Origin = Annotated[str | IO[bytes], Depends(dataset_source)]
INVALID = problem("invalid-dataset", "").type
_REFUSALS = documented(
    "invalid-dataset", "invalid-request", "not-found", "source-refused", "source-unreachable", "too-large"
)


@router.post("", status_code=201, responses=_REFUSALS, openapi_extra=SOURCE_BODY)
async def create_dataset(origin: Origin, here: Here, response: Response) -> DatasetSummary:
    """Import a zip archive, or what a URI names. The same data again is the same dataset, as is one named by its id."""

    def imported() -> Dataset:
        if isinstance(origin, str) and is_dataset_id(origin):
            return load_dataset(here.store, here.tenant, origin)
        with _opened(origin, here) as source:
            return import_dataset(
                source, here.store, here.tenant, lambda done, total: None, here.settings.max_dataset_bytes
            )

    dataset = await run_sync(imported, limiter=here.reading)
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return dataset.summary()


@router.post("/validate", responses=_REFUSALS, openapi_extra=SOURCE_BODY)
async def validate_dataset(origin: Origin, here: Here) -> ValidationReport:
    """Judge a zip archive, or what a URI names, without keeping anything: every fault of every file."""
    return await run_sync(_judged, origin, here, limiter=here.reading)


def _judged(origin: str | IO[bytes], here: Backends) -> ValidationReport:
    if isinstance(origin, str) and is_dataset_id(origin):
        held = load_dataset(here.store, here.tenant, origin).summary()
        return ValidationReport(valid=True, dataset_id=held.id, **held.model_dump(exclude={"id"}))
    try:
        with _opened(origin, here) as source:
            return validate(source)
    except ProblemError as error:
        if error.problem.type != INVALID:
            raise
        errors = error.problem.errors or (Fault(pointer="/", detail=error.problem.detail),)
        return ValidationReport(valid=False, layout=None, pairs=0, backgrounds=0, unlabelled=0, errors=errors)


@router.get("")
def list_datasets(here: Here, cursor: Cursor = None, limit: Limit = 100) -> DatasetList:
    """Datasets, in order of id."""
    after = shown_last(cursor) or ""
    ids = (one for one in here.store.children(tenant_root(here.tenant, "datasets")) if one > after)
    datasets, following = page(_summaries(here, ids), limit, lambda one: one.id)
    return DatasetList(datasets=datasets, next=following)


@router.get("/{dataset_id}", responses=documented("not-found"))
def get_dataset(dataset_id: str, here: Here) -> Dataset:
    """A dataset with every case."""
    return load_dataset(here.store, here.tenant, dataset_id)


@router.delete("/{dataset_id}", status_code=204, responses=documented("not-found", "conflict"))
def delete_dataset(dataset_id: str, here: Here, derived: Derived = False) -> None:
    """Remove a dataset. What holds it is named in a 409: jobs that go on, and models and pairs made from it, which go
    with it where ``derived`` is asked for."""
    load_dataset(here.store, here.tenant, dataset_id)
    remove_dataset(here.store, here.tenant, dataset_id, derived=derived)


def _summaries(here: Backends, ids: Iterable[str]) -> Iterator[DatasetSummary]:
    for dataset_id in ids:
        with suppress(ProblemError, ValidationError):
            yield load_dataset(here.store, here.tenant, dataset_id).summary()


def _opened(origin: str | IO[bytes], here: Backends) -> AbstractContextManager[Source]:
    """What the URI names, or the uploaded archive."""
    if isinstance(origin, str):
        return open_source(origin, here.settings, here.store, here.tenant)
    return nullcontext(Archive(origin))
