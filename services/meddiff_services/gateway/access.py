"""Who asks: the API key of a request, its tenant, and whether its role suffices. ``/audit`` shows what was asked."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from meddiff import access
from meddiff.contracts.access import ROLES, ApiKey, AuditList, Role
from meddiff.contracts.problems import ProblemError
from meddiff.store.objects import ObjectStore

from meddiff_services.gateway.backends import Anyone, Backends
from meddiff_services.gateway.pages import Cursor, Limit, page, uuid_shown_last
from meddiff_services.gateway.problems import documented

KEPT_SECONDS = 5.0  # A revoked key is refused after so long at the latest.
NEEDED: dict[str, Role] = {"GET": "reader", "POST": "operator", "DELETE": "admin"}

router = APIRouter(tags=["audit"], responses=documented("unauthenticated", "forbidden"))

_bearer = HTTPBearer(auto_error=False, description="An API key, as ``meddiff admin keys create`` made it")


class Keys:
    """The keys found lately, so that not every request asks the store."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._found: dict[str, tuple[float, ApiKey]] = {}

    def found_lately(self, token: str) -> ApiKey | None:
        """The key of that token, if it was asked for a moment ago."""
        until, key = self._found.get(token, (0.0, None))
        return key if time.monotonic() < until else None

    def find(self, token: str) -> ApiKey | None:
        """The key of that token; None where there is none or it was revoked."""
        key = access.find_key(self._store, token)
        now = time.monotonic()
        self._found = {other: kept for other, kept in self._found.items() if kept[0] > now and other != token}
        if key is not None:
            self._found[token] = (now + KEPT_SECONDS, key)
        return key


async def _admitted(
    request: Request, here: Anyone, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Backends:
    """The backends for the tenant that asks. A request that would change something is on the audit record before it is
    acted upon. Raises ``ProblemError`` ``unauthenticated`` or ``forbidden``."""
    key = await _key(request, here, credentials)
    tenant, key_id = (here.settings.tenant, None) if key is None else (key.tenant, key.id)
    role = "admin" if key is None else key.role
    asked = replace(here, tenant=tenant, key_id=key_id, role=role, trace_id=request.state.trace_id)
    request.state.tenant, request.state.key_id = tenant, key_id
    needed = NEEDED[request.method]
    if needed != "reader":
        await run_in_threadpool(_record, asked, request.method, request.url.path, _suffices(asked.role, needed))
    require(asked, needed)
    return asked


def _record(asked: Backends, method: str, path: str, allowed: bool) -> None:
    access.record(asked.store, asked.tenant, asked.key_id, asked.role, method, path, allowed=allowed)


def require(here: Backends, role: Role) -> None:
    """Raises ``ProblemError`` ``forbidden`` where the role of who asks does not suffice."""
    if not _suffices(here.role, role):
        raise ProblemError("forbidden", f"It takes the role {role}; this key has the role {here.role}")


def _suffices(role: Role, needed: Role) -> bool:
    return ROLES.index(role) >= ROLES.index(needed)


async def _key(
    request: Request, here: Backends, credentials: HTTPAuthorizationCredentials | None
) -> ApiKey | None:  # fmt: skip
    """The request's key; None where requests need none."""
    if not here.settings.require_keys:
        return None
    if credentials is None:
        raise ProblemError("unauthenticated", "Send the API key as: Authorization: Bearer KEY")
    keys: Keys = request.app.state.keys
    key = keys.found_lately(credentials.credentials) or await run_in_threadpool(keys.find, credentials.credentials)
    if key is None:
        raise ProblemError("unauthenticated", "There is no such API key, or it was revoked")
    return key


async def still_admitted(request: Request, here: Backends) -> bool:
    """Whether the key of a request that is answered for long was not revoked meanwhile."""
    try:
        await _key(request, here, await _bearer(request))
    except ProblemError:
        return False
    return True


Here = Annotated[Backends, Depends(_admitted)]
"""A route's parameter: the backends for the tenant whose key the request carries."""


@router.get("/audit")
def list_audit(here: Here, cursor: Cursor = None, limit: Limit = 20) -> AuditList:
    """Every request that would have changed something of this tenant, newest first; for admins."""
    require(here, "admin")
    records, following = page(
        access.recorded(here.store, here.tenant, uuid_shown_last(cursor)), limit, lambda one: one.id
    )  # fmt: skip
    return AuditList(records=records, next=following)
