"""``/finetune``, ``/generate``, ``/evaluate`` and ``/jobs``: accepting jobs, telling how they stand, stopping them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent
from meddiff.contracts.jobs import ENDED, Job, JobList, Kind, Spec, Status
from meddiff.contracts.problems import Fault, ProblemError
from meddiff.contracts.requests import EvaluateRequest, FinetuneRequest, GenerateRequest
from meddiff.planning.dispatch import active_jobs, advance, cancel
from meddiff.planning.jobs import read_job
from meddiff.planning.leases import Leases
from meddiff.planning.observe import read_spec
from meddiff.store.keys import JobKeys, job_of_newest, newest, newest_root
from meddiff.store.objects import NotFound, StoreError
from pydantic import ValidationError
from redis.exceptions import RedisError

from meddiff_services.gateway.acceptance import accept, evaluate_spec, finetune_spec, generate_spec
from meddiff_services.gateway.access import Here, still_admitted
from meddiff_services.gateway.backends import Backends
from meddiff_services.gateway.pages import Cursor, Limit, page, uuid_shown_last
from meddiff_services.gateway.problems import UNREACHABLE, documented
from meddiff_services.gateway.snapshots import Told

router = APIRouter(tags=["jobs"], responses=documented("unauthenticated", "forbidden"))
log = structlog.get_logger()

POLL_SECONDS = 1.0
EVENTS_RETRY_MILLISECONDS = 2000
RETRY_AFTER = {"Retry-After": "2"}

_JOB_ID = re.compile(r"^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$")
_HEADERS = {
    name: {"schema": {"type": "string"}, "description": text}
    for name, text in {"Location": "The job's address", "Retry-After": "Seconds until it is worth asking again"}.items()
}
_ACCEPTED: dict[int | str, dict[str, Any]] = {202: {"description": "The job", "headers": _HEADERS}}
_REFUSED = documented("source-refused", "too-large", "too-many-jobs")
_KEY = Header(
    min_length=1,
    max_length=255,
    description="The same key with the same request gives the first job again; with another one, 422",
)
FINETUNE_EXAMPLES: dict[str, Any] = {
    "bucket": {"value": {"dataset_uri": "s3://hospital/skin/pairs.zip", "name": "skin", "recipe": {"name": "gpu"}}},
    "quick": {
        "value": {
            "dataset_uri": "ds_0123456789abcdef0123456789abcdef",
            "max_pairs": 30,
            "recipe": {"name": "cpu", "override": {"finetuning": {"steps": 120}}},
        }
    },
}
GENERATE_EXAMPLES: dict[str, Any] = {
    "by name": {"value": {"model": "skin", "count": 64, "seed": 7}},
    "go on": {"value": {"model": "skin", "count": 64, "seed": 7, "start_index": 128}},
}
EVALUATE_EXAMPLES: dict[str, Any] = {
    "thirty cases": {"value": {"dataset_uri": "s3://hospital/skin/pairs.zip", "folds": 5}},
    "pairs that are there": {
        "value": {
            "dataset_uri": "ds_0123456789abcdef0123456789abcdef",
            "synthetic_job": "0197f000-0000-7000-8000-000000000001",
            "synthetic": [64],
        }
    },
}
IdempotencyKey = Annotated[str | None, _KEY]


@router.post("/finetune", status_code=202, responses={**_ACCEPTED, **_REFUSED})
def finetune(
    request: Annotated[FinetuneRequest, Body(openapi_examples=FINETUNE_EXAMPLES)],
    here: Here,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Make a model from a dataset. Body, URI and rights are judged at once, the dataset's content by the job."""
    return _accepted(here, accept(here, request, finetune_spec, idempotency_key), response)


