"""Seeded runs of the simulated fleet with mishaps, each compared with a quiet day."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import redis
from fleet import EPOCH, SimulatedWorker, Simulation
from jobspecs import CREATED, DATASET, finetune, generate, small
from meddiff.contracts.ids import model_id_of
from meddiff.contracts.jobs import EvaluateSpec, Spec
from meddiff.contracts.requests import EvaluateRequest

COMING_SECONDS = 20.0  # The jobs come within so long.
LONGEST_STANDSTILL = 20.0
MISHAP_SECONDS = 20.0
"""What a mishap may cost: its own time, or a lease's and a task's done again."""
RECOVERY_SECONDS = 10.0
TENANTS = ("cardiology", "radiology")


@dataclass
class Outcome:
    """``wrong``: every invariant that a run broke."""

    jobs: int = 0
    mishaps: Counter[str] = field(default_factory=Counter)
    recoveries: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def jobs_of(draw: random.Random) -> list[Spec]:
    """One to four small jobs of all kinds, of two tenants."""
    found: list[Spec] = []
    for n in range(draw.randint(1, 4)):
        job_id = f"0197f000-0000-7000-8000-{draw.getrandbits(47) << 1 | n & 1:012x}"
        kind = draw.choice(["finetune", "generate", "generate", "evaluate"])
        spec: Spec
        if kind == "finetune":
            recipe = small(
                finetuning={"steps": draw.randint(1, 14), "separate_repair": draw.random() < 0.3},
                inpainting={"background": draw.choice(["cover", "repair"])},
            )
            spec = finetune(recipe, job_id).model_copy(update={"model_id": model_id_of(job_id)})
        elif kind == "generate":
            attempts = draw.choice([1.0, 2.0, 4.0])
            spec = generate(draw.randint(1, 24), recipe=small(work={"attempts": attempts}), job_id=job_id)
        else:
            spec = EvaluateSpec(
                tenant="local",
                id=job_id,
                created_at=CREATED,
                request=EvaluateRequest(dataset_uri=DATASET, folds=2, seeds=draw.randint(1, 2), synthetic=(6,)),
                recipe=small(),
            )
        found.append(spec.model_copy(update={"tenant": draw.choice(TENANTS)}))
    return found


def chaotic_run(client: redis.Redis, seed: int) -> Outcome:
    """One run: jobs come at any moment, mishaps too; some jobs are cancelled. After the end: every job has ended once
    and as on a quiet day, nothing is active, and nothing is left in a queue that a worker would not drop."""
    draw = random.Random(seed)
    specs = jobs_of(draw)
    found = Outcome(jobs=len(specs))
    calm = Simulation(client, seed)
    for spec in specs:
        calm.submit(spec)
    began = calm.now
    calm.run(lambda: calm.ended(specs))
    quiet_seconds = calm.now - began
    expected = {spec.id: (calm.end(spec), calm.outputs(spec)) for spec in specs}

    world = Simulation(client, seed, redelivered=draw.choice([0.0, 0.2, 1.0]))
    accepted: set[str] = set()

    def come(spec: Spec) -> None:
        if world.now < world.away_until:  # The gateway answers 503: the caller asks again.
            world.at(1.0, lambda: come(spec))
            return
        world.submit(spec)
        accepted.add(spec.id)

    def stop(spec: Spec) -> None:
        if spec.id in accepted:
            world.cancel(spec)
        else:  # Its id is not known yet.
            world.at(1.0, lambda: stop(spec))

    for spec in specs:
        world.at(draw.uniform(0, COMING_SECONDS), lambda spec=spec: come(spec))  # type: ignore[misc]
    stopped = {spec.id for spec in specs if draw.random() < 0.1}
    for spec in specs:
        if spec.id in stopped:
            world.at(draw.uniform(20, 70), lambda spec=spec: stop(spec))  # type: ignore[misc]
    moments = [draw.uniform(0, COMING_SECONDS + quiet_seconds) for _ in range(draw.randint(0, 8))]
    for moment in moments:
        name, what = draw.choice(list(mishaps(world, draw).items()))
        found.mishaps[name] += 1
        world.at(moment, what)
    world.run(lambda: len(accepted) == len(specs) and world.ended(specs))
    late = world.now - EPOCH - COMING_SECONDS - quiet_seconds
    if late > MISHAP_SECONDS * len(moments) + RECOVERY_SECONDS:
        found.wrong.append(f"seed {seed}: {late:.0f} s later than on a quiet day after {len(moments)} mishaps")
    world.run(lambda calm_from=world.now: world.now > calm_from + 40)  # Late tasks and messages come to rest.
    world.away_until = 0.0
    found.recoveries = world.happened
    for spec in specs:
        end, (quiet_end, outputs) = world.end(spec), expected[spec.id]
        if spec.id in stopped and end.status == "cancelled":
            continue
        told = end.model_dump(exclude={"finished_at"}), quiet_end.model_dump(exclude={"finished_at"})
        if told[0] != told[1]:
            found.wrong.append(f"seed {seed}: {spec.kind} ended {told[0]}, on a quiet day {told[1]}")
        if world.outputs(spec) != outputs:
            found.wrong.append(f"seed {seed}: {spec.kind} left {world.outputs(spec)}, on a quiet day {outputs}")
    active = list(world.store.list("active/"))
    if active:
        found.wrong.append(f"seed {seed}: still active: {active}")
    running = [worker.name for worker in world.fleet if worker.task is not None]
    if running:
        found.wrong.append(f"seed {seed}: still at work: {running}")
    return found


def mishaps(world: Simulation, draw: random.Random) -> dict[str, Callable[[], Any]]:
    """What may go wrong, by name; it befalls a worker that is at work, where there is one."""
    luck, seconds = draw.random(), draw.uniform(1, LONGEST_STANDSTILL)

    def somebody() -> SimulatedWorker:
        alive = [worker for worker in world.fleet if worker.alive]
        candidates = [worker for worker in alive if worker.task is not None] or alive or world.fleet
        return candidates[int(luck * len(candidates))]

    return {
        "worker killed": lambda: world.kill(somebody()),
        "worker stopped and continued": lambda: world.pause(somebody(), seconds),
        "Redis flushed": world.flush,
        "store away": lambda: world.store_away(seconds),
        "two sweeps": world.second_leader,
        "message lost": lambda: world.lose_message(luck),
    }
