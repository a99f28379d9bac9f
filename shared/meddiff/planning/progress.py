"""Where a job stands: a pure function of its spec, of what exists, and of what its workers last told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from meddiff.contracts.jobs import End, EvaluateSpec, FinetuneSpec, GenerateSpec, Job, Progress, Spec, Status
from meddiff.contracts.tasks import QUEUE_OF, Queue, Stage
from meddiff.planning import evaluation
from meddiff.planning.leases import InLine, Live
from meddiff.planning.plan import Observed, finetune_steps, plan, segment_range
from meddiff.planning.selection import wanted
from meddiff.planning.turns import wait

# Seconds for a unit of work of a stage relative to a training step (fine-tune), to a candidate inpainted (generate) or
# to a segmenter trained (evaluate): what an estimate assumes of a stage of which no task has told lately.
PRIOR: dict[Stage, float] = {
    "import": 0.2, "cache": 4.0, "inpainter": 1.0, "repair": 1.0, "mask_generator": 0.3, "backgrounds": 20.0,
    "calibrate": 1.0, "publish": 10.0, "masks": 0.2, "inpainting": 1.0, "quality": 0.2, "manifest": 0.1,
    "split": 0.2, "stop": 2.0, "segmenter": 1.0, "report": 0.5,
}  # fmt: skip
TRAINING: tuple[Stage, ...] = ("inpainter", "repair", "mask_generator")
FIRST: dict[str, tuple[Stage, ...]] = {"generate": (), "finetune": ("import",), "evaluate": ("import", "split")}
LEAST_LEFT = 0.1  # Of a task that runs for longer than it should.
CHAIN: tuple[Stage, ...] = ("masks", "inpainting", "quality")  # What a shard of a generate job passes.


@dataclass(frozen=True)
class Measured:
    """What is known beyond the plan's inputs. ``speeds``: seconds for a unit by stage, from markers; ``live``: running
    tasks' own words; ``running``: tasks of the job that a worker holds a lease of; ``workers``: live ones by queue;
    ``position``: 1 for the first of the tenant's jobs that have not ended; ``children_seconds``: what the child jobs
    of an evaluation will still take, None where nothing tells yet; ``took``: seconds of a task by stage, of any job
    lately; ``now``: seconds since the epoch; ``lines``: who has something left to do in each queue, and ``place``: the
    job's own among them; ``weights``: of tenants."""

    speeds: Mapping[Stage, float] = field(default_factory=dict)
    live: Collection[Live] = ()
    running: Collection[tuple[Stage, int]] = ()
    workers: Mapping[Queue, int] = field(default_factory=dict)
    position: int | None = None
    started_at: datetime | None = None
    children_seconds: float | None = 0.0
    took: Mapping[Stage, float] = field(default_factory=dict)
    now: float = 0.0
    lines: Mapping[Queue, Sequence[InLine]] = field(default_factory=dict)
    place: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)


