"""What every route works on: the settings, the object store and Redis, for one tenant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request
from meddiff.contracts.access import Role
from meddiff.planning.dispatch import Send
from meddiff.planning.leases import Leases
from meddiff.planning.queues import Sender, celery_app
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore
from meddiff.store.retry import RetryPolicy

from meddiff_services.gateway.bounds import Bounds
from meddiff_services.gateway.snapshots import Snapshots

READ_AT_ONCE = 8
IMPATIENT = RetryPolicy(first=0.05, deadline=1.0)


@dataclass(frozen=True)
class Backends:
    """``store`` and ``leases`` give up early: a caller can ask again, and a job that was accepted is planned by the
    sweep. ``reading`` bounds the datasets that are read at once: the others wait without holding a thread.
    ``tenant``, ``key_id`` and ``role`` are those of who asks,
    ``trace_id`` is the request's."""

    settings: Settings
    store: ObjectStore
    leases: Leases
    send: Send
    bounds: Bounds
    snapshots: Snapshots
    reading: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(READ_AT_ONCE))
    tenant: str = ""
    key_id: str | None = None
    role: Role = "reader"
    trace_id: str | None = None

    @classmethod
    def connect(cls, settings: Settings) -> Backends:
        store = ObjectStore.from_settings(settings, RetryPolicy(deadline=3.0))
        leases = Leases.connect(settings.redis_url, settings.lease_seconds, settings.tenant_weights, IMPATIENT)
        return cls(
            settings, store, leases, Sender(celery_app(settings), IMPATIENT), Bounds(settings, store), Snapshots()
        )


async def _backends(request: Request) -> Backends:
    found: Backends = request.app.state.backends
    return found


Anyone = Annotated[Backends, Depends(_backends)]
"""A route's parameter: the backends of the application it belongs to, whoever asks; without a tenant."""
