"""The page of the experiments, from rows that are partly there."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import checkpoints, experiments, utility
from benchmarks.checkpoints import Checkpoint
from benchmarks.utility import Training


def trained(
    arm: str,
    dice: float,
    draw: int = 0,
    seed: int = 0,
    train: int = 30,
    dataset: str = "PH2",
    development: bool = False,
) -> Training:
    """A training with twenty test cases, of about that Dice."""
    figures = tuple(np.random.default_rng((draw, seed, len(arm))).normal(dice, 0.01, 20).round(4).tolist())
    return Training(
        dataset=dataset,
        development=development,
        segmenter=utility.EVALUATION.segmenter,
        train=train,
        draw=draw,
        arm=arm,
        seed=seed,
        curve={},
        steps=480,
        real=train,
        pairs=0 if arm.startswith("real") else 90,
        seconds=1.0,
        cases=tuple(f"{draw}-{case}" for case in range(20)),
        groups=tuple(range(20)),
        area=(0.1,) * 20,
        dice=figures,
        nsd=figures,
        hd95=(0.1,) * 20,
    )


def runs(arm: str, dice: float) -> list[Training]:
    return [trained(arm, dice, draw, seed) for draw in range(3) for seed in range(2)]


def test_the_page_opens_with_what_the_runs_show() -> None:
    both = [*runs("real", 0.8), *runs("copy-paste", 0.85)]
    helped, harmed = (experiments.page([*both, *runs("synthetic", dice)]) for dice in (0.85, 0.7))
    assert "**Synthetic pairs help.** Against plain copy-paste: not told apart." in helped
    assert "**Synthetic pairs harm.** Against plain copy-paste: worse." in harmed
    assert "| synthetic | 2 + 2 + 2 | 480 | 85" in helped


def test_runs_that_have_no_counterpart_yet_are_no_gain() -> None:
    page = experiments.page([trained("real", 0.8), trained("synthetic", 0.9, draw=1), trained("copy-paste", 0.8)])
    assert "Synthetic pairs have not been measured here yet." in page
    assert "No run has ended yet." in experiments.page([trained("synthetic", 0.9)])


def test_controls_are_told_their_verdict() -> None:
    page = experiments.page([*runs("real", 0.8), *runs("shifted", 0.6), *runs("copies", 0.8)])
    told = {
        name: next(line for line in page.splitlines() if line.startswith(f"| {name} | must"))
        for name in ("shifted", "copies")
    }
    assert told["shifted"].endswith("| harms |")
    assert told["copies"].endswith("| adds nothing |")


def test_a_variant_is_held_against_the_recipe_as_it_stands() -> None:
    """Not against the real cases; the mean only of datasets that have both."""
    some = [
        trained(arm, dice, seed=seed, dataset=dataset, development=True)
        for dataset in ("PH2", "DDTI")
        for arm, dice in (("real", 0.5), ("synthetic", 0.8), ("joint", 0.9))
        for seed in range(3)
    ]
    table = [[cell.strip() for cell in line.split("|")] for line in experiments.ablation(experiments.grouped(some))]
    assert table[0][1:6] == ["variant", "DDTI", "PH2", "mean", "runs"]
    assert [row[1] for row in table[2:]] == ["joint"]
    assert all(abs(float(cell.split()[0]) - 10) < 1 for cell in table[2][2:5])
    before = [
        trained(arm, dice, seed=seed, dataset="PH2", development=True)
        for arm, dice in (("any size", 0.6), ("any size, joint", 0.5))
        for seed in range(3)
    ]
    own = [line for line in experiments.ablation(experiments.grouped(some + before)) if "| any size, joint |" in line]
    assert len(own) == 1
    assert abs(float(own[0].split("|")[3].split()[0]) + 10) < 1
    partly = [one for one in some if (one.dataset, one.arm) != ("PH2", "joint")]
    table = [[cell.strip() for cell in line.split("|")] for line in experiments.ablation(experiments.grouped(partly))]
    assert table[0][1:5] == ["variant", "DDTI", "mean", "runs"]
    assert table[2][3:5] == ["", "3"]


def test_a_seed_on_another_device_is_another_run_and_compared_with_what_ran_there() -> None:
    """The card's runs lie 0.2 higher in both arms, and one arm ran on it alone: the gains hold none of that."""
    on_card = {"device": "a card"}
    some = [trained(arm, dice, seed=seed) for arm, dice in (("real", 0.5), ("synthetic", 0.6)) for seed in range(3)]
    some += [
        trained(arm, dice, seed=seed).model_copy(update=on_card)
        for arm, dice in (("real", 0.7), ("synthetic", 0.8), ("joint", 0.7))
        for seed in range(3)
    ]
    (found,) = experiments.grouped(some).values()
    by_name = {one.name: one for one in experiments.results(found)}
    assert (by_name["synthetic"].runs, by_name["joint"].runs) == (6, 3)
    gains = {name: one.gain.mean for name, one in by_name.items() if one.gain is not None}
    assert abs(gains["synthetic"] - 10) < 1
    assert abs(gains["joint"]) < 1


def test_arms_that_ran_on_one_device_each_are_compared_by_their_seeds() -> None:
    """Even where a third arm ran on both."""
    some = [trained(arm, dice, seed=seed) for arm, dice in (("real", 0.5), ("real x1.5", 0.6)) for seed in range(3)]
    some += [
        trained(arm, dice, seed=seed).model_copy(update={"device": "a card"})
        for arm, dice in (("real", 0.5), ("synthetic", 0.7))
        for seed in range(3)
    ]
    found = experiments.over_datasets(experiments.grouped(some), "synthetic", "real x1.5")
    assert found is not None
    assert abs(found[1].mean - 10) < 1


def test_a_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    line = trained("real", 0.8).model_dump_json()
    (tmp_path / "rows.jsonl").write_text(f"{line}\n{line[:100]}")
    assert utility.read(tmp_path / "rows.jsonl") == [trained("real", 0.8)]
    utility.append(tmp_path / "rows.jsonl", trained("synthetic", 0.9))
    utility.append(tmp_path / "rows.jsonl", trained("synthetic", 0.7))
    assert [row.arm for row in utility.read(tmp_path / "rows.jsonl")] == ["real", "synthetic", "synthetic"]


def test_a_fine_tune_ends_where_its_loss_is_lowest_of_what_hardly_copies() -> None:
    found = [Checkpoint(60, 0.14, 0.0), Checkpoint(120, 0.12, 0.05), Checkpoint(180, 0.11, 0.3)]
    assert checkpoints.best(found) == 120
    assert checkpoints.best(found[:1]) == 60


def test_where_every_checkpoint_copies_the_one_that_copies_least_is_taken() -> None:
    assert checkpoints.best([Checkpoint(60, 0.14, 0.2), Checkpoint(120, 0.12, 0.4)]) == 60


def test_going_on_reads_no_dataset_whose_trainings_are_all_there(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    for one in (*runs("real", 0.8), *runs("real x2", 0.9)):
        utility.append(rows, one)
    before = rows.read_bytes()
    arms = ["--arm", "real", "--arm", "real x2"]
    where = ["--data", str(tmp_path / "nowhere"), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    utility.main([*where, "--rows", str(rows), "--dataset", "PH2", *arms, "--draws", "3", "--seeds", "2"])
    assert rows.read_bytes() == before
    assert "real x2" in (tmp_path / "experiments.md").read_text()