def ended(spec: Spec, end: End, started_at: datetime | None) -> Job:
    """The job after its end."""
    total = int(end.result.get(_unit(spec), _total(spec, None)))
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
    speeds = _speeds(measured)
    return _job(
        spec,
        status=status,
        stage=stage,
        progress=Progress(done=_done(spec, observed, measured.live), total=_total(spec, observed), unit=_unit(spec)),
        eta_seconds=_eta(spec, observed, speeds, measured) if speeds and started else None,
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


def tasks_left(spec: Spec, observed: Observed) -> dict[Stage, int]:
    """How many tasks of each stage are not done, as far as is known."""
    before = {stage: 1 for stage in FIRST[spec.kind] if not observed.has(stage, 0)}
    return before | {stage: len(shards) for stage, shards in _open(spec, observed).items()}


def _open(spec: Spec, observed: Observed) -> dict[Stage, Sequence[int]]:
    """Shards still to be done, by stage; of an evaluation's as many as there are."""
    if isinstance(spec, EvaluateSpec):
        runs = evaluation.runs(spec, observed.splits) if observed.splits else ()
        stops = {run.stop for run in runs}
        return {
            "stop": range(len(stops) - len(observed.done.get("stop", ()))),
            "segmenter": range(len(runs) - len(observed.done.get("segmenter", ()))),
            "report": range(1),
        }
    if isinstance(spec, GenerateSpec):
        shards = range(observed.tally.shards, wanted(observed.tally, spec))
        left: dict[Stage, Sequence[int]] = {
            stage: [shard for shard in shards if not any(observed.has(later, shard) for later in CHAIN[n:])]
            for n, stage in enumerate(CHAIN)
        }
        return left | {"manifest": range(1)}
    return {
        step.stage: [shard for shard in range(step.shards) if not observed.has(step.stage, shard)]
        for step in finetune_steps(spec.recipe, _imported(spec, observed))
    }


def _imported(spec: FinetuneSpec, observed: Observed) -> Mapping[str, Any]:
    return observed.imported or {"pairs": spec.recipe.max_pairs, "backgrounds": 0, "cases": ()}


def _units(spec: Spec, observed: Observed, stage: Stage, shards: Collection[int]) -> float:
    """Units of work in some shards of a stage."""
    if isinstance(spec, FinetuneSpec) and stage in TRAINING:
        return _segments(spec, stage, shards)
    if stage == "backgrounds" or (isinstance(spec, GenerateSpec) and stage != "manifest"):
        return len(shards) * spec.recipe.work.shard_size
    if isinstance(spec, GenerateSpec):
        return spec.request.count
    if isinstance(spec, FinetuneSpec) and stage != "publish":
        return len(shards) * int(_imported(spec, observed)["pairs"])
    return len(shards)


def _speeds(measured: Measured) -> dict[Stage, float]:
    """Seconds for a unit: as markers tell, else as running tasks do so far."""
    speeds: dict[Stage, float] = {}
    for one in measured.live:
        seconds = float(one.info.get("seconds", 0.0))
        if seconds > 0:
            speeds[one.stage] = seconds
    return speeds | {stage: speed for stage, speed in measured.speeds.items() if stage != "import"}


def _eta(spec: Spec, observed: Observed, speeds: Mapping[Stage, float], measured: Measured) -> float | None:
    """Seconds until the end, if no other job comes."""
    unit = sum(speeds[stage] / PRIOR[stage] for stage in speeds) / len(speeds)

    def seconds(stage: Stage, shards: Collection[int]) -> float:
        if stage not in speeds and stage in measured.took:
            return len(shards) * measured.took[stage]
        return _units(spec, observed, stage, shards) * speeds.get(stage, unit * PRIOR[stage])

    left = _open(spec, observed)
    if isinstance(spec, EvaluateSpec):  # Its segmenters train beside its child jobs.
        if measured.children_seconds is None:
            return None
        alone = sum(seconds(stage, shards) for stage, shards in left.items())
        return round(alone / max(1, measured.workers.get("training", 0)) + measured.children_seconds, 1)
    running = set(measured.running)
    idle = {
        stage: seconds(stage, [shard for shard in shards if (stage, shard) not in running])
        for stage, shards in left.items()
    }
    going = {
        stage: [seconds(stage, [n]) * _share_left(spec, measured, stage, n) for n in shards if (stage, n) in running]
        for stage, shards in left.items()
    }

    def queued(queue: Queue, own: float) -> float:
        mine = InLine(tenant=spec.tenant, job_id=spec.id, place=measured.place, seconds=own)
        others = [one for one in measured.lines.get(queue, ()) if one.job_id != spec.id]
        return wait(mine, others, measured.workers.get(queue, 0), measured.weights)

    if isinstance(spec, FinetuneSpec):  # One stage after the other, and one segment of a part after the other.
        own: defaultdict[Queue, float] = defaultdict(float)
        for stage, some in idle.items():
            own[QUEUE_OF[stage]] += some
        waits = {queue: queued(queue, some) for queue, some in own.items() if some}
        chain = max(idle.get(stage, 0.0) for stage in TRAINING)
        waits["training"] = max(waits.get("training", 0.0), chain)
        return round(sum(waits.values()) + sum(max(some, default=0.0) for some in going.values()), 1)
    # Its stages overlap, so the slowest decides when the last shard comes to it; that passes those that follow.
    last = {stage: seconds(stage, [0]) for stage in CHAIN}
    slowest = max(
        (queued(QUEUE_OF[stage], idle[stage] - last[stage] + sum(going[stage])) for stage in CHAIN if idle[stage]),
        default=0.0,
    )
    first = next((n for n, stage in enumerate(CHAIN) if idle[stage] or going[stage]), len(CHAIN))
    tail = [
        last[stage] if n > first or idle[stage] else max(going[stage]) for n, stage in enumerate(CHAIN[first:], first)
    ]
    return round(slowest + sum(tail) + seconds("manifest", [0]), 1)


def _share_left(spec: Spec, measured: Measured, stage: Stage, shard: int) -> float:
    """Of a running task: as it tells, else by how long it has been running."""
    told = next((one for one in measured.live if (one.stage, one.shard) == (stage, shard)), None)
    if told is None:
        return 0.5
    if isinstance(spec, FinetuneSpec) and stage in TRAINING:
        return 1 - _within(spec, told) / _segments(spec, stage, [shard])
    if told.total:
        return 1 - told.done / told.total
    if stage not in measured.took:
        return 0.5
    return min(1.0, max(LEAST_LEFT, 1 - (measured.now - told.since) / measured.took[stage]))
