"""The planner: what is due, and that every job converges whatever dies, runs twice or comes in another order."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobspecs import finetune, generate, imported, scored, small
from meddiff.contracts.jobs import FinetuneSpec, GenerateSpec, Spec
from meddiff.contracts.tasks import KILLED, STORE_FAULT, Stage, Task
from meddiff.planning.plan import Ending, Observed, finetune_steps, plan, segment_range, segments, training_steps
from meddiff.planning.selection import Entry, Selection, Tally, budget, fold, select

Key = tuple[Stage, int]


@dataclass
class World:
    """The markers of one job, and tasks that take no time."""

    spec: Spec
    rate: float = 0.6
    import_output: dict[str, Any] = field(default_factory=imported)
    markers: dict[Key, Any] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    def observe(self) -> Observed:
        done: dict[Stage, set[int]] = {}
        for stage, shard in self.markers:
            done.setdefault(stage, set()).add(shard)
        if isinstance(self.spec, GenerateSpec):
            self.tally = fold(self.tally, contiguous(self.markers, self.tally.shards), self.spec)
        return Observed(done, self.markers.get(("import", 0)), self.tally)

    def run(self, task: Task) -> None:
        """Leaves the task's marker; a second run leaves the same one. Fails where an input is missing."""
        for needed in inputs(self.spec, task, self.import_output):
            assert needed in self.markers, f"{task.stage} {task.shard} needs {needed}"
        output: Any = {}
        if task.stage == "import":
            output = self.import_output
        elif task.stage == "quality" and isinstance(self.spec, GenerateSpec):
            assert task.shard < budget(self.spec)
            output = scored(self.spec, task.shard, self.rate)
        elif task.stage == "manifest":
            output = self.selection()
        key = (task.stage, task.shard)
        assert self.markers.setdefault(key, output) == output

    def selection(self) -> Selection:
        """The manifest's contents, from every quality marker there is."""
        assert isinstance(self.spec, GenerateSpec)
        shards = sorted(shard for stage, shard in self.markers if stage == "quality")
        entries = [Entry.model_validate(c) for shard in shards for c in self.markers["quality", shard]]
        return select(entries, self.spec)


def contiguous(markers: dict[Key, Any], first: int) -> list[list[Entry]]:
    found: list[list[Entry]] = []
    while ("quality", first + len(found)) in markers:
        found.append([Entry.model_validate(c) for c in markers["quality", first + len(found)]])
    return found


def inputs(spec: Spec, task: Task, import_output: dict[str, Any]) -> list[Key]:
    """What must exist before a task runs, written down apart from the planner."""
    if task.stage in ("import", "masks"):
        return []
    if task.stage == "inpainting":
        return [("masks", task.shard)]
    if task.stage == "quality":
        return [("inpainting", task.shard)]
    if task.stage == "manifest":
        return [("quality", 0)]
    needed: list[Key] = [("import", 0)]
    if task.stage in ("inpainter", "repair"):
        needed.append(("cache", 0))
    if task.stage in ("inpainter", "repair", "mask_generator") and task.shard:
        needed.append((task.stage, task.shard - 1))
    if task.stage == "backgrounds":
        last = segments(spec.recipe.finetuning.steps, spec.recipe.finetuning.segment_steps) - 1
        needed += [("inpainter", last)] + ([("repair", last)] if spec.recipe.finetuning.separate_repair else [])
    if task.stage == "publish":
        needed += [
            (step.stage, shard)
            for step in finetune_steps(spec.recipe, import_output)
            if step.stage != "publish"
            for shard in range(step.shards)
        ]
    return needed


def straight(world: World) -> tuple[World, Ending]:
    """Every due task run once, in order, until the end."""
    for _ in range(10_000):
        decision = plan(world.spec, world.observe())
        if decision.ending is not None:
            return world, decision.ending
        assert decision.due, "neither due nor ended"
        world.run(decision.due[0])
    raise AssertionError("no end")


Mishap = tuple[int, int, str]
mishaps = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["done", "dies", "twice"])), max_size=120
)


def chaotic(world: World, events: list[Mishap]) -> tuple[World, Ending]:
    """Tasks are sent again and again, die, run twice, run late and out of order, until the events are used up; what was
    sent and never ran runs after the end."""
    sent: list[Task] = []
    for which, whom, fate in events:
        decision = plan(world.spec, world.observe())
        if decision.ending is not None:
            break
        assert len({(task.stage, task.shard) for task in decision.due}) == len(decision.due)
        assert not any((task.stage, task.shard) in world.markers for task in decision.due)
        sent.append(decision.due[which % len(decision.due)])
        task = sent.pop(whom % len(sent)) if fate == "dies" else sent[whom % len(sent)]
        if fate != "dies":
            world.run(task)
        if fate == "twice":
            world.run(task)
    world, ending = straight(world)
    for late in sent:
        world.run(late)
    assert plan(world.spec, world.observe()).ending == ending
    return world, ending


