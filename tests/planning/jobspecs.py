"""Specs of small jobs, and what instant tasks would leave of them."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

from meddiff.contracts.jobs import FinetuneSpec, GenerateSpec
from meddiff.contracts.recipes import CPU, Recipe, override
from meddiff.contracts.requests import FinetuneRequest, GenerateRequest
from meddiff.contracts.tasks import Stage
from meddiff.planning.selection import indices
from meddiff.signatures import BYTES

CREATED = datetime(2026, 5, 1, tzinfo=UTC)
JOB = "0197f000-0000-7000-8000-000000000001"
MODEL = "md_" + "0" * 32
DATASET = "ds_" + "0" * 32


def small(**changes: Any) -> Recipe:
    """A recipe of a few steps and shards."""
    parts: dict[str, Any] = {
        "finetuning": {"steps": 10, "segment_steps": 4},
        "mask_generation": {"steps": 5, "segment_steps": 2},
        "work": {"shard_size": 4, "attempts": 4.0},
    }
    return override(CPU, {part: parts.get(part, {}) | changes.get(part, {}) for part in parts | changes})


def finetune(recipe: Recipe | None = None, job_id: str = JOB) -> FinetuneSpec:
    return FinetuneSpec(
        tenant="local",
        id=job_id,
        created_at=CREATED,
        request=FinetuneRequest(dataset_uri=DATASET),
        recipe=recipe or small(),
        model_id=MODEL,
    )


def generate(count: int, *, start_index: int = 0, recipe: Recipe | None = None, job_id: str = JOB) -> GenerateSpec:
    return GenerateSpec(
        tenant="local",
        id=job_id,
        created_at=CREATED,
        request=GenerateRequest(model=MODEL, count=count, start_index=start_index),
        recipe=recipe or small(),
        model_id=MODEL,
        dataset_id=DATASET,
    )


def imported(pairs: int = 30, backgrounds: int = 0) -> dict[str, Any]:
    """Output of an import task."""
    cases = [f"{n:064x}" for n in range(pairs)]
    return {"dataset_id": DATASET, "pairs": pairs, "backgrounds": backgrounds, "cases": cases}


def scored(spec: GenerateSpec, shard: int, rate: float = 0.6, seed: int = 0) -> list[dict[str, Any]]:
    """Candidates of a quality marker: a function of spec and index alone; some share a shape with an earlier one."""
    return [_candidate(index, rate, seed) for index in indices(spec, shard)]


def _candidate(index: int, rate: float, seed: int) -> dict[str, Any]:
    draw = random.Random(f"{seed}/{index}")
    reason = None if draw.random() < rate else draw.choice(["too_far", "copy", "flat"])
    shape = random.Random(f"{seed}/{index // 5}") if draw.random() < 0.2 else draw
    return {"index": index, "reason": reason, "signature": shape.randbytes(BYTES).hex()}


STAGE_OUTPUTS: dict[Stage, dict[str, Any]] = {"import": imported()}
