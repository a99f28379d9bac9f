"""Problems as RFC 9457 describes them: one type per kind of fault, never a stack trace."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from meddiff.contracts.base import Contract

ProblemSlug = Literal[
    "unauthenticated",
    "forbidden",
    "invalid-request",
    "invalid-dataset",
    "source-refused",
    "source-unreachable",
    "not-found",
    "not-ready",
    "gone",
    "conflict",
    "too-large",
    "too-many-jobs",
    "unavailable",
    "attempts-exhausted",
    "leak",
    "child-failed",
    "task-failed",
    "cancelled",
    "internal",
]

TYPE_PREFIX = "urn:meddiff:problem:"

STATUS: dict[ProblemSlug, int] = {
    "unauthenticated": 401,
    "forbidden": 403,
    "invalid-request": 422,
    "invalid-dataset": 422,
    "source-refused": 403,
    "source-unreachable": 422,
    "not-found": 404,
    "not-ready": 409,
    "gone": 410,
    "conflict": 409,
    "too-large": 413,
    "too-many-jobs": 429,
    "unavailable": 503,
    "attempts-exhausted": 200,
    "leak": 422,
    "child-failed": 500,
    "task-failed": 500,
    "cancelled": 200,
    "internal": 500,
}

TITLE: dict[ProblemSlug, str] = {
    "unauthenticated": "The request carries no valid API key",
    "forbidden": "The API key's role does not allow it",
    "invalid-request": "The request is not valid",
    "invalid-dataset": "The dataset is not valid",
    "source-refused": "The source may not be read",
    "source-unreachable": "The source cannot be read",
    "not-found": "There is no such thing",
    "not-ready": "It is not there yet",
    "gone": "It was removed",
    "conflict": "The state does not allow it",
    "too-large": "The body is too large",
    "too-many-jobs": "As many jobs are unfinished as may be",
    "unavailable": "A service this one needs is not reachable",
    "attempts-exhausted": "Fewer pairs were accepted than asked for",
    "leak": "Test cases had a part in making the synthetic pairs",
    "child-failed": "A job that this one started did not succeed",
    "task-failed": "A task of the job failed for good",
    "cancelled": "The job was cancelled",
    "internal": "The service failed",
}


def _readable(text: object) -> object:
    return text.encode("utf-8", "backslashreplace").decode() if isinstance(text, str) else text


Readable = Annotated[str, BeforeValidator(_readable)]


class Fault(Contract):
    """One fault of an input. ``pointer`` is a JSON pointer into the body (RFC 6901) or a file name in the dataset;
    bytes of a name that are not UTF-8 are written out, for JSON has none."""

    pointer: Readable
    detail: Readable


class Problem(Contract):
    """``application/problem+json`` (RFC 9457) with a stable ``type`` and, for input faults, ``errors``.

    ``instance`` is the path of the request it answers; the problem of a job has none.
    """

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: tuple[Fault, ...] = ()


def problem(slug: ProblemSlug, detail: str, errors: tuple[Fault, ...] | list[Fault] = ()) -> Problem:
    """The problem of kind ``slug``; its status and title follow from the kind."""
    return Problem(type=TYPE_PREFIX + slug, title=TITLE[slug], status=STATUS[slug], detail=detail, errors=tuple(errors))


class ProblemError(Exception):
    """A fault that is the caller's answer: trying again does not mend it. Ends a request, or a job, at once."""

    def __init__(self, slug: ProblemSlug, detail: str, errors: tuple[Fault, ...] | list[Fault] = ()) -> None:
        super().__init__(detail)
        self.problem = problem(slug, detail, errors)
