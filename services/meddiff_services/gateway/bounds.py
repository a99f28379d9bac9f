"""How many jobs may be unfinished at once: of a tenant, and in all."""

from __future__ import annotations

import threading
import time
from collections import Counter

from meddiff.contracts.problems import ProblemError
from meddiff.planning.dispatch import active_jobs
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore

COUNTED_SECONDS = 1.0


class Bounds:
    """Counts unfinished jobs, by the store at most once a second and by what this gateway accepts meanwhile. What other
    gateways accept within that second is not seen: the bounds keep a queue short, they are no promise to the job."""

    def __init__(self, settings: Settings, store: ObjectStore) -> None:
        self._settings, self._store = settings, store
        self._lock = threading.Lock()
        self._until = 0.0
        self._unfinished: Counter[str] = Counter()

    def admit(self, tenant: str) -> None:
        """Counts one more job of ``tenant``. Raises ``ProblemError`` ``too-many-jobs`` where there are as many as may
        be."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._unfinished = Counter(owner for owner, _ in active_jobs(self._store))
                self._until = time.monotonic() + COUNTED_SECONDS
            own, every = self._unfinished[tenant], self._unfinished.total()
            if own >= self._settings.tenant_jobs.get(tenant, self._settings.max_tenant_jobs):
                detail = f"{own} jobs of this tenant are unfinished; wait for one to end, or cancel one"
                raise ProblemError("too-many-jobs", detail)
            if every >= self._settings.max_active_jobs:
                raise ProblemError("too-many-jobs", f"{every} jobs are unfinished; wait for one to end")
            self._unfinished[tenant] += 1
