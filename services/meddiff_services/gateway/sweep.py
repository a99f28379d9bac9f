"""The sweep: active jobs are planned again every few seconds, by one gateway at a time."""

from __future__ import annotations

import secrets
import threading
import time
from datetime import UTC, datetime

import structlog
from meddiff import housekeeping
from meddiff.planning import dispatch
from meddiff.store.objects import StoreError

from meddiff_services.gateway.backends import Backends
from meddiff_services.gateway.metrics import Metrics

log = structlog.get_logger()


def run(here: Backends, metrics: Metrics, stop: threading.Event) -> None:
    """Makes the bucket, as soon as there is a store, then sweeps until ``stop``. A sweep that fails is logged and
    counted; the next one makes up for it."""
    _ensure_bucket(here, stop)
    token = secrets.token_hex(8)
    tidied, tidying = time.monotonic(), threading.Thread()
    while not stop.wait(here.settings.sweep_seconds):
        try:
            led = dispatch.sweep(here.store, here.leases, here.send, token)
            metrics.sweeps.labels("led" if led else "followed").inc()
            if led and time.monotonic() - tidied >= here.settings.tidy_seconds and not tidying.is_alive():
                tidied = time.monotonic()
                tidying = threading.Thread(target=_tidy, args=(here,), name="tidy", daemon=True)
                tidying.start()
        except Exception as error:
            metrics.sweeps.labels("failed").inc()
            log.warning("sweep failed", error=type(error).__name__)


def _tidy(here: Backends) -> None:
    """Beside the sweep, for in a large bucket it takes long."""
    try:
        log.info("tidied", removed=housekeeping.tidy(here.store, datetime.now(UTC)))
    except Exception as error:
        log.warning("not tidied", error=type(error).__name__)


def _ensure_bucket(here: Backends, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            here.store.ensure_bucket()
            return
        except StoreError as error:
            log.warning("no bucket yet", error=str(error))
            stop.wait(here.settings.sweep_seconds)
