"""How large a request's body may be, an uploaded archive on its way to a temporary file, and HEAD."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from typing import IO

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from meddiff.contracts.problems import Fault, ProblemError
from meddiff.contracts.requests import DatasetReference
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meddiff_services.gateway.access import Here

MAX_JSON_BYTES = 2**20
TAKES_ARCHIVES = ("/datasets", "/datasets/validate")
ZIP = "application/zip"
JSON = "application/json"


class BoundedBodies:
    """ASGI middleware: 413 for a zip archive above ``max_upload_bytes``, where one is taken, and for any other body
    above 1 MiB, however its length is declared."""

    def __init__(self, app: ASGIApp, max_upload_bytes: int) -> None:
        self._app, self._max_upload_bytes = app, max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        archive = scope["path"] in TAKES_ARCHIVES and _media_type(headers) == ZIP
        bound = self._max_upload_bytes if archive else MAX_JSON_BYTES
        declared = headers.get("content-length", "0")
        received = int(declared) if declared.isdecimal() and int(declared) > bound else 0

        async def bounded() -> Message:
            nonlocal received
            if received <= bound:
                message = await receive()
                received += len(message.get("body", b""))
                if received <= bound:
                    return message
            raise HTTPException(413, f"the body is larger than {bound} bytes")

        await self._app(scope, bounded, send)


class HeadAsGet:
    """ASGI middleware: HEAD is answered as GET is, without the content, which the server leaves out (RFC 9110,
    section 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") != "HEAD" or scope["path"].endswith("/events"):  # A stream has no end to wait for.
            await self._app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}
        await self._app(asked, receive, send)
        scope["route"] = asked.get("route")


async def dataset_source(request: Request, admitted: Here) -> AsyncIterator[str | IO[bytes]]:
    """The dataset a request names or carries: the ``dataset_uri`` of a JSON body, or a temporary zip archive without
    a name, so that nothing is left of it however the process ends. Of who is not admitted nothing is read."""
    media_type = _media_type(request.headers)
    if media_type == JSON:
        yield _reference(await request.body()).dataset_uri
        return
    if media_type != ZIP:
        fault = Fault(pointer="?Content-Type", detail=f"expected {ZIP} or {JSON}")
        raise ProblemError("invalid-request", "The body is of no known type", [fault])
    with tempfile.TemporaryFile() as archive:
        async for chunk in request.stream():
            await run_in_threadpool(archive.write, chunk)
        archive.flush()
        yield archive


SOURCE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            ZIP: {"schema": {"type": "string", "format": "binary"}},
            JSON: {
                "schema": DatasetReference.model_json_schema(),
                "examples": {"s3": {"value": {"dataset_uri": "s3://hospital/skin/pairs.zip"}}},
            },
        },
    }
}
"""OpenAPI of the body that ``dataset_source`` reads."""


def _reference(body: bytes) -> DatasetReference:
    try:
        return DatasetReference.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]) from error


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()
