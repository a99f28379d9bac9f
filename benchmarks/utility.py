"""Are synthetic pairs worth training on? Dice on unseen cases with and without them, unattended and resumable.

    python -m benchmarks.utility --data FOLDER --dataset PH2 --dataset BUSI --hours 2 --rows out/utility.jsonl

For each draw of thirty training cases a generator is made from them alone, and segmenters are trained on: the real
pairs; real and synthetic; real and copy-paste (the composites that the synthetic ones were started from); and twice as
many real ones (the oracle). How long an arm trains is chosen inside the thirty, by the same rule for each: the step of
the best mean Dice over three inner folds. Rows are appended as they finish, and those that are there already are not
made again; ``--report`` writes what they say. Only the development half of a dataset is used (``is_development``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from meddiff.contracts.recipes import CPU
from meddiff.science import encoders, geometry
from meddiff.science.evaluation import comparison, figures, segmenters, splits, training
from meddiff.seeds import derive
from meddiff_services.pictures import Mask, Pixels

from benchmarks.in_process import Generator, Made
from benchmarks.sources import Case, cases_by_digest

SIZE = 128
TESTED = 100
LEAST_TESTED = 20
INNER_FOLDS = 3
ARMS = ("real", "synthetic", "copy-paste", "oracle")
COMPARED = ("dataset", "segmenter", "pairs", "synthetic")
SCHEDULE = training.Schedule()

Pair = tuple[Pixels, Mask]


@dataclass(frozen=True)
class Row:
    """The figures of one test case under one trained segmenter."""

    dataset: str
    segmenter: str
    pairs: int
    synthetic: int
    draw: int
    arm: str
    seed: int
    steps: int
    case: str
    dice: float
    nsd: float
    hd95: float


@dataclass(frozen=True)
class Plan:
    """What is compared: cases to train on, synthetic pairs, draws of the cases and seeds of the segmenter."""

    segmenter: str
    pairs: int
    synthetic: int
    draws: int
    seeds: int


def is_development(digest: str) -> bool:
    """Whether the case with this digest may be used for tuning; the others are kept for the final figure."""
    return derive("development", digest) % 2 == 0


@dataclass(frozen=True)
class Development:
    """The development half of a dataset: its cases by digest, whole groups of them, and its lesion-free images."""

    name: str
    cases: dict[str, Case]
    group_of: list[int]
    healthy: list[Pixels]


def load(folder: Path) -> Development:
    """Groups are formed over the whole dataset; a group belongs to the half of its first case."""
    found = cases_by_digest(folder)
    lesions = {digest: case for digest, case in found.items() if case.mask.any()}
    encoder = encoders.load_encoder("efficientnet-lite0", "builtin", torch.device("cpu"))
    whole = [geometry.resize_image(case.image, (160, 160)) for case in lesions.values()]
    vectors = np.stack([encoder(_as_tensor(image)[None])[0].numpy() for image in whole])
    group_of = splits.groups([case.patient for case in lesions.values()], vectors)
    first = {group: digest for digest, group in reversed(list(zip(lesions, group_of, strict=True)))}
    kept = [(d, g) for d, g in zip(lesions, group_of, strict=True) if is_development(first[g])]
    healthy = [case.image for case in found.values() if case.role == "background"]
    return Development(folder.name, {d: lesions[d] for d, _ in kept}, [g for _, g in kept], healthy)


def _as_tensor(image: Pixels) -> torch.Tensor:
    coloured = np.broadcast_to(image, (*image.shape[:2], 3)).transpose(2, 0, 1)
    return torch.from_numpy(coloured.astype(np.float32) / 255)


# ------------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """What a segmenter is trained on. ``made_from``: of each synthetic pair the places of the real ones it shows."""

    real: list[Pair]
    synthetic: list[Pair]
    made_from: list[set[int]]


def arms(
    data: Development, plan: Plan, draw: splits.Draw, seed: int, wanted: Sequence[str]
) -> Iterator[tuple[str, Arm]]:
    """The arms of one draw, one after the other; the generator is made once, when the first needs it."""
    cases = list(data.cases.values())
    real: list[Pair] = [(cases[i].image, cases[i].mask) for i in draw.train]
    made: list[Made] = []
    if {"synthetic", "copy-paste"} & set(wanted):
        made = Generator([cases[i] for i in draw.train], data.healthy, CPU, seed).generate(plan.synthetic, seed)
    origins = [{m.donor, m.background} - {None} for m in made]
    for name in wanted:
        if name == "oracle":
            more: list[Pair] = [(cases[i].image, cases[i].mask) for i in draw.extra]
            yield name, Arm(real + more, [], [])
        elif name == "real":
            yield name, Arm(real, [], [])
        else:
            pairs = [(m.image, m.label) if name == "synthetic" else (m.start, m.shape) for m in made]
            yield name, Arm(real, pairs, [{int(o) for o in origin if o is not None} for origin in origins])


def chosen_steps(arm: Arm, segmenter: str, seed: int) -> int:
    """Where mean Dice over the inner folds is best. A synthetic pair that shows a held-out case is left out."""
    parts = splits.folds(range(len(arm.real)), INNER_FOLDS, seed)
    curves: dict[int, list[float]] = defaultdict(list)
    for number, held in enumerate(parts):
        inside = training.Pairs.of([pair for i, pair in enumerate(arm.real) if i not in held], SIZE)
        kept = [pair for pair, origin in zip(arm.synthetic, arm.made_from, strict=True) if not origin & set(held)]
        synthetic = training.Pairs.of(kept, SIZE) if kept else None
        network = segmenters.build(segmenter, derive(seed, "inner", number))
        for steps, averaged in training.fit(network, inside, synthetic, SCHEDULE, derive(seed, "inner", number)):
            curves[steps] += [dice(averaged, *arm.real[i]) for i in held]
    return max(curves, key=lambda steps: float(np.mean(curves[steps])))


def dice(network: torch.nn.Module, image: Pixels, mask: Mask) -> float:
    return figures.figures(training.predict(network, image, SIZE), mask).dice


# ------------------------------------------------------------------------------------------------------------- rows


def rows(data: Development, plan: Plan, done: set[tuple[int, str, int]]) -> Iterator[list[Row]]:
    """The rows of each training that is not ``done``: (draw, arm, seed)."""
    digests = list(data.cases)
    extra = max(0, min(plan.pairs, len(set(data.group_of)) - plan.pairs - LEAST_TESTED))
    planned = [arm for arm in ARMS if arm != "oracle" or extra]
    for number in range(plan.draws):
        left = {(arm, seed) for arm in planned for seed in range(plan.seeds)} - {
            (a, s) for d, a, s in done if d == number
        }
        if not left:
            continue
        draw = splits.draw(data.group_of, plan.pairs, extra, TESTED, derive(data.name, "draw", number))
        wanted = [arm for arm in planned if any(arm == a for a, _ in left)]
        for name, arm in arms(data, plan, draw, derive(data.name, "generator", number), wanted):
            torch.set_num_threads(2)
            steps = chosen_steps(arm, plan.segmenter, derive(data.name, "inner", number))
            schedule = training.Schedule(steps=steps, every=steps)
            real = training.Pairs.of(arm.real, SIZE)
            synthetic = training.Pairs.of(arm.synthetic, SIZE) if arm.synthetic else None
            for seed in sorted(s for a, s in left if a == name):
                network = segmenters.build(plan.segmenter, derive("segmenter", number, seed))
                ((_, trained),) = training.fit(network, real, synthetic, schedule, derive("segmenter", number, seed))
                run = (data.name, plan.segmenter, plan.pairs, plan.synthetic, number, name, seed, steps)
                yield [Row(*run, digests[i], **asdict(_judged(trained, data, i))) for i in draw.test]


def _judged(network: torch.nn.Module, data: Development, index: int) -> figures.Figures:
    case = list(data.cases.values())[index]
    return figures.figures(training.predict(network, case.image, SIZE), case.mask)


# ----------------------------------------------------------------------------------------------------------- report


def read(path: Path) -> list[Row]:
    """The rows written so far. A line holds a training's, whole; one that was cut off is left out."""
    found: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found += [Row(**row) for row in json.loads(line)]
        except ValueError:
            continue
    return found


