"""What the gateway does without being asked."""

from __future__ import annotations

import threading

from gateways import until
from meddiff.settings import Settings
from meddiff.store.keys import JobKeys
from meddiff.store.objects import ObjectStore
from meddiff_services.gateway import sweep
from meddiff_services.gateway.backends import Backends
from meddiff_services.gateway.metrics import Metrics
from stored import put_generated


def test_what_nothing_needs_is_removed_beside_the_sweep(settings: Settings, store: ObjectStore) -> None:
    job = JobKeys("local", put_generated(store, "local").spec.id)
    surplus = job.candidate(9, "image")
    store.put(surplus, b"x")
    here = Backends.connect(settings.model_copy(update={"sweep_seconds": 0.05, "tidy_seconds": 0.1}))
    stop = threading.Event()
    sweeping = threading.Thread(target=sweep.run, args=(here, Metrics(here.leases), stop))
    sweeping.start()
    until(lambda: not store.exists(surplus))
    stop.set()
    sweeping.join()
    assert store.exists(job.manifest)
