"""The plan of an evaluation: its arms, its child jobs, and that it converges in whatever order things end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobspecs import CREATED, DATASET, JOB, small
from meddiff.contracts.evaluation import Split
from meddiff.contracts.jobs import End, EndStatus, EvaluateSpec, FinetuneSpec
from meddiff.contracts.problems import problem
from meddiff.contracts.requests import EvaluateRequest
from meddiff.contracts.tasks import Stage, Task
from meddiff.planning import evaluation
from meddiff.planning.plan import Ending, Observed, plan
from meddiff.planning.progress import Measured, snapshot
from pydantic import ValidationError

IMPORTED = {"dataset_id": DATASET, "prompt": None, "backgrounds": 0, "test_dataset_id": None}
MODEL = "md_" + "1" * 32
GENERATED = "0197f000-0000-7000-8000-0000000000aa"


def split(number: int, extra: int = 0) -> Split:
    names = [f"{number * 100 + n:064x}" for n in range(20 + extra)]
    return Split(train=tuple(names[:10]), test=tuple(names[10:20]), extra=tuple(names[20:]))


def spec(**request: Any) -> EvaluateSpec:
    given_pairs = {"model_id": MODEL, "model_dataset_id": DATASET} if {"model", "synthetic_job"} & set(request) else {}
    return EvaluateSpec(
        tenant="local",
        id=JOB,
        created_at=CREATED,
        request=EvaluateRequest(dataset_uri=DATASET, **request),
        recipe=small(),
        synthetic_job=request.get("synthetic_job"),
        **given_pairs,
    )


def ended(status: EndStatus) -> End:
    why = problem("task-failed", "The disk was full.") if status == "failed" else None
    return End(status=status, finished_at=CREATED, problem=why)


@dataclass
class World:
    """An evaluation's markers and its child jobs."""

    spec: EvaluateSpec
    cut: tuple[Split, ...]
    done: dict[Stage, set[int]] = field(default_factory=dict)
    children: dict[str, EndStatus | None] = field(default_factory=dict)

    def observe(self) -> Observed:
        return Observed(
            self.done,
            IMPORTED if "import" in self.done else None,
            splits=self.cut if "split" in self.done else None,
            reported={"verdict": "helps", "runs": 0} if "report" in self.done else None,
            children={child: None if status is None else ended(status) for child, status in self.children.items()},
        )

    def run(self, task: Task) -> None:
        """Leaves the task's marker. Fails where an input is missing."""
        runs = evaluation.runs(self.spec, self.cut)
        if task.stage == "segmenter":
            assert runs[task.shard].stop in self.done["stop"]
        if task.stage == "stop":
            run = next(run for run in runs if run.stop == task.shard)
            if run.arm.source is not None and self.spec.synthetic_job is None:
                assert self.children[evaluation.pairs_job(self.spec, run.split)] in ("succeeded", "incomplete")
        if task.stage == "report":
            assert self.done["segmenter"] == set(range(len(runs)))
        self.done.setdefault(task.stage, set()).add(task.shard)


def carried_out(world: World, choices: list[int], generated: EndStatus = "succeeded") -> Ending:
    """To the end, each time with one of the tasks or child jobs that can be next."""
    for turn in range(10_000):
        decision = plan(world.spec, world.observe())
        if decision.ending is not None:
            return decision.ending
        for child in decision.children:
            assert child.id not in world.children
            if not isinstance(child, FinetuneSpec) and world.spec.request.fits_generators:
                fitted = evaluation.finetunes(world.spec, IMPORTED, world.cut)
                assert any(one.model_id == child.model_id and world.children[one.id] == "succeeded" for one in fitted)
            world.children[child.id] = None
        going_on = [child for child, status in world.children.items() if status is None]
        choice = choices[turn % len(choices)]
        whole = len(decision.due) + len(going_on)
        assert whole, "neither due nor ended"
        place = choice % whole
        if place < len(decision.due):
            world.run(decision.due[place])
        else:
            child = going_on[place - len(decision.due)]
            world.children[child] = "succeeded" if child in fine_tunes(world) else generated
    raise AssertionError("no end")


def fine_tunes(world: World) -> set[str]:
    return {one.id for one in evaluation.finetunes(world.spec, IMPORTED, world.cut)}