@router.post("/generate", status_code=202, responses={**_ACCEPTED, **documented("too-large", "too-many-jobs")})
def generate(
    request: Annotated[GenerateRequest, Body(openapi_examples=GENERATE_EXAMPLES)],
    here: Here,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Make ``count`` accepted pairs with a model."""
    return _accepted(here, accept(here, request, generate_spec, idempotency_key), response)


@router.post("/evaluate", status_code=202, responses={**_ACCEPTED, **_REFUSED})
def evaluate(
    request: Annotated[EvaluateRequest, Body(openapi_examples=EVALUATE_EXAMPLES)],
    here: Here,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Find out what synthetic pairs are worth: segmenters with and without them, on cases that had no part in making
    them."""
    return _accepted(here, accept(here, request, evaluate_spec, idempotency_key), response)


@router.get("/jobs")
def list_jobs(
    here: Here,
    kind: Annotated[Kind | None, Query(description="Only of this kind")] = None,
    status: Annotated[Status | None, Query(description="Only of this status")] = None,
    metadata: Annotated[list[str] | None, Query(description="Only with this ``name:value``; repeatable")] = None,
    cursor: Cursor = None,
    limit: Limit = 20,
) -> JobList:
    """Jobs, newest first."""
    wanted = _pairs(metadata or [])
    last = uuid_shown_last(cursor)
    unfinished = status is not None and status not in ENDED
    known = _unfinished(here, last) if unfinished else _newest(here, newest(here.tenant, last) if last else None)
    specs = (spec for spec in known if kind in (None, spec.kind) and wanted.items() <= spec.request.metadata.items())
    jobs, following = page((job for job in _read_all(here, specs) if status in (None, job.status)), limit, _id_of)
    return JobList(jobs=jobs, next=following)


@router.get(
    "/jobs/{job_id}", response_model=Job, responses={304: {"description": "Unchanged"}, **documented("not-found")}
)
async def get_job(
    job_id: str,
    here: Here,
    if_none_match: Annotated[str | None, Header(description="The ``ETag`` of an earlier answer")] = None,
    wait: Annotated[float, Query(ge=0, le=60, description="Seconds to wait for a change")] = 0,
) -> Response:
    """Where the job stands, at most a quarter of a second old. With ``wait`` the answer comes once the job differs from
    ``If-None-Match`` (or, without it, from what it is now), has ended, or the time is over."""
    deadline = time.monotonic() + wait
    known = if_none_match
    while True:
        told = await _told(here, job_id)
        known = known or told.tag
        if told.tag != known or told.ended or time.monotonic() >= deadline:
            break
        await asyncio.sleep(POLL_SECONDS)
    headers = {"ETag": told.tag} if told.ended else {"ETag": told.tag, **RETRY_AFTER}
    if told.tag == if_none_match:
        return Response(status_code=304, headers=headers)
    return Response(told.body, media_type="application/json", headers=headers)


def _known(job_id: str, here: Here) -> Spec:
    return find_spec(here, job_id)


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse, responses=documented("not-found"))
async def follow_job(
    request: Request,
    spec: Annotated[Spec, Depends(_known)],
    here: Here,
    last_event_id: Annotated[str | None, Header(description="The id of the last event that was seen")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events (WHATWG HTML, section 9.2): the whole job, as ``GET /jobs/{id}`` has it, now and after every
    change, until it has ended. An event's id stands for the state it tells; who comes back with ``Last-Event-ID`` hears
    of what has changed since, and nothing twice. They end where the key is revoked."""
    known = last_event_id
    while True:
        try:
            if not await still_admitted(request, here):
                return
            told = await _told(here, spec.id)
        except UNREACHABLE:
            yield ServerSentEvent(comment="the store does not answer")
            await asyncio.sleep(POLL_SECONDS)
            continue
        if told.tag != known:
            yield ServerSentEvent(
                raw_data=told.body.decode(), event="job", id=told.tag, retry=EVENTS_RETRY_MILLISECONDS
            )
            known = told.tag
        if told.ended:
            return
        await asyncio.sleep(POLL_SECONDS)


@router.post("/jobs/{job_id}/cancel", status_code=202, responses={**_ACCEPTED, **documented("not-found")})
def cancel_job(job_id: str, here: Here, response: Response) -> Job:
    """Ask a job to stop: ``cancelling`` until every worker has let go. A job that has ended stays as it is."""
    spec = find_spec(here, job_id)
    here.snapshots.drop(spec.tenant, spec.id)
    if not here.store.exists(JobKeys(spec.tenant, spec.id).end):
        cancel(here.store, spec.tenant, spec.id, datetime.now(UTC))
    return _accepted(here, spec, response)


def find_spec(here: Backends, job_id: str) -> Spec:
    """What was asked. Raises ``ProblemError`` ``not-found``."""
    try:
        if _JOB_ID.match(job_id):
            return read_spec(here.store, here.tenant, job_id)
    except NotFound:
        pass
    raise ProblemError("not-found", "There is no job of that id")


def _accepted(here: Backends, spec: Spec, response: Response) -> Job:
    """The job as it stands after a first step. Where that step fails the sweep will take it: the job exists."""
    try:
        advance(here.store, here.leases, here.send, spec.tenant, spec.id)
    except UNREACHABLE as error:
        log.warning("job left to the sweep", tenant=spec.tenant, job=spec.id, error=type(error).__name__)
    response.headers.update({"Location": f"/jobs/{spec.id}", **RETRY_AFTER})
    return read_job(here.store, here.leases, spec.tenant, spec.id)


async def _told(here: Backends, job_id: str) -> Told:
    """The job as it was told a moment ago, else as it is. Raises ``ProblemError`` ``not-found``."""
    lately = here.snapshots.get(here.tenant, job_id)
    return lately if lately is not None else await run_in_threadpool(_read, here, job_id)


def _read(here: Backends, job_id: str) -> Told:
    spec = find_spec(here, job_id)
    return here.snapshots.keep(spec.tenant, read_job(here.store, here.leases, spec.tenant, spec.id))


def _read_all(here: Backends, specs: Iterable[Spec]) -> Iterator[Job]:
    """The jobs as they stand; one with a record that is damaged, or that the store, which answers, does not give, is
    left out. Where Redis is away it is asked once, not for every job."""
    leases: Leases | None = here.leases
    try:
        here.leases.client.ping()
    except RedisError:
        leases = None
    for spec in specs:
        try:
            yield read_job(here.store, leases, spec.tenant, spec.id)
        except StoreError:
            here.store.ping()
        except (ValidationError, NotFound):
            continue


def _id_of(job: Job) -> str:
    return job.id


def _unfinished(here: Backends, last: str | None) -> Iterator[Spec]:
    """Specs of the jobs that have not ended, newest first, those after ``last``: few, however long the history is."""
    for tenant, job_id in reversed(active_jobs(here.store)):
        if tenant == here.tenant and (last is None or job_id < last):
            with suppress(NotFound, ValidationError):
                yield read_spec(here.store, tenant, job_id)


def _newest(here: Backends, start_after: str | None) -> Iterator[Spec]:
    """Specs of all jobs; one that a newer version wrote, or that is damaged, does not keep the others from the list."""
    for key in here.store.list(newest_root(here.tenant), start_after):
        with suppress(NotFound, ValidationError):
            yield read_spec(here.store, here.tenant, job_of_newest(key))


def _pairs(metadata: Sequence[str]) -> dict[str, str]:
    """``["ward:3"]`` as ``{"ward": "3"}``. Raises ``ProblemError``."""
    faults = [
        Fault(pointer="?metadata", detail=f"not of the form name:value: {one}") for one in metadata if ":" not in one
    ]
    if faults:
        raise ProblemError("invalid-request", f"{len(faults)} fault(s) in the request", faults)
    return {name: value for name, _, value in (one.partition(":") for one in metadata)}
