"""What is due: a pure function of a job's spec and of what exists. Nothing here remembers anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from meddiff.contracts.evaluation import Split
from meddiff.contracts.jobs import End, EndStatus, EvaluateSpec, FinetuneSpec, GenerateSpec, Spec
from meddiff.contracts.problems import Problem, problem
from meddiff.contracts.recipes import Recipe
from meddiff.contracts.tasks import KILLED, STORE_FAULT, Stage, Task
from meddiff.planning import evaluation
from meddiff.planning.selection import Tally, budget, is_full, next_start_index, wanted

SAME_FAULTS = 3  # A task that failed this often with one error of its own is not tried again,
ANY_FAULTS = 9  # nor one that failed this often in all.

ADVICE: dict[str, str] = {
    "too_far": "fine-tune for more steps or with a lower quality.far_quantile",
    "copy": "raise inpainting.strength, or fine-tune for fewer steps or on more cases",
    "flat": "fine-tune for more steps",
    "empty_shape": "give more masks or lower erosion.share",
    "duplicate_shape": "raise quality.max_shape_iou or give more masks",
}


@dataclass(frozen=True)
class Observed:
    """What exists of a job. ``done``: shards with a marker, by stage; of a generate job's shards only those at or
    beyond the tally's watermark need be named. ``imported``: output of the import marker. ``faults``: errors by stage
    and shard, in the order they happened. Of an evaluation also ``splits``, ``reported`` (output of the report's
    marker), and ``children``: the ends of those of its child jobs that exist, None while they go on."""

    done: Mapping[Stage, Collection[int]] = field(default_factory=dict)
    imported: Mapping[str, Any] | None = None
    tally: Tally = field(default_factory=Tally)
    faults: Mapping[tuple[Stage, int], tuple[str, ...]] = field(default_factory=dict)
    cancelled: bool = False
    splits: tuple[Split, ...] | None = None
    reported: Mapping[str, Any] | None = None
    children: Mapping[str, End | None] = field(default_factory=dict)

    def has(self, stage: Stage, shard: int = 0) -> bool:
        return shard in self.done.get(stage, ())

    def succeeded(self, child: str) -> bool:
        """Whether a child job made what it was there for: fewer pairs than asked for are some."""
        end = self.children.get(child)
        return end is not None and end.status in ("succeeded", "incomplete")


@dataclass(frozen=True)
class Ending:
    """How the job ends, in ``end.json``'s terms."""

    status: EndStatus
    result: dict[str, Any] = field(default_factory=dict)
    problem: Problem | None = None


@dataclass(frozen=True)
class Plan:
    """``due``: tasks whose inputs exist and whose output does not, the most urgent first. ``children``: jobs to be
    started. ``ending``: set where nothing remains to be done; a cancelled job waits with it until its workers have let
    go and its child jobs have ended."""

    due: tuple[Task, ...] = ()
    children: tuple[FinetuneSpec | GenerateSpec, ...] = ()
    ending: Ending | None = None


@dataclass(frozen=True)
class Step:
    """A stage of a fine-tune: its number of shards, what must be complete before it, and whether each shard needs the
    one before it, as the segments of a training do."""

    stage: Stage
    shards: int = 1
    after: tuple[Stage, ...] = ()
    sequential: bool = False


def plan(spec: Spec, observed: Observed) -> Plan:
    """What is due, and how the job ends where it does."""
    if observed.cancelled:
        return Plan(ending=Ending("cancelled", problem=problem("cancelled", "The job was cancelled on request.")))
    if isinstance(spec, FinetuneSpec):
        following = _plan_finetune(spec, observed)
    elif isinstance(spec, GenerateSpec):
        following = _plan_generate(spec, observed)
    else:
        following = _plan_evaluate(spec, observed)
    poison = _poison(following.due, observed)
    return Plan(ending=Ending("failed", problem=poison)) if poison is not None else following


