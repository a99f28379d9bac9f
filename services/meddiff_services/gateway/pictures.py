"""``/jobs/{id}/…``: what a job left behind. Links never expire; a picture is sent, or redirected to where the store
serves it, if it has a public address."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Header, Path, Query, Response
from fastapi.responses import RedirectResponse
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.evaluation import Report
from meddiff.contracts.jobs import End, GenerateSpec, Preview, PreviewList, Spec
from meddiff.contracts.manifest import Manifest
from meddiff.contracts.problems import ProblemError
from meddiff.importing import load_dataset
from meddiff.store.keys import DatasetKeys, JobKeys, ModelKeys
from meddiff.store.objects import NotFound, ObjectStore

from meddiff_services.gateway.access import Here
from meddiff_services.gateway.backends import Backends
from meddiff_services.gateway.jobs import find_spec
from meddiff_services.gateway.problems import documented

router = APIRouter(tags=["results"], responses=documented("unauthenticated", "forbidden"))

PNG = "image/png"
HTML = "text/html"
_PICTURE: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": {PNG: {}}, "description": "The PNG"},
        307: {"description": "Where the store serves it"},
        **documented("not-found", "not-ready", "gone"),
    },
}


@router.get("/jobs/{job_id}/manifest", response_model=Manifest, responses=documented("not-found", "not-ready", "gone"))
def get_manifest(job_id: str, here: Here) -> Response:
    """Every synthetic pair of a generate job, where it came from, and what was turned away."""
    return Response(here.store.get(_manifest(here, job_id)), media_type="application/json")


@router.get(
    "/jobs/{job_id}/report",
    response_model=Report,
    responses={
        200: {"content": {HTML: {"schema": {"type": "string"}}}, "description": "The report, as JSON or as HTML"},
        **documented("not-found", "not-ready", "gone"),
    },
)
def get_report(
    job_id: str,
    here: Here,
    format: Annotated[Literal["json", "html"] | None, Query(description="Else as ``Accept`` prefers")] = None,
    accept: Annotated[str, Header()] = "",
) -> Response:
    """What an evaluation found: the verdict first. As HTML it is one page that needs nothing beside it."""
    wanted = format or ("html" if "html" in accept and "json" not in accept else "json")
    spec = find_spec(here, job_id)
    key = JobKeys(here.tenant, job_id).report(wanted)
    try:
        data = here.store.get(key)
    except NotFound:
        raise _missing(here, spec, "report") from None
    return Response(data, media_type=HTML if wanted == "html" else "application/json")


@router.get("/jobs/{job_id}/contact_sheet", **_PICTURE)
def get_contact_sheet(job_id: str, here: Here) -> Response:
    """Image, guide, label and overlay of the first pairs, and beside each the nearest real image."""
    _manifest(here, job_id)
    return _picture(here, JobKeys(here.tenant, job_id).contact_sheet)


@router.get("/jobs/{job_id}/pairs/{index}/background", **_PICTURE)
def get_background(job_id: str, index: int, here: Here) -> Response:
    """The picture behind a pair, found by the digest that the manifest names."""
    sha256, repaired = _pair(here, job_id, index).background
    spec = find_spec(here, job_id)
    assert isinstance(spec, GenerateSpec)
    dataset_id = spec.request.backgrounds or spec.dataset_id
    dataset = load_dataset(here.store, here.tenant, dataset_id)
    case = next((case for case in dataset.cases if case.image_sha256 == sha256), None)
    if case is None:
        raise ProblemError("not-found", "The background's case is no longer there")
    if repaired:
        return _picture(here, ModelKeys(here.tenant, spec.model_id).background(case.id))
    return _picture(here, DatasetKeys(here.tenant, dataset_id).image(case.id))


@router.get("/jobs/{job_id}/pairs/{index}/{what}", **_PICTURE)
def get_picture(job_id: str, index: int, what: Literal["image", "label", "shape", "guide"], here: Here) -> Response:
    """A picture of an accepted pair."""
    return _picture(here, _pair(here, job_id, index).keys[what])


@router.get("/jobs/{job_id}/previews", responses=documented("not-found"))
def list_previews(job_id: str, here: Here) -> PreviewList:
    """Pictures drawn while the job runs, in the order of their numbers."""
    find_spec(here, job_id)
    names = [name.removesuffix(".png") for name in here.store.children(JobKeys(here.tenant, job_id).previews)]
    previews = (Preview(name=name, uri=f"/jobs/{job_id}/previews/{name}") for name in names)
    return PreviewList(previews=tuple(previews))


@router.get("/jobs/{job_id}/previews/{name}", **_PICTURE)
def get_preview(job_id: str, name: Annotated[str, Path(pattern=r"^\d{6}\.[a-z_]+$")], here: Here) -> Response:
    """A preview by its name, e.g. ``000000.inpainter``."""
    find_spec(here, job_id)
    number, _, what = name.partition(".")
    return _picture(here, JobKeys(here.tenant, job_id).preview(int(number), what))


def _manifest(here: Backends, job_id: str) -> str:
    """The key of a job's manifest, which is there."""
    spec = find_spec(here, job_id)
    key = JobKeys(here.tenant, job_id).manifest
    if not here.store.exists(key):
        raise _missing(here, spec, "manifest")
    return key


def _missing(here: Backends, spec: Spec, what: str) -> ProblemError:
    """Why a job has none: it makes none, has not ended, or its results were removed."""
    try:
        end = here.store.get_json(JobKeys(here.tenant, spec.id).end, End)
    except NotFound:
        return ProblemError("not-ready", f"The job has no {what}, or none yet")
    makes = {"manifest": "generate", "report": "evaluate"}[what]
    if spec.kind == makes and end.status in ("succeeded", "incomplete"):
        return ProblemError("gone", f"The job's {what} and what belongs to it were removed")
    return ProblemError("not-ready", f"The job has no {what}")


class _Pair(NamedTuple):
    """Where a pair's pictures lie, and the digest of the picture behind it and whether that one is repaired."""

    keys: Mapping[str, str]
    background: tuple[str, bool]


@lru_cache(maxsize=16)
def _stored_pairs(store: ObjectStore, key: str) -> Mapping[int, _Pair]:
    """By index. A manifest never changes once it is written, and a pull asks for it with every picture; all that it
    says of a pair is ten times as much."""
    return {
        pair.index: _Pair(
            {"image": pair.image.key, "label": pair.label.key, "shape": pair.shape.key, "guide": pair.guide.key},
            (sys.intern(pair.background.sha256), pair.background.repaired),
        )
        for pair in store.get_json(key, Manifest).pairs
    }


_reading = threading.Lock()


def _pair(here: Backends, job_id: str, index: int) -> _Pair:
    key = _manifest(here, job_id)
    with _reading:  # A pull asks with several threads, and a large manifest is to be parsed once.
        pairs = _stored_pairs(here.store, key)
    if index not in pairs:
        raise ProblemError("not-found", "The manifest has no pair of that index")
    return pairs[index]


def _picture(here: Backends, key: str) -> Response:
    if here.settings.s3_public_endpoint is not None:
        return RedirectResponse(here.store.presigned_get(key), 307)
    try:
        data = here.store.get(key)
    except NotFound:
        raise ProblemError("not-found", "There is no such picture") from None
    return Response(data, media_type=PNG, headers={"ETag": f'"{sha256_hex(data)}"'})
