"""Who may ask: API keys, their roles, and the record of what was asked."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import StringConstraints

from meddiff.contracts.base import Contract, Stored, Tenant

Role = Literal["reader", "operator", "admin"]
"""A reader looks; an operator also starts and cancels jobs and brings datasets; an admin also deletes, and reads the
audit record. Each may what those before it may."""

ROLES: tuple[Role, ...] = ("reader", "operator", "admin")

KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
TraceId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""Of W3C Trace Context: in the log lines of a request, and of every task of the job that it asked for."""


class ApiKey(Stored):
    """``keys/{sha256 of the token}.json``. The token itself is nowhere; ``id`` is the beginning of its digest."""

    id: KeyId
    tenant: Tenant
    role: Role
    label: str
    created_at: datetime
    revoked_at: datetime | None = None


class NewApiKey(Contract):
    """A key at its making: the only time its token is shown."""

    token: str
    key: ApiKey


class AuditRecord(Stored):
    """``audit/{tenant}/{id}.json``: a request that would change something, written before it is acted upon. ``id`` is a
    UUIDv7; ``key`` is absent where requests need none; ``allowed`` says whether the key's role sufficed."""

    id: str
    at: datetime
    key: KeyId | None
    role: Role
    method: str
    path: str
    allowed: bool


class AuditList(Contract):
    """A page of the audit record, newest first; ``next`` is the cursor of the following page."""

    records: tuple[AuditRecord, ...]
    next: str | None = None
