"""Every stage as next to no work, for the workers of ``test_workers``."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from jobspecs import imported, scored
from meddiff.contracts.problems import Fault, ProblemError
from meddiff.contracts.tasks import Stage
from meddiff_services.worker import Outcome, Work

STEP_SECONDS = 0.02


def _import(work: Work) -> Outcome:
    if work.spec.request.metadata.get("fault") == "import":
        raise ProblemError("invalid-dataset", "one fault", [Fault(pointer="a.png", detail="cannot be read")])
    return Outcome(units=30, output=imported())


def _train(work: Work) -> Outcome:
    """A few steps that look at ``should_stop``; a metadata field makes a stage endless, poisonous, deadly or deaf."""
    metadata = work.spec.request.metadata
    if metadata.get("fault") == work.stage:
        raise KeyError("a word of the user's data")
    if metadata.get("killed") == work.stage:
        os.kill(os.getpid(), signal.SIGKILL)
    if metadata.get("hangs") == work.stage:
        threading.Event().wait()
    steps = 10**6 if metadata.get("endless") == work.stage else 5
    for step in range(steps):
        time.sleep(STEP_SECONDS)
        work.progress(step, steps, "steps", loss=0.5)
        work.raise_if_stopped()
    return Outcome(units=steps, output={"shard": work.shard})


def _paint(work: Work) -> Outcome:
    time.sleep(STEP_SECONDS)
    if work.stage == "inpainting":
        work.marker("masks", work.shard)
    work.store.put(work.keys.candidate(work.shard, work.stage), f"{work.stage} {work.shard}".encode())
    return Outcome(units=work.spec.recipe.work.shard_size)


def _score(work: Work) -> Outcome:
    work.marker("inpainting", work.shard)
    return Outcome(units=work.spec.recipe.work.shard_size, output={"candidates": scored(work.spec, work.shard)})


def _finish(work: Work) -> Outcome:
    output: dict[str, Any] = {}
    if work.stage == "manifest":
        output = {"shards": [marker.shard for marker in work.markers("quality")][:3]}
    return Outcome(units=1, output=output)


STAGES: dict[Stage, Callable[[Work], Outcome]] = {
    "import": _import,
    "cache": _finish,
    "inpainter": _train,
    "repair": _train,
    "mask_generator": _train,
    "backgrounds": _paint,
    "calibrate": _finish,
    "publish": _finish,
    "masks": _paint,
    "inpainting": _paint,
    "quality": _score,
    "manifest": _finish,
}
