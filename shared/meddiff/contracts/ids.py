"""Identifiers: UUIDs of version 7 (RFC 9562), and what is named after a job: its model, its child jobs."""

from __future__ import annotations

import secrets
import time
import uuid
from datetime import UTC, datetime

from meddiff.contracts.base import sha256_hex

_FRACTIONS = 1 << 12


def uuid7() -> str:
    """A UUIDv7: 48 bits of milliseconds, 12 bits of their fraction (RFC 9562, section 6.2, method 3), 62 random bits.
    Text order is time order."""
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    fraction = nanoseconds * _FRACTIONS // 1_000_000
    return str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | fraction << 64 | 2 << 62 | secrets.randbits(62)))


def created_at(job_id: str) -> datetime:
    """When a UUIDv7 was made, to the millisecond, in UTC."""
    return datetime.fromtimestamp((uuid.UUID(job_id).int >> 80) / 1000, UTC)


def model_id_of(job_id: str) -> str:
    """Id of the model that a fine-tune makes: a function of its job."""
    return "md_" + sha256_hex(job_id.encode())[:32]


def child_id(job_id: str, *path: str | int) -> str:
    """Id of the job that ``job_id`` starts for ``path``: a UUIDv7 of the same millisecond, its other bits a hash."""
    milliseconds = uuid.UUID(job_id).int >> 80
    digest = int(sha256_hex("/".join(map(str, (job_id, *path))).encode()), 16)
    fraction, rest = digest >> 244, digest & ((1 << 62) - 1)
    return str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | fraction << 64 | 2 << 62 | rest))
