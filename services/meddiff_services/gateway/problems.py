"""Every error the gateway answers: RFC 9457 problems, documented and produced in one place."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kombu.exceptions import OperationalError
from meddiff.contracts.problems import STATUS, TITLE, Fault, Problem, ProblemError, ProblemSlug, problem
from meddiff.store.objects import NotFound, StoreError
from pydantic import ValidationError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

MEDIA_TYPE = "application/problem+json"
UNREACHABLE = (StoreError, RedisError, OperationalError)
"""What the object store, redis-py and Celery raise when their server does not answer."""

_HEADERS = {
    STATUS["unavailable"]: {"Retry-After": "5"},
    STATUS["too-many-jobs"]: {"Retry-After": "30"},
    STATUS["unauthenticated"]: {"WWW-Authenticate": "Bearer"},
}
_SLUG_OF_STATUS: dict[int, ProblemSlug] = {400: "invalid-request", 404: "not-found", 413: "too-large"}

log = structlog.get_logger()


def documented(*slugs: ProblemSlug) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses of a route that may answer these problems."""
    by_status: dict[int | str, list[ProblemSlug]] = {}
    for slug in slugs:
        by_status.setdefault(STATUS[slug], []).append(slug)
    return {
        status: {
            "description": "; ".join(TITLE[slug] for slug in of_status),
            "content": {
                MEDIA_TYPE: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "examples": {slug: {"value": _example(slug)} for slug in of_status},
                }
            },
        }
        for status, of_status in by_status.items()
    }


def faults_of(errors: Iterable[Mapping[str, Any]], prefix: tuple[str | int, ...] = ()) -> list[Fault]:
    """Pydantic's errors as faults. FastAPI's locations begin with ``body``, ``query``, ``path`` or ``header``: of the
    body the pointer is a JSON pointer (RFC 6901), of the others the parameter's name after a ``?``."""
    return [Fault(pointer=_pointer((*prefix, *error["loc"])), detail=_detail(error)) for error in errors]


def install(app: FastAPI) -> None:
    """Lets ``app`` answer every exception with a problem."""

    @app.exception_handler(ProblemError)
    async def known(request: Request, error: ProblemError) -> JSONResponse:
        return _respond(request, error.problem)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = faults_of(error.errors())
        return _respond(request, problem("invalid-request", f"{len(faults)} fault(s) in the request", faults))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return _respond(request, _http_problem(request, error), error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return _respond(request, problem("invalid-request", "The request was cut off"))

    async def unreachable(request: Request, error: Exception) -> JSONResponse:
        log.warning("backend unreachable", error=type(error).__name__, route=request.url.path)
        return _respond(request, problem("unavailable", "Redis or the object store does not answer; try again"))

    async def unreadable(request: Request, error: Exception) -> JSONResponse:
        log.error("record not readable", error=type(error).__name__, trace=_places(error))
        detail = "A record that this needs was written by another version of the service, or is damaged or gone"
        return _respond(request, problem("unavailable", detail))

    for unread in (ValidationError, NotFound):
        app.add_exception_handler(unread, unreadable)
    for kind in UNREACHABLE:
        app.add_exception_handler(kind, unreachable)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected", error=type(error).__name__, trace=_places(error))
        return _respond(request, problem("internal", "An unexpected fault; the service's log has it"))


def _places(error: Exception) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


def _respond(request: Request, found: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    body = found.model_copy(update={"instance": request.url.path}).model_dump(mode="json")
    own = _HEADERS.get(found.status, {})
    return JSONResponse(body, found.status, {**own, **(headers or {})}, media_type=MEDIA_TYPE)


def _http_problem(request: Request, error: HTTPException) -> Problem:
    slug = _SLUG_OF_STATUS.get(error.status_code)
    if slug == "not-found":
        return problem(slug, "No such address; /openapi.json lists them all")
    if slug is not None:
        return problem(slug, error.detail)
    status = HTTPStatus(error.status_code)
    return Problem(type="about:blank", title=status.phrase, status=status, detail=f"{request.method}: {error.detail}")


def _pointer(location: tuple[str | int, ...]) -> str:
    where, *path = location
    if where != "body":
        return "?" + "/".join(map(str, path))
    if path and isinstance(path[-1], int) and len(path) == 1:
        return ""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def _detail(error: Mapping[str, Any]) -> str:
    reason = error.get("ctx", {}).get("error", "")
    return str(reason or error["msg"])


def _example(slug: ProblemSlug) -> dict[str, Any]:
    faults = {
        "invalid-request": [Fault(pointer="/count", detail="Input should be greater than or equal to 1")],
        "invalid-dataset": [Fault(pointer="masks/017.png", detail="a mask without an image")],
    }
    return problem(slug, TITLE[slug], faults.get(slug, [])).model_dump(mode="json")