def segments(steps: int, segment_steps: int) -> int:
    """The number of training segments; segment k covers ``segment_range(k, ...)``."""
    return math.ceil(steps / segment_steps)


def segment_range(shard: int, steps: int, segment_steps: int) -> range:
    """Training steps of a segment, the last one cut short: [k s, min((k+1) s, steps))."""
    return range(shard * segment_steps, min((shard + 1) * segment_steps, steps))


def finetune_steps(recipe: Recipe, imported: Mapping[str, Any]) -> tuple[Step, ...]:
    """The stages of a fine-tune after the import, the most urgent first. ``imported``: ``pairs`` and ``backgrounds``
    that the dataset has, ``cases`` chosen for training."""
    tuning, shapes = recipe.finetuning, recipe.mask_generation
    inpainter: tuple[Stage, ...] = ("inpainter",)
    steps = [
        Step("cache"),
        Step("inpainter", segments(tuning.steps, tuning.segment_steps), ("cache",), sequential=True),
        Step("calibrate"),
    ]
    if recipe.has_second_unet(imported["backgrounds"]):
        steps.append(Step("repair", segments(tuning.steps, tuning.segment_steps), ("cache",), sequential=True))
        inpainter += ("repair",)
    if recipe.inpainting.background == "repair" and not imported["backgrounds"]:
        steps.append(Step("backgrounds", math.ceil(len(imported["cases"]) / recipe.work.shard_size), inpainter))
    if imported["pairs"] >= shapes.min_masks:
        steps.append(Step("mask_generator", segments(shapes.steps, shapes.segment_steps), sequential=True))
    return (*steps, Step("publish", after=tuple(step.stage for step in steps)))


def training_steps(recipe: Recipe, imported: Mapping[str, Any]) -> int:
    """Optimiser steps of all parts that a fine-tune trains."""
    steps = {"inpainter": recipe.finetuning.steps, "repair": recipe.finetuning.steps}
    steps["mask_generator"] = recipe.mask_generation.steps
    return sum(steps.get(step.stage, 0) for step in finetune_steps(recipe, imported))


def _plan_finetune(spec: FinetuneSpec, observed: Observed) -> Plan:
    if observed.imported is None:
        return Plan((Task(tenant=spec.tenant, job_id=spec.id, stage="import"),))
    steps = finetune_steps(spec.recipe, observed.imported)
    if observed.has("publish"):
        result = {
            "model_id": spec.model_id,
            "dataset_id": observed.imported["dataset_id"],
            "steps": training_steps(spec.recipe, observed.imported),
        }
        return Plan(ending=Ending("succeeded", result))
    missing = {step.stage: [k for k in range(step.shards) if not observed.has(step.stage, k)] for step in steps}
    due = [
        Task(tenant=spec.tenant, job_id=spec.id, stage=step.stage, shard=shard)
        for step in steps
        if not any(missing[earlier] for earlier in step.after)
        for shard in (missing[step.stage][:1] if step.sequential else missing[step.stage])
    ]
    return Plan(tuple(due))


def _plan_generate(spec: GenerateSpec, observed: Observed) -> Plan:
    tally = observed.tally
    if not is_full(tally, spec) and tally.shards < budget(spec):
        return Plan(tuple(_shards_due(spec, observed)))
    if not observed.has("manifest"):
        return Plan((Task(tenant=spec.tenant, job_id=spec.id, stage="manifest"),))
    return Plan(ending=_generated(spec, tally))


def _shards_due(spec: GenerateSpec, observed: Observed) -> Iterator[Task]:
    """The next stage of every shard between the watermark and what is expected to be enough."""
    for shard in range(observed.tally.shards, wanted(observed.tally, spec)):
        chain: tuple[Stage, ...] = ("quality", "inpainting", "masks")
        finished = next((stage for stage in chain if observed.has(stage, shard)), None)
        following: dict[Stage | None, Stage] = {None: "masks", "masks": "inpainting", "inpainting": "quality"}
        if finished in following:
            yield Task(tenant=spec.tenant, job_id=spec.id, stage=following[finished], shard=shard)


