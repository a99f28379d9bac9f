"""Jobs as they were told lately, ready to be sent: many ask for the same one, and each costs the store some calls."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from meddiff.contracts.base import canonical_json, sha256_hex
from meddiff.contracts.jobs import ENDED, Job

RUNNING_SECONDS = 0.25
ENDED_SECONDS = 60.0
KEPT = 2048


@dataclass(frozen=True)
class Told:
    """A job's JSON, its ``ETag``, which changes with everything but the estimate, and whether it has ended."""

    body: bytes
    tag: str
    ended: bool

    @classmethod
    def of(cls, job: Job) -> Told:
        """``job``, serialised."""
        digest = sha256_hex(canonical_json(job.model_copy(update={"eta_seconds": None})))[:32]
        return cls(job.model_dump_json().encode(), f'W/"{digest}"', job.status in ENDED)


class Snapshots:
    """The newest ``KEPT`` jobs told, each for a moment, one that has ended for longer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], tuple[float, Told]] = OrderedDict()

    def get(self, tenant: str, job_id: str) -> Told | None:
        """What was told of the job a moment ago."""
        with self._lock:
            until, told = self._kept.get((tenant, job_id), (0.0, None))
        return told if told is not None and time.monotonic() < until else None

    def keep(self, tenant: str, job: Job) -> Told:
        """``job``, to be told again."""
        told = Told.of(job)
        until = time.monotonic() + (ENDED_SECONDS if told.ended else RUNNING_SECONDS)
        with self._lock:
            self._kept[tenant, job.id] = (until, told)
            self._kept.move_to_end((tenant, job.id))
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return told

    def drop(self, tenant: str, job_id: str) -> None:
        """The job has changed by this gateway's doing."""
        with self._lock:
            self._kept.pop((tenant, job_id), None)
