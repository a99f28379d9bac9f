"""Lists by pages: a cursor is opaque to the caller, and names the last item that was shown."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import Query
from meddiff.contracts.problems import Fault, ProblemError

T = TypeVar("T")

Cursor = Annotated[str | None, Query(max_length=200, description="``next`` of the page before")]
Limit = Annotated[int, Query(ge=1, le=100)]
Derived = Annotated[bool, Query(description="Take what was made from it as well: models, pairs, reports")]
"""Of a deletion."""


def page(items: Iterable[T], limit: int, name: Callable[[T], str]) -> tuple[tuple[T, ...], str | None]:
    """The first ``limit`` items, and the cursor of the next page where there are more."""
    found = tuple(itertools.islice(items, limit + 1))
    if len(found) <= limit:
        return found, None
    return found[:limit], base64.urlsafe_b64encode(name(found[limit - 1]).encode()).decode()


def shown_last(cursor: str | None) -> str | None:
    """The name that ``page`` made the cursor of. Raises ``ProblemError`` for what is no cursor."""
    if cursor is None:
        return None
    try:
        name = base64.b64decode(cursor.encode(), altchars=b"-_", validate=True).decode("ascii")
        if not name:
            raise _no_cursor()
        return name
    except ValueError:
        raise _no_cursor() from None


def uuid_shown_last(cursor: str | None) -> str | None:
    """The same of items that are named by UUIDs."""
    name = shown_last(cursor)
    try:
        return None if name is None else str(UUID(name))
    except ValueError:
        raise _no_cursor() from None


def _no_cursor() -> ProblemError:
    fault = Fault(pointer="?cursor", detail="not a cursor of this service")
    return ProblemError("invalid-request", "1 fault(s) in the request", [fault])