def report(found: Sequence[Row]) -> str:
    """A table in Markdown: mean Dice of each arm and its gain over real only, with the 95 % interval."""
    lines = [
        "| dataset | segmenter | real | synthetic | arm | runs | steps | Dice | gain | 95 % interval | p, Holm |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    gains: dict[tuple[str, ...], comparison.Gain] = {}
    for key, group in _by(found, *COMPARED).items():
        for arm in ARMS[1:]:
            if differences := _differences(group, arm):
                gains[*key, arm] = comparison.gain(differences)
    adjusted = comparison.holm({"/".join(key): g.p for key, g in gains.items()})
    for key, group in sorted(_by(found, *COMPARED, "arm").items()):
        runs = {(row.draw, row.seed) for row in group}
        steps = sorted({row.steps for row in group})
        cells = [*key, str(len(runs)), f"{steps[0]} to {steps[-1]}", f"{100 * np.mean([r.dice for r in group]):.1f}"]
        if (g := gains.get(key)) is not None:
            between = f"{100 * g.low:+.1f} to {100 * g.high:+.1f}"
            cells += [f"{100 * g.mean:+.1f}", between, f"{adjusted['/'.join(key)]:.3f}"]
        lines.append("| " + " | ".join([*cells, *[""] * (11 - len(cells))]) + " |")
    return "\n".join(lines)


def _by(found: Sequence[Row], *names: str) -> Mapping[tuple[str, ...], list[Row]]:
    grouped: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in found:
        grouped[tuple(str(getattr(row, name)) for name in names)].append(row)
    return grouped


def _differences(found: Sequence[Row], arm: str) -> list[np.ndarray]:
    """Of each draw that has both arms: the cases' Dice under ``arm`` less that under real only, seeds averaged."""
    differences = []
    for group in _by(found, "draw").values():
        mean: dict[tuple[str, str], float] = {
            (a, case): float(np.mean([row.dice for row in some]))
            for (a, case), some in _by(group, "arm", "case").items()
        }
        cases = [case for a, case in mean if a == arm and ("real", case) in mean]
        if cases:
            differences.append(np.array([mean[arm, case] - mean["real", case] for case in cases]))
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds the datasets")
    parser.add_argument("--dataset", action="append", default=[], help="repeatable")
    parser.add_argument("--hours", type=float, default=1.0, help="no new training begins after that")
    parser.add_argument("--rows", type=Path, default=Path("out/utility.jsonl"))
    parser.add_argument("--segmenter", default="efficientnet-unet", choices=list(segmenters.SEGMENTERS))
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--synthetic", type=int, default=90)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--report", type=Path, help="write the table there, and train nothing")
    arguments = parser.parse_args()
    if arguments.report is not None:
        arguments.report.write_text(report(read(arguments.rows)) + "\n")
        return
    plan = Plan(arguments.segmenter, arguments.pairs, arguments.synthetic, arguments.draws, arguments.seeds)
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for name in arguments.dataset:
        data = load(arguments.data / name)
        same = (name, plan.segmenter, plan.pairs, plan.synthetic)
        there = [r for r in read(arguments.rows) if (r.dataset, r.segmenter, r.pairs, r.synthetic) == same]
        for new in rows(data, plan, {(r.draw, r.arm, r.seed) for r in there}):
            with arguments.rows.open("a") as file:
                file.write("\n" + json.dumps([asdict(row) for row in new]))
            mean, minutes = 100 * np.mean([row.dice for row in new]), (time.monotonic() - begun) / 60
            run = f"{name} draw {new[0].draw} {new[0].arm} seed {new[0].seed}"
            print(f"{run}: {new[0].steps} steps, Dice {mean:.1f} ({minutes:.1f} min)", flush=True)
            if minutes > 60 * arguments.hours:
                return
    print(report(read(arguments.rows)))


if __name__ == "__main__":
    main()