recipes = st.builds(
    lambda repair, background, least, size, attempts: small(
        finetuning={"separate_repair": repair},
        inpainting={"background": background},
        mask_generation={"min_masks": least},
        work={"shard_size": size, "attempts": attempts},
    ),
    st.booleans(),
    st.sampled_from(["cover", "repair"]),
    st.sampled_from([8, 40]),
    st.integers(1, 6),
    st.sampled_from([1.0, 2.0, 4.0]),
)


@given(recipes, st.integers(0, 3), mishaps)
@settings(max_examples=60, deadline=None)
def test_a_finetune_converges_to_the_same_markers(recipe: Any, backgrounds: int, events: list[Mishap]) -> None:
    output = imported(backgrounds=backgrounds)
    calm, ending = straight(World(finetune(recipe), import_output=output))
    wild, same = chaotic(World(finetune(recipe), import_output=output), events)
    assert same == ending
    assert wild.markers == calm.markers
    assert ending.status == "succeeded"
    steps = training_steps(wild.spec.recipe, output)
    assert ending.result == {"model_id": wild.spec.model_id, "dataset_id": output["dataset_id"], "steps": steps}


@given(recipes, st.integers(1, 20), st.sampled_from([0.0, 0.3, 0.8, 1.0]), mishaps)
@settings(max_examples=60, deadline=None)
def test_a_generate_job_converges_to_the_same_manifest(
    recipe: Any, count: int, rate: float, events: list[Mishap]
) -> None:
    spec = generate(count, start_index=17, recipe=recipe)
    calm, ending = straight(World(spec, rate))
    wild, same = chaotic(World(spec, rate), events)
    assert same == ending
    assert wild.markers["manifest", 0] == calm.markers["manifest", 0] == wild.selection()
    chosen = wild.selection()
    assert ending.result["accepted"] == len(chosen.accepted) <= count
    assert ending.result["next_start_index"] == chosen.next_index
    assert (ending.status == "succeeded") == (len(chosen.accepted) == count)


