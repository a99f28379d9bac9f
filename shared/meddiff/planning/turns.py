"""Whose job comes first among those of one tenant, and how long one waits for the others. Between tenants
``Leases.next_turn`` decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from meddiff.contracts.jobs import EvaluateSpec, FinetuneSpec, Spec
from meddiff.contracts.requests import Priority
from meddiff.planning.leases import InLine, Leases
from meddiff.planning.plan import segments

STRETCH = 2.0
"""A job waits for a later one only where it is so many times as long as the head start it had."""

PATIENCE: dict[Priority, float] = {"high": 0.0, "normal": 3600.0, "low": 86_400.0}
"""Seconds by which a job of higher priority may come later and still be first."""


def place(leases: Leases, spec: Spec) -> float:
    """A moment; of a tenant's jobs the one with the earliest is next. It lies after the job's creation by its
    priority's patience and ``STRETCH`` times what the whole job takes: a short job passes a long one, equal ones keep
    their order, and since it does not move, none waits for ever."""
    return spec.created_at.timestamp() + PATIENCE[spec.request.priority] + STRETCH * _seconds(leases, spec)


def _seconds(leases: Leases, spec: Spec) -> float:
    """What a job takes of the queue that it needs most, by what its tasks took lately."""
    if isinstance(spec, FinetuneSpec):
        tuning, shapes = spec.recipe.finetuning, spec.recipe.mask_generation
        return segments(tuning.steps, tuning.segment_steps) * leases.seconds_of("inpainter") + segments(
            shapes.steps, shapes.segment_steps
        ) * leases.seconds_of("mask_generator")
    if isinstance(spec, EvaluateSpec):
        asked = spec.request
        trainings = asked.splits * asked.seeds * (2 + len(asked.synthetic) * len(asked.arms))
        return trainings * leases.seconds_of("segmenter")
    return math.ceil(spec.request.count / spec.recipe.work.shard_size) * leases.seconds_of("inpainting")


def wait(mine: InLine, others: Iterable[InLine], workers: int, weights: Mapping[str, float]) -> float:
    """Seconds until ``workers`` that are shared as turns are have done what a job has left in a queue, if nothing more
    comes: among tenants as a fluid by weight (generalised processor sharing, Parekh and Gallager, 1993), within a
    tenant one job after the other."""
    lines: dict[str, list[InLine]] = {}
    for one in sorted([mine, *others], key=lambda one: (one.place, one.job_id), reverse=True):
        lines.setdefault(one.tenant, []).append(one)  # The next one last.
    mine_and_before = lines[mine.tenant][lines[mine.tenant].index(mine) :]
    work = {tenant: sum(one.seconds for one in line) for tenant, line in lines.items()}
    work[mine.tenant] = sum(one.seconds for one in mine_and_before)
    share = {tenant: weights.get(tenant, 1.0) for tenant in work}
    passed = 0.0
    while mine.tenant in work:
        pace = max(1, workers) / sum(share[tenant] for tenant in work)
        first = min(work, key=lambda tenant: work[tenant] / share[tenant])
        took = work[first] / (pace * share[first])
        passed += took
        work = {tenant: rest - took * pace * share[tenant] for tenant, rest in work.items() if tenant != first}
    return passed