requests = st.sampled_from(
    [
        {"folds": 3},
        {"draws": 2, "train": 10},
        {"model": "skin"},
        {"synthetic_job": GENERATED, "mixing": ("joint", "pretrain"), "synthetic": (30, 90)},
        {"draws": 2, "arms": ("oracle",)},
    ]
)


@settings(max_examples=60, deadline=None)
@given(requests, st.lists(st.integers(0, 60), min_size=1, max_size=40), st.sampled_from(["succeeded", "incomplete"]))
def test_converges_whatever_ends_first(request: dict[str, Any], choices: list[int], generated: EndStatus) -> None:
    wanted = spec(**request)
    cut = tuple(split(n, extra=10) for n in range(request.get("folds", request.get("draws", 1))))
    world = World(wanted, cut)
    assert carried_out(world, choices, generated).status == "succeeded"
    assert world.done["segmenter"] == set(range(len(evaluation.runs(wanted, cut))))


def test_a_child_that_fails_ends_the_evaluation_which_names_it_and_says_why() -> None:
    wanted, cut = spec(folds=2), (split(0), split(1))
    child = evaluation.finetunes(wanted, IMPORTED, cut)[1].id
    ending = plan(
        wanted, Observed({"import": {0}, "split": {0}}, IMPORTED, splits=cut, children={child: ended("failed")})
    ).ending
    assert ending is not None
    assert ending.problem is not None
    assert ending.problem.detail == f"Job {child} failed: The disk was full."
    assert ending.problem.type.endswith("child-failed")


def test_arms_hold_the_curve_the_oracle_and_every_mixing() -> None:
    wanted = spec(synthetic_job=GENERATED, synthetic=(30, 90), mixing=("joint", "pretrain"))
    names = [arm.name for arm in evaluation.arms(wanted.request, (split(0, extra=10),))]
    assert names == [
        "real", "real x0.5", "real x1.5", "real x2",
        "synthetic 30 joint", "synthetic 30 pretrain", "copy-paste 30",
        "synthetic 90 joint", "synthetic 90 pretrain", "copy-paste 90",
    ]  # fmt: skip
    assert "real x2" not in [arm.name for arm in evaluation.arms(wanted.request, (split(0, extra=5),))]
    assert "real x1.5" not in [arm.name for arm in evaluation.arms(wanted.request, (split(0),))]


def test_each_generator_is_fitted_to_its_own_split_alone() -> None:
    wanted, cut = spec(folds=2), (split(0), split(1))
    first, second = evaluation.finetunes(wanted, IMPORTED, cut)
    assert first.request.cases == cut[0].train
    assert second.request.cases == cut[1].train
    assert first.request.split_seed != second.request.split_seed
    pairs = evaluation.generates(wanted, IMPORTED, cut)
    assert [child.model_id for child in pairs] == [first.model_id, second.model_id]
    assert {child.parent for child in (first, second, *pairs)} == {wanted.id}
    assert len({child.id for child in (first, second, *pairs)}) == 4


def test_progress_counts_runs_and_waits_with_an_estimate_until_something_is_measured() -> None:
    wanted, cut = spec(folds=2), (split(0), split(1))
    observed = Observed({"import": {0}, "split": {0}, "stop": {0}, "segmenter": {0, 1}}, IMPORTED, splits=cut)
    total = len(evaluation.runs(wanted, cut))
    job = snapshot(wanted, observed, Measured({"segmenter": 10.0}, children_seconds=None))
    assert job.progress is not None
    assert (job.progress.done, job.progress.total, job.progress.unit) == (2, total, "runs")
    assert job.eta_seconds is None
    known = snapshot(wanted, observed, Measured({"segmenter": 10.0, "stop": 20.0}, children_seconds=100.0))
    stops = total // wanted.request.seeds - 1
    assert known.eta_seconds == pytest.approx(100 + 10 * (total - 2) + 20 * stops + 5)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"folds": 5, "model": "skin"}, "not model and folds"),
        ({"folds": 5, "draws": 3}, "draws and train"),
        ({"test_uri": DATASET}, "test_uri"),
        ({"synthetic": (30, 30)}, "twice"),
        ({"folds": 3, "arms": ("oracle",)}, "oracle"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(request_: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        EvaluateRequest(dataset_uri=DATASET, **request_)