@given(st.integers(1, 30), st.lists(st.integers(1, 3), min_size=1), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_fold_does_not_depend_on_how_it_is_cut(count: int, cuts: list[int], seed: int) -> None:
    spec = generate(count)
    shards = [[Entry.model_validate(c) for c in scored(spec, s, 0.7, seed)] for s in range(sum(cuts))]
    whole = fold(Tally(), shards, spec)
    pieces, first = Tally(), 0
    for cut in cuts:
        pieces = fold(Tally.from_bytes(pieces.to_bytes()), shards[first : first + cut], spec)
        first += cut
    chosen = select([entry for shard in shards for entry in shard], spec)
    assert pieces == whole
    assert whole.accepted == tuple(entry.index for entry in chosen.accepted)
    assert whole.rejected == tuple((entry.index, reason) for entry, reason in chosen.rejected)
    assert whole.reasons == chosen.by_reason()


def test_a_shape_that_overlaps_an_earlier_accepted_one_is_a_duplicate() -> None:
    same = "ff" * 512
    entries = [
        Entry(index=0, reason="copy", signature=same),
        Entry(index=1, reason=None, signature=same),
        Entry(index=2, reason=None, signature=same),
        Entry(index=3, reason=None, signature="0f" * 512),
        Entry(index=4, reason=None, signature="f0" * 512),
    ]
    chosen = select(entries, generate(2))
    assert [entry.index for entry in chosen.accepted] == [1, 3]
    assert [(entry.index, reason) for entry, reason in chosen.rejected] == [(0, "copy"), (2, "duplicate_shape")]
    assert chosen.next_index == 4


def test_shapes_that_the_caller_gave_are_used_again() -> None:
    spec = generate(3)
    given = spec.model_copy(update={"request": spec.request.model_copy(update={"masks": f"ds_{'0' * 32}"})})
    entries = [Entry(index=index, reason=None, signature="ff" * 512) for index in range(3)]
    assert len(select(entries, given).accepted) == 3
    assert len(select(entries, spec).accepted) == 1


def stages(tasks: Collection[Task]) -> list[tuple[str, int]]:
    return [(task.stage, task.shard) for task in tasks]


def test_order_of_a_finetune() -> None:
    world = World(finetune())
    assert stages(plan(world.spec, world.observe()).due) == [("import", 0)]
    world.markers["import", 0] = imported()
    assert stages(plan(world.spec, world.observe()).due) == [("cache", 0), ("calibrate", 0), ("mask_generator", 0)]
    world.markers["cache", 0] = {}
    due = plan(world.spec, world.observe()).due
    assert stages(due) == [("inpainter", 0), ("calibrate", 0), ("mask_generator", 0)]


def test_few_masks_train_no_generator() -> None:
    few = finetune_steps(small(), imported(pairs=7))
    assert "mask_generator" not in [step.stage for step in few]
    assert training_steps(small(), imported(pairs=7)) == small().finetuning.steps


def test_backgrounds_of_the_dataset_need_no_repair() -> None:
    recipe = small(inpainting={"background": "repair"})
    repaired = {step.stage: step for step in finetune_steps(recipe, imported(pairs=30))}
    assert repaired["backgrounds"].shards == 8
    assert "backgrounds" not in [step.stage for step in finetune_steps(recipe, imported(backgrounds=1))]


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("background", ["cover", "repair"])
@pytest.mark.parametrize("own", [0, 1])
def test_a_second_u_net_is_trained_where_it_repairs(separate: bool, background: str, own: int) -> None:
    recipe = small(finetuning={"separate_repair": separate}, inpainting={"background": background})
    planned = {step.stage for step in finetune_steps(recipe, imported(backgrounds=own))}
    assert ("repair" in planned) == recipe.has_second_unet(own) == (separate and "backgrounds" in planned)


@pytest.mark.parametrize(("steps", "length"), [(10, 4), (8, 4), (1, 60), (360, 60)])
def test_segments_cover_every_step_once(steps: int, length: int) -> None:
    covered = [step for k in range(segments(steps, length)) for step in segment_range(k, steps, length)]
    assert covered == list(range(steps))


def test_shards_planned_follow_the_acceptance_rate() -> None:
    spec = generate(32, recipe=small(work={"shard_size": 8, "attempts": 10.0}))
    world = World(spec, rate=0.25)
    assert len(plan(spec, world.observe()).due) == 5  # 32 / 0.8 / 8
    for shard in range(5):
        for stage in ("masks", "inpainting", "quality"):
            world.run(Task(tenant="local", job_id=spec.id, stage=stage, shard=shard))
    due = plan(spec, world.observe()).due
    assert {task.stage for task in due} == {"masks"}
    assert min(task.shard for task in due) == 5
    assert len(due) > 5


def test_an_exhausted_budget_ends_incomplete_and_says_what_to_change() -> None:
    world, ending = straight(World(generate(10, start_index=100), rate=0.0))
    assert ending.status == "incomplete"
    assert ending.result == {"accepted": 0, "requested": 10, "next_start_index": 140}
    assert ending.problem is not None
    assert ending.problem.type.endswith("attempts-exhausted")
    assert "start_index 140" in ending.problem.detail
    assert "too_far" in ending.problem.detail
    assert len([key for key in world.markers if key[0] == "quality"]) == 10


def test_a_cancelled_job_has_nothing_due() -> None:
    decision = plan(finetune(), Observed({"import": {0}}, imported(), cancelled=True))
    assert decision.due == ()
    assert decision.ending is not None
    assert decision.ending.status == "cancelled"


def test_poison_ends_the_job_without_a_trace() -> None:
    faults: dict[Key, tuple[str, ...]] = {("cache", 0): ("KeyError in load, a.py:3",) * 2}
    observed = Observed({"import": {0}}, imported(), faults=faults)
    assert plan(finetune(), observed).ending is None
    faults["cache", 0] += ("OSError in load, a.py:9", "KeyError in load, a.py:3")
    ending = plan(finetune(), observed).ending
    assert ending is not None
    assert ending.status == "failed"
    assert ending.problem is not None
    assert "Shard 0 of stage cache" in ending.problem.detail
    for error in (KILLED, STORE_FAULT):
        often = [Observed({"import": {0}}, imported(), faults={("cache", 0): (error,) * n}) for n in (8, 9)]
        assert [plan(finetune(), one).ending is not None for one in often] == [False, True]
    done = Observed({"import": {0}, "cache": {0}}, imported(), faults=faults)
    assert plan(finetune(), done).ending is None


def test_planning_a_long_job_is_quick() -> None:
    """A watermark over 4,000 scored shards costs no more than what lies beyond it."""
    spec = generate(20_000, recipe=small(work={"shard_size": 8}))
    assert isinstance(spec, GenerateSpec)
    tally = Tally(4_000, tuple(range(0, 32_000, 2)), b"", tuple((i, "copy") for i in range(1, 32_000, 2)))
    due = plan(spec, Observed({"quality": {4_001}}, tally=tally)).due
    assert (due[0].stage, due[0].shard) == ("masks", 4_000)
    assert 4_001 not in [task.shard for task in due]
    assert isinstance(finetune(), FinetuneSpec)
