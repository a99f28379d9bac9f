"""Where a job stands: a pure function of its spec, of what exists, and of what its workers last told."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from meddiff.contracts.jobs import End, EvaluateSpec, FinetuneSpec, GenerateSpec, Job, Progress, Spec, Status
from meddiff.contracts.tasks import QUEUE_OF, Queue, Stage
from meddiff.planning import evaluation
from meddiff.planning.leases import Live
from meddiff.planning.plan import Observed, finetune_steps, plan, segment_range
from meddiff.planning.selection import wanted

# Seconds for a unit of work of a stage relative to a training step (fine-tune), to a candidate inpainted (generate) or
# to a segmenter trained (evaluate): what an estimate assumes of a stage until its speed has been measured in this job.
PRIOR: dict[Stage, float] = {
    "import": 0.2, "cache": 4.0, "inpainter": 1.0, "repair": 1.0, "mask_generator": 0.3, "backgrounds": 20.0,
    "calibrate": 1.0, "publish": 10.0, "masks": 0.2, "inpainting": 1.0, "quality": 0.2, "manifest": 0.1,
    "split": 0.2, "stop": 2.0, "segmenter": 1.0, "report": 0.5,
}  # fmt: skip
PACE_FROM = 0.03  # The share of a job's work that has to be behind it before its pace means something.
TRAINING: tuple[Stage, ...] = ("inpainter", "repair", "mask_generator")


@dataclass(frozen=True)
class Measured:
    """What is known beyond the plan's inputs. ``speeds``: seconds for a unit by stage, from markers; ``live``: running
    tasks' own words; ``running``: tasks of the job that a worker holds a lease of; ``elapsed``: seconds since
    ``started_at``; ``workers``: live ones by queue;
    ``position``: 1 for the first of the jobs that have not ended; ``children_seconds``: what the child jobs of an
    evaluation will still take, None where nothing tells yet."""

    speeds: Mapping[Stage, float] = field(default_factory=dict)
    live: Collection[Live] = ()
    running: Collection[tuple[Stage, int]] = ()
    elapsed: float = 0.0
    workers: Mapping[Queue, int] = field(default_factory=dict)
    position: int | None = None
    started_at: datetime | None = None
    children_seconds: float | None = 0.0


def ended(spec: Spec, end: End, started_at: datetime | None) -> Job:
    """The job after its end."""
    total = _total(spec, None) if not isinstance(spec, EvaluateSpec) else int(end.result.get("runs", 0))
    done = end.result.get("accepted", total) if end.status in ("succeeded", "incomplete") else None
    return _job(
        spec,
        status=end.status,
        progress=None if done is None else Progress(done=done, total=total, unit=_unit(spec)),
        started_at=started_at,
        finished_at=end.finished_at,
        result=end.result or None,
        problem=end.problem,
    )


def snapshot(spec: Spec, observed: Observed, measured: Measured) -> Job:
    """The job before its end. ``eta_seconds`` is absent until a speed has been measured."""
    started = bool(observed.done) or observed.tally.shards > 0 or bool(measured.running)
    due = plan(spec, observed).due
    stage = due[0].stage if due else "generators" if observed.children else None
    status: Status = "running"
    if observed.cancelled:
        status = "cancelling"
    elif not started:
        status = "queued"
    elif stage == "import":
        status = "validating"
    remaining = _remaining(spec, observed)
    speeds = _speeds(measured)
    return _job(
        spec,
        status=status,
        stage=stage,
        progress=Progress(done=_done(spec, observed, measured.live), total=_total(spec, observed), unit=_unit(spec)),
        eta_seconds=_eta(spec, remaining, speeds, measured, observed) if speeds and started else None,
        queue_position=measured.position if status == "queued" else None,
        started_at=measured.started_at,
    )


def _job(spec: Spec, **state: object) -> Job:
    here = f"/jobs/{spec.id}"
    links = {"self": here, "cancel": f"{here}/cancel", "previews": f"{here}/previews"}
    if isinstance(spec, FinetuneSpec):
        links["model"] = f"/models/{spec.model_id}"
    elif isinstance(spec, GenerateSpec):
        links["manifest"] = f"{here}/manifest"
    else:
        links["report"] = f"{here}/report"
    if spec.parent is not None:
        links["parent"] = f"/jobs/{spec.parent}"
    return Job.model_validate(
        {
            "id": spec.id,
            "kind": spec.kind,
            "parent": spec.parent,
            "requested_by": spec.requested_by,
            "created_at": spec.created_at,
            "request": spec.request.model_dump(mode="json"),
            "recipe": spec.recipe,
            "metadata": spec.request.metadata,
            "links": links,
            **state,
        }
    )


UNIT = {"finetune": "steps", "generate": "pairs", "evaluate": "runs"}


def _unit(spec: Spec) -> str:
    return UNIT[spec.kind]


def _segments(spec: FinetuneSpec, stage: Stage, shards: Collection[int]) -> int:
    """Training steps in some segments of a part."""
    part = spec.recipe.mask_generation if stage == "mask_generator" else spec.recipe.finetuning
    return sum(len(segment_range(shard, part.steps, part.segment_steps)) for shard in shards)


def _parts(spec: FinetuneSpec, observed: Observed | None) -> dict[Stage, range]:
    """Segments of each training part; those that the recipe may ask for where the dataset is not known yet."""
    known = observed.imported if observed is not None else None
    imported = known or {"pairs": spec.recipe.mask_generation.min_masks, "backgrounds": 0, "cases": ()}
    steps = finetune_steps(spec.recipe, imported)
    return {step.stage: range(step.shards) for step in steps if step.stage in TRAINING}


def _total(spec: Spec, observed: Observed | None) -> int:
    if isinstance(spec, GenerateSpec):
        return spec.request.count
    if isinstance(spec, EvaluateSpec):
        splits = observed.splits if observed is not None else None
        return len(evaluation.runs(spec, splits)) if splits else 0
    return sum(_segments(spec, stage, shards) for stage, shards in _parts(spec, observed).items())


def _done(spec: Spec, observed: Observed, live: Collection[Live]) -> int:
    if isinstance(spec, GenerateSpec):
        return len(observed.tally.accepted)
    if isinstance(spec, EvaluateSpec):
        return len(observed.done.get("segmenter", ()))
    finished = sum(_segments(spec, stage, observed.done.get(stage, ())) for stage in TRAINING)
    within = sum(_within(spec, one) for one in live if one.stage in TRAINING and not observed.has(one.stage, one.shard))
    return min(finished + within, _total(spec, observed))


def _within(spec: FinetuneSpec, live: Live) -> int:
    """Steps of its own segment that a running training task has behind it; it reports the part's step."""
    part = spec.recipe.mask_generation if live.stage == "mask_generator" else spec.recipe.finetuning
    return max(0, min(live.done - live.shard * part.segment_steps, part.segment_steps))