def _generated(spec: GenerateSpec, tally: Tally) -> Ending:
    result = {
        "accepted": len(tally.accepted),
        "requested": spec.request.count,
        "next_start_index": next_start_index(tally, spec),
    }
    if is_full(tally, spec):
        return Ending("succeeded", result)
    counts = sorted(tally.reasons.items(), key=lambda item: -item[1])
    detail = (
        f"Of {tally.judged} candidates {len(tally.accepted)} were accepted, {spec.request.count} were asked for. "
        f"Turned away: {', '.join(f'{n} {reason}' for reason, n in counts)}. "
        f"What to change: {'; '.join(ADVICE[reason] for reason, _ in counts)}; or raise work.attempts. "
        f"A further generate job with start_index {next_start_index(tally, spec)} goes on from here."
    )
    return Ending("incomplete", result, problem("attempts-exhausted", detail))


def _plan_evaluate(spec: EvaluateSpec, observed: Observed) -> Plan:
    if observed.imported is None:
        return Plan((Task(tenant=spec.tenant, job_id=spec.id, stage="import"),))
    if observed.splits is None:
        return Plan((Task(tenant=spec.tenant, job_id=spec.id, stage="split"),))
    if observed.reported is not None:
        return Plan(ending=Ending("succeeded", dict(observed.reported)))
    for child, end in observed.children.items():
        if end is not None and not observed.succeeded(child):
            why = f": {end.problem.detail}" if end.problem is not None else "."
            return Plan(ending=Ending("failed", problem=problem("child-failed", f"Job {child} {end.status}{why}")))
    due: dict[Task, None] = {}
    for number, run in enumerate(evaluation.runs(spec, observed.splits)):
        if observed.has("segmenter", number):
            continue
        made = spec.synthetic_job is not None or observed.succeeded(evaluation.pairs_job(spec, run.split))
        if run.arm.source is not None and not made:
            continue
        stopped = observed.has("stop", run.stop)
        stage: Stage = "segmenter" if stopped else "stop"
        shard = number if stopped else run.stop
        due[Task(tenant=spec.tenant, job_id=spec.id, stage=stage, shard=shard)] = None
    children = tuple(_children_due(spec, observed, observed.imported, observed.splits))
    if not due and all(end is not None for end in observed.children.values()) and not children:
        return Plan((Task(tenant=spec.tenant, job_id=spec.id, stage="report"),))
    return Plan(tuple(due), children)


def _children_due(
    spec: EvaluateSpec, observed: Observed, imported: Mapping[str, Any], splits: tuple[Split, ...]
) -> Iterator[FinetuneSpec | GenerateSpec]:
    """Child jobs that can start: the pairs of a split once its generator is there."""
    fitted = evaluation.finetunes(spec, imported, splits)
    yield from (child for child in fitted if child.id not in observed.children)
    for number, child in enumerate(evaluation.generates(spec, imported, splits)):
        ready = not fitted or observed.succeeded(fitted[number].id)
        if ready and child.id not in observed.children:
            yield child


def _poison(due: Iterable[Task], observed: Observed) -> Problem | None:
    """Why a due task will not be tried again. What failed and is done since, or is needed no longer, is forgiven."""
    for task in due:
        errors = observed.faults.get((task.stage, task.shard), ())
        raised = [error for error in errors if error not in (KILLED, STORE_FAULT)]
        error, times = Counter(raised or errors or ("",)).most_common(1)[0]
        if (raised and times >= SAME_FAULTS) or len(errors) >= ANY_FAULTS:
            detail = f"Shard {task.shard} of stage {task.stage} failed {len(errors)} times, {times} with {error}."
            return problem("task-failed", detail)
    return None
