"""Whose job comes first among those of one tenant. Between tenants ``Leases.next_turn`` decides."""

from __future__ import annotations

import math

from meddiff.contracts.jobs import EvaluateSpec, FinetuneSpec, Spec
from meddiff.contracts.requests import Priority
from meddiff.planning.leases import Leases
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
        trainings = (asked.folds or asked.draws or 1) * asked.seeds * (2 + len(asked.synthetic) * len(asked.arms))
        return trainings * leases.seconds_of("segmenter")
    return math.ceil(spec.request.count / spec.recipe.work.shard_size) * leases.seconds_of("inpainting")
