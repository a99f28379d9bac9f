"""API keys and the audit record in the object store."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime

from meddiff.contracts.access import ApiKey, AuditRecord, NewApiKey, Role
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.ids import uuid7
from meddiff.store.keys import api_key, api_keys_root, audit_record, audit_root
from meddiff.store.objects import NotFound, ObjectStore

TOKEN_PREFIX = "mdft_"
TOKEN_BYTES = 32  # As random as that, a token needs no slow hash: nobody can try them all.
ID_DIGITS = 16


def create_key(store: ObjectStore, tenant: str, role: Role, label: str = "") -> NewApiKey:
    """A new key; only its token's SHA-256 is stored. Raises ``ValidationError`` for a tenant of no valid name."""
    token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    digest = sha256_hex(token.encode())
    key = ApiKey(id=digest[:ID_DIGITS], tenant=tenant, role=role, label=label, created_at=datetime.now(UTC))
    store.put_json(api_key(digest), key)
    return NewApiKey(token=token, key=key)


def find_key(store: ObjectStore, token: str) -> ApiKey | None:
    """The key of that token, unless there is none or it was revoked."""
    try:
        key = store.get_json(api_key(sha256_hex(token.encode())), ApiKey)
    except NotFound:
        return None
    return key if key.revoked_at is None else None


def list_keys(store: ObjectStore) -> list[ApiKey]:
    """Every key of every tenant, revoked ones too, in order of creation."""
    return sorted((store.get_json(key, ApiKey) for key in store.list(api_keys_root())), key=lambda key: key.created_at)


def revoke_key(store: ObjectStore, key_id: str) -> ApiKey:
    """The key of that id, revoked; it stays on record. Raises ``NotFound``."""
    for place in store.list(api_keys_root()):
        key = store.get_json(place, ApiKey)
        if key.id == key_id:
            revoked = key.model_copy(update={"revoked_at": key.revoked_at or datetime.now(UTC)})
            store.put_json(place, revoked)
            return revoked
    raise NotFound(key_id)


def record(
    store: ObjectStore, tenant: str, key: str | None, role: Role, method: str, path: str, *, allowed: bool
) -> AuditRecord:
    """Adds to the tenant's audit record; nothing in this project changes or removes what is there."""
    number = uuid7()
    asked = AuditRecord(
        id=number, at=datetime.now(UTC), key=key, role=role, method=method, path=path, allowed=allowed
    )  # fmt: skip
    store.put_json(audit_record(tenant, number), asked)
    return asked


def recorded(store: ObjectStore, tenant: str, start_after: str | None = None) -> Iterator[AuditRecord]:
    """The tenant's audit record, newest first; with ``start_after`` what is older than the record of that id."""
    after = audit_record(tenant, start_after) if start_after is not None else None
    yield from (store.get_json(key, AuditRecord) for key in store.list(audit_root(tenant), after))