def _remaining(spec: Spec, observed: Observed) -> dict[Stage, float]:
    """Units still to be done, by stage."""
    if isinstance(spec, EvaluateSpec):
        runs = evaluation.runs(spec, observed.splits) if observed.splits else ()
        stops = {run.stop for run in runs}
        return {
            "stop": len(stops) - len(observed.done.get("stop", ())),
            "segmenter": len(runs) - len(observed.done.get("segmenter", ())),
            "report": 1,
        }
    if isinstance(spec, GenerateSpec):
        shards = range(observed.tally.shards, wanted(observed.tally, spec))
        chain: tuple[Stage, ...] = ("quality", "inpainting", "masks")
        left: dict[Stage, float] = {}
        for n, stage in enumerate(chain):
            later = chain[: n + 1]
            open_shards = sum(not any(observed.has(s, shard) for s in later) for shard in shards)
            left[stage] = open_shards * spec.recipe.work.shard_size
        return left | {"manifest": spec.request.count}
    imported = observed.imported or {"pairs": spec.recipe.max_pairs, "backgrounds": 0, "cases": ()}
    units: dict[Stage, float] = {}
    for step in finetune_steps(spec.recipe, imported):
        missing = [shard for shard in range(step.shards) if not observed.has(step.stage, shard)]
        if step.stage in TRAINING:
            units[step.stage] = _segments(spec, step.stage, missing)
        elif step.stage == "backgrounds":
            units[step.stage] = len(missing) * spec.recipe.work.shard_size
        else:
            units[step.stage] = len(missing) * (1 if step.stage == "publish" else imported["pairs"])
    return units


