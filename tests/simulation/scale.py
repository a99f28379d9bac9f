"""Fleets of many workers and jobs: what planning costs, who waits for whom, what estimates are worth."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime

import redis
from fleet import EPOCH, SECONDS, Simulation
from jobspecs import generate, small
from meddiff.contracts.jobs import GenerateSpec
from meddiff.contracts.tasks import Queue, Task
from meddiff.planning.jobs import read_job
from meddiff.store.keys import JobKeys

RATE = 0.95
"""The share of candidates that no judge turns away; some more are duplicates."""
ESTIMATES = 250
"""So many jobs, or all, are asked how long they will take."""
LOAD = 0.7
"""The share of the inpainters' time that the jobs ask for."""


def fleet_of(inpainters: int) -> dict[Queue, int]:
    """Workers in the proportion of their work, so that inpainting is what there is least of."""
    others = max(1, inpainters // 4)
    return {"datasets": 1, "training": 1, "masks": others, "inpainting": inpainters, "quality": others}


def job(number: int, tenant: str, count: int, comes: float = 0.0) -> GenerateSpec:
    job_id = f"0197f000-{number >> 16:04x}-7000-8000-{number:012x}"
    return generate(count, recipe=small(), job_id=job_id).model_copy(
        update={"tenant": tenant, "created_at": datetime.fromtimestamp(EPOCH + comes, UTC)}
    )


@dataclass
class Measured:
    """``calls``: of the store, ``pairs``: accepted, ``ratios``: real remaining time over the estimate given once a
    tenth of the job was done."""

    jobs: int
    inpainters: int
    calls: int = 0
    pairs: int = 0
    ratios: list[float] = field(default_factory=list)

    @property
    def calls_per_pair(self) -> float:
        return self.calls / self.pairs

    @property
    def good_estimates(self) -> float:
        """The share of estimates within 30 % of what came."""
        return sum(abs(ratio - 1) <= 0.3 for ratio in self.ratios) / len(self.ratios)


def busy_fleet(client: redis.Redis, jobs: int, inpainters: int, pairs: int | None = None, seed: int = 0) -> Measured:
    """Jobs of ``pairs``, or of 8 to 200, of eight tenants, which come as fast as the fleet can serve them."""
    draw = random.Random(seed)
    world = Simulation(client, seed, workers=fleet_of(inpainters), rate=RATE)
    counts = [pairs or draw.choice((8, 16, 40, 80, 200)) for _ in range(jobs)]
    shard = small().work.shard_size
    seconds = SECONDS["inpainting"] * sum(counts) / (0.85 * RATE) / shard / inpainters / LOAD
    specs = [job(n, f"tenant{draw.randrange(8)}", count, draw.uniform(0, seconds)) for n, count in enumerate(counts)]
    found = Measured(jobs, inpainters)
    expected: dict[str, tuple[float, float]] = {}
    asked = 0

    def ask(task: Task) -> None:
        """The estimate of a job, once a tenth of it is done. Asking is no planning, so it is not counted."""
        nonlocal asked
        spec = by_id[task.job_id]
        if task.stage != "quality" or task.job_id in expected or spec.id not in asked_of:
            return
        before = world.memory.calls
        told = read_job(world.store, world.leases, spec.tenant, spec.id, lambda: world.now)
        asked += world.memory.calls - before
        if (
            told.eta_seconds is not None
            and told.progress is not None
            and 10 * told.progress.done >= told.progress.total
        ):
            expected[spec.id] = (world.now, told.eta_seconds)

    by_id = {spec.id: spec for spec in specs}
    asked_of = {spec.id for spec in specs[:: 1 + jobs // ESTIMATES]}
    world.listeners.append(ask)
    for spec in specs:
        world.at(spec.created_at.timestamp() - EPOCH, lambda spec=spec: world.submit(spec))  # type: ignore[misc]
    world.run(lambda: world.ended(specs))
    found.calls = world.memory.calls - asked
    found.pairs = sum(world.end(spec).result["accepted"] for spec in specs)
    for name, (moment, estimate) in expected.items():
        spec = by_id[name]
        ended = world.store.modified(JobKeys(spec.tenant, spec.id).end).timestamp()
        found.ratios.append((ended - moment) / max(estimate, 0.1))
    return found


def fair_finish(work: dict[str, float], workers: int, weights: dict[str, float]) -> dict[str, float]:
    """When each tenant would be done if the workers were a fluid that is shared by weight among those not yet done
    (generalised processor sharing, Parekh and Gallager, 1993)."""
    left, now, finish = dict(work), 0.0, {}
    while left:
        whole = sum(weights.get(tenant, 1.0) for tenant in left)
        speed = {tenant: workers * weights.get(tenant, 1.0) / whole for tenant in left}
        first = min(left[tenant] / speed[tenant] for tenant in left)
        now += first
        left = {tenant: rest - first * speed[tenant] for tenant, rest in left.items()}
        for tenant in [tenant for tenant, rest in left.items() if rest <= 1e-9]:
            finish[tenant] = now
            del left[tenant]
    return finish


def contention(client: redis.Redis, loads: dict[str, list[int]], inpainters: int, seed: int = 0) -> dict[str, float]:
    """All jobs come at once; when each tenant is done, over when it would be by its fair share."""
    weights = {"heavy": 2.0}
    world = Simulation(client, seed, workers=fleet_of(inpainters), weights=weights)
    specs = [
        job(n, tenant, count)
        for n, (tenant, count) in enumerate((tenant, count) for tenant, counts in loads.items() for count in counts)
    ]
    began = world.now
    for spec in specs:
        world.submit(spec)
    world.run(lambda: world.ended(specs))
    work = {tenant: world.busy_seconds["inpainting", tenant] for tenant in loads}
    fair = fair_finish(work, inpainters, weights)
    finished = {
        tenant: max(
            world.store.modified(JobKeys(tenant, spec.id).end).timestamp() for spec in specs if spec.tenant == tenant
        )
        for tenant in loads
    }
    return {tenant: (finished[tenant] - began) / fair[tenant] for tenant in loads}