def _speeds(measured: Measured) -> dict[Stage, float]:
    """Seconds for a unit: as markers tell, else as running tasks do so far."""
    speeds: dict[Stage, float] = {}
    for one in measured.live:
        seconds = float(one.info.get("seconds", 0.0))
        if seconds > 0:
            speeds[one.stage] = seconds
    return speeds | {stage: speed for stage, speed in measured.speeds.items() if stage != "import"}


def _eta(
    spec: Spec, remaining: Mapping[Stage, float], speeds: Mapping[Stage, float], measured: Measured, observed: Observed
) -> float | None:
    """Seconds until the end: what is left of the job's work, at the pace of what is behind it, which tells how many
    workers it has and whom it shares them with. Until enough is behind it: a fine-tune's stages follow one another; a
    generate job's overlap, so that the slowest decides. An evaluation's segmenters train beside its child jobs."""
    unit = sum(speeds[stage] / PRIOR[stage] for stage in speeds) / len(speeds)
    begun = _begun(spec, measured)
    seconds = {
        stage: max(0.0, units - begun.get(stage, 0.0)) * speeds.get(stage, unit * PRIOR[stage])
        for stage, units in remaining.items()
    }
    left = sum(seconds.values())
    if isinstance(spec, EvaluateSpec):
        if measured.children_seconds is None:
            return None
        trainers = max(1, measured.workers.get("training", 0))
        return round((left + measured.children_seconds) / trainers, 1)
    whole = _whole(spec, observed)
    behind = sum(units * speeds.get(stage, unit * PRIOR[stage]) for stage, units in whole.items()) - left
    if measured.elapsed > 0 and behind >= PACE_FROM * (behind + left):
        return round(left * measured.elapsed / behind, 1)
    if isinstance(spec, FinetuneSpec):
        return round(left, 1)
    shared = {stage: s / max(1, measured.workers.get(QUEUE_OF[stage], 0)) for stage, s in seconds.items()}
    return round(max(shared.values()) + seconds["manifest"], 1)


def _begun(spec: Spec, measured: Measured) -> dict[Stage, float]:
    """Units that running tasks have behind them: as they tell, else half of them."""
    told = {(one.stage, one.shard): one for one in measured.live}
    begun: dict[Stage, float] = {}
    for stage, shard in measured.running:
        units = 0.0
        if isinstance(spec, FinetuneSpec) and stage in TRAINING:
            one = told.get((stage, shard))
            units = _segments(spec, stage, [shard]) / 2 if one is None else _within(spec, one)
        elif isinstance(spec, GenerateSpec) and stage != "manifest":
            units = spec.recipe.work.shard_size / 2
        begun[stage] = begun.get(stage, 0.0) + units
    return begun


def _whole(spec: FinetuneSpec | GenerateSpec, observed: Observed) -> dict[Stage, float]:
    """Units of the whole job, by stage."""
    if isinstance(spec, FinetuneSpec):
        return _remaining(spec, Observed(imported=observed.imported))
    shards = wanted(observed.tally, spec)
    size = spec.recipe.work.shard_size
    return {
        "masks": shards * size,
        "inpainting": shards * size,
        "quality": shards * size,
        "manifest": spec.request.count,
    }
