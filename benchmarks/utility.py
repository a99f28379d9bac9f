"""What synthetic pairs are worth: Dice on unseen cases with and without them, unattended and resumable.

    python -m benchmarks.utility --data FOLDER --dataset PH2 --dataset BUSI --hours 2

For each draw of the training cases a generator is fitted to them alone. Segmenters are trained on the real cases, on
more or fewer of them (the learning curve; twice as many are the oracle), and on the real cases beside each variant of
synthetic pairs (``benchmarks/variants.py``). Where an arm stops is chosen inside the training cases, by one rule
(an ablation, whose arms differ little, may spare that and give them all one ``--stop``). A training is a line of
``--rows``, appended when it ends; what is there is not made again, so a run that was cut off goes on. ``--development``
uses the cases kept for tuning, and writes down which they are, without it the others are used (``is_development``).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from meddiff.contracts.base import Contract
from meddiff.contracts.evaluation import REAL, Row
from meddiff.contracts.recipes import CPU, Recipe, override
from meddiff.science import encoders
from meddiff.science.evaluation import figures, splits, training, trials
from meddiff.science.evaluation.trials import Material
from meddiff.seeds import derive
from meddiff_services.pictures import Mask, Pixels
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import checkpoints
from benchmarks.in_process import DEVICE, Generator, Made, fit
from benchmarks.sources import Case, cases_by_digest
from benchmarks.variants import Variant, variant_of

EVALUATION = CPU.evaluation
LEAST_TESTED = 15
APART_STEPS = 240
"""Of the segmenters that judge pairs and label images for an arm."""
TUNED_ON = frozenset({"DDTI", "ISIC-2017", "ISIC-2018"})
"""Datasets that are large enough to give half of their cases to tuning."""
CASE = 12  # Hex digits of a digest that name a case in the rows.

RECIPE = override(CPU, {"work": {"training_threads": 1, "inference_threads": 1}})
FITTED_BY: dict[str, Any] = {"foundation": True, "finetuning": True, "mask_generation": True, "inpainting": {"context"}}
"""The fields of a recipe that a fit depends on."""


def is_development(dataset: str, digest: str) -> bool:
    """Whether the case with this digest is there for tuning; the others are kept for the final figure."""
    return dataset in TUNED_ON and derive("development", digest) % 2 == 0


# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Cases:
    """Cases of a dataset by digest, the group each belongs to, and the lesion-free images."""

    name: str
    cases: dict[str, Case]
    group_of: list[int]
    healthy: list[Pixels]

    def pairs(self, places: Sequence[int]) -> list[trials.Pair]:
        found = list(self.cases.values())
        return [(found[place].image, found[place].mask) for place in places]


@lru_cache(maxsize=2)
def load(folder: Path, development: bool) -> Cases:
    """Groups are formed over the whole dataset; a group belongs to the half of its first case."""
    found = cases_by_digest(folder)
    lesions = {digest: case for digest, case in found.items() if case.mask.any()}
    encoder = encoders.load_encoder("efficientnet-lite0", "builtin", torch.device("cpu"))
    vectors = splits.whole_image_embeddings(encoder, [case.image for case in lesions.values()])
    patients = [case.patient for case in lesions.values()]
    group_of = splits.groups(patients, vectors, EVALUATION.near_duplicate)
    first: dict[int, str] = {}
    for digest, group in zip(lesions, group_of, strict=True):
        first.setdefault(group, digest)
    kept = [
        (digest, group)
        for digest, group in zip(lesions, group_of, strict=True)
        if is_development(folder.name, first[group]) == development
    ]
    healthy = [case.image for case in found.values() if case.role == "background"]
    return Cases(folder.name, {digest: lesions[digest] for digest, _ in kept}, [group for _, group in kept], healthy)


def drawn(cases: Cases, train: int, number: int) -> splits.Draw:
    groups = len(set(cases.group_of))
    extra = max(0, min(train, groups - train - LEAST_TESTED))
    seed = derive(cases.name, "draw", number)
    return splits.draw(cases.group_of, train, extra, EVALUATION.tested, seed)


# -------------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Trial:
    """All trainings of an arm on one draw: ``arm`` is ``real``, ``real x…`` or the name of a variant."""

    folder: Path
    development: bool
    segmenter: str
    train: int
    draw: int
    arm: str
    seeds: tuple[int, ...]
    cache: Path
    rows: Path
    factor: float = 1.0  # Of the stop: half and twice of it show whether it is fair.
    stop: int | None = None  # Given, not chosen.

    @property
    def name(self) -> str:
        return self.arm if self.factor == 1 else f"{self.arm}, {self.factor:g} x steps"

    @property
    def begins(self) -> tuple[str | int | bool, ...]:
        """The key of its trainings without the seed."""
        return (self.folder.name, self.development, self.segmenter, self.train, self.draw, self.name)


def real_share(arm: str) -> float:
    """How many real cases an arm takes, as a share of the draw's: 1.5 of ``real x1.5, 2 x steps``, 1 of a variant."""
    return float(arm.partition(",")[0].removeprefix(REAL).strip(" x") or 1) if arm.startswith(REAL) else 1.0


class Training(Contract):
    """A line of the rows: one segmenter and the figures of its test cases, whose digests are shortened."""

    dataset: str
    development: bool
    segmenter: str
    train: int
    draw: int
    arm: str
    seed: int
    curve: dict[int, float]  # Dice over inner folds by steps, of which the stop was chosen; empty where it was given.
    steps: int
    real: int
    pairs: int
    seconds: float
    device: str = "cpu"
    cases: tuple[str, ...]
    groups: tuple[int, ...] = ()
    area: tuple[float, ...]
    dice: tuple[float, ...]
    nsd: tuple[float, ...]
    hd95: tuple[float, ...]

    @property
    def key(self) -> tuple[str | int | bool, ...]:
        return (self.dataset, self.development, self.segmenter, self.train, self.draw, self.arm, self.seed)

    def rows(self) -> Iterator[Row]:
        fixed = {"split": self.draw, "arm": self.arm, "seed": self.seed, "steps": self.steps, "real": self.real}
        names = ("case", "group", "area", "dice", "nsd", "hd95")
        groups = self.groups or (None,) * len(self.cases)
        for values in zip(self.cases, groups, self.area, self.dice, self.nsd, self.hd95, strict=True):
            yield Row(**fixed, **dict(zip(names, values, strict=True)))


def run(trial: Trial) -> None:
    """Every training of a trial, on one thread, each written to the rows and told when it ends."""
    torch.set_num_threads(1)
    cases = load(trial.folder, trial.development)
    draw = drawn(cases, trial.train, trial.draw)
    settings = EVALUATION.model_copy(update={"segmenter": trial.segmenter})
    material = _material(trial, cases, draw)
    curve = {} if trial.stop is not None else _stop_curve(trial, material)
    stop = trials.best_stop(curve) if trial.stop is None else trial.stop
    steps = max(1, round(stop * trial.factor))
    seen = material if material.real else Material(material.synthetic)
    digests = list(cases.cases)
    for seed in trial.seeds:
        begun = time.monotonic()
        seeded = derive("segmenter", trial.draw, seed)
        network = trials.trained(seen, settings, steps, seeded, lambda *_: None, DEVICE)
        figures = [trials.judge(network, settings, pair) for pair in cases.pairs(draw.test)]
        one = Training(
            dataset=cases.name,
            development=trial.development,
            segmenter=trial.segmenter,
            train=trial.train,
            draw=trial.draw,
            arm=trial.name,
            seed=seed,
            curve=curve,
            steps=steps,
            real=len(material.real),
            pairs=len(material.synthetic),
            seconds=round(time.monotonic() - begun, 1),
            device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
            cases=tuple(digests[place][:CASE] for place in draw.test),
            groups=tuple(cases.group_of[place] for place in draw.test),
            area=tuple(round(float(mask.mean()), 4) for _, mask in cases.pairs(draw.test)),
            dice=tuple(round(one.dice, 4) for one in figures),
            nsd=tuple(round(one.nsd, 4) for one in figures),
            hd95=tuple(round(one.hd95, 4) for one in figures),
        )
        with FileLock(trial.cache / "rows.lock"):
            append(trial.rows, one)
        where = f"{one.dataset} draw {one.draw} {one.arm} seed {one.seed}"
        print(f"{where}: {steps} steps, Dice {100 * np.mean(one.dice):.1f}, {one.seconds:.0f} s", flush=True)


def _material(trial: Trial, cases: Cases, draw: splits.Draw) -> Material:
    if trial.arm.startswith(REAL):
        some = [*draw.train, *draw.extra][: round(real_share(trial.arm) * len(draw.train))]
        return Material(cases.pairs(some))
    variant = variant_of(trial.arm)
    real = cases.pairs(draw.train)
    if variant.copies:
        copies = [real[place % len(real)] for place in range(variant.pairs)]
        return Material(real, copies, [frozenset({place % len(real)}) for place in range(variant.pairs)])
    if variant.healthy:
        empty = [(image, np.zeros(image.shape[:2], bool)) for image in cases.healthy]
        return Material(real, empty, [frozenset()] * len(empty), variant.mixing)
    pseudo = _pseudo_labelled(trial) if variant.unlabelled else []
    if variant.unlabelled and not pseudo:
        raise ValueError(f"{cases.name} has no case left to take for an unlabelled one")
    if variant.unlabelled == "pairs":
        synthetic = [(case.image, case.mask) for case in pseudo]
        return Material(real, synthetic, [frozenset()] * len(synthetic), variant.mixing)
    made = pairs_of(trial, cases, draw, variant, pseudo)
    if variant.relabel:
        made = [_relabelled(trial, one) for one in made]
    synthetic = [(one.start, one.shape) if variant.start else (one.image, one.label) for one in made]
    synthetic = [(image, shifted(mask, variant.shift)) for image, mask in synthetic]
    trained_on = range(0 if variant.unlabelled == "retexture" else len(real))
    origins = [
        frozenset(place for place in (one.donor, one.background) if place is not None and place in trained_on)
        for one in made
    ]
    if variant.alone:
        return Material([], synthetic, origins)
    material = Material(real, synthetic, origins, variant.mixing)
    return material if variant.agreement is None else _agreeing(trial, material, variant.agreement)


def pairs_of(
    trial: Trial, cases: Cases, draw: splits.Draw, variant: Variant, unlabelled: Sequence[Case] = ()
) -> list[Made]:
    """The variant's pairs. Fitted generators and pairs are kept on disk, for several variants share them."""
    train = [list(cases.cases.values())[place] for place in draw.train]
    adapt_to = unlabelled if variant.unlabelled == "foundation" else ()
    sources = [
        *([] if variant.unlabelled == "retexture" else train),
        *([] if variant.unlabelled == "foundation" else unlabelled),
    ]
    recipe = override(RECIPE, variant.fitting)
    painting = override(recipe, variant.painting)
    retexture = variant.retexture or variant.unlabelled == "retexture"
    seed = derive(cases.name, "generator", trial.draw)
    split = f"{cases.name}-{trial.development:d}-{trial.train}-{trial.draw}"
    made_by: list[str | int] = [
        painting.model_dump_json(exclude={"evaluation"}),
        retexture,
        variant.decoys,
        f"{variant.unlabelled} by {trial.segmenter}" if variant.unlabelled else "",
        variant.held_aside,
        variant.pairs,
    ]
    fitted_by = [recipe.model_dump_json(include=FITTED_BY)]
    fitted_by += ["adapted", trial.segmenter] if adapt_to else []
    fitted_by += ["held aside"] if variant.held_aside else []
    kept = trial.cache / f"{split}-{derive(*made_by):x}.pairs"
    with FileLock(kept.with_suffix(".lock")):  # Another process may need the same ones.
        if not kept.exists():
            path = trial.cache / f"{split}-{derive(*fitted_by):x}.safetensors"
            fitted = fitted_model(train, cases.healthy, recipe, seed, path, adapt_to, variant.held_aside)
            options = {"retexture": retexture, "decoys": variant.decoys}
            generator = Generator(sources, cases.healthy, painting, fitted, **options)
            made = generator.generate(variant.pairs, seed)
            if not made:
                raise ValueError("no pair was accepted")
            keep(kept, made)
    return read_made(kept)


def keep(path: Path, made: Sequence[Made]) -> None:
    """Writes pairs where ``read_made`` finds them, whole or not at all."""
    save_whole({f"{n}.{name}": _tensor(value) for n, one in enumerate(made) for name, value in vars(one).items()}, path)


def _tensor(value: Pixels | Mask | int | None) -> torch.Tensor:
    return (
        torch.from_numpy(value.copy())
        if isinstance(value, np.ndarray)
        else torch.tensor(-1 if value is None else value)
    )


def save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def read_made(path: Path) -> list[Made]:
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for key, tensor in load_file(path).items():
        number, name = key.split(".")
        found[int(number)][name] = tensor.numpy() if tensor.ndim else None if tensor < 0 else int(tensor)
    return [Made(**found[number]) for number in sorted(found)]


def fitted_model(
    train: Sequence[Case],
    healthy: Sequence[Pixels],
    recipe: Recipe,
    seed: int,
    path: Path,
    adapt_to: Sequence[Case] = (),
    held_aside: bool = False,
) -> dict[str, torch.Tensor]:
    """``fit``, or what it left at ``path`` before."""
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            stop = _held_aside_stop(train, healthy, recipe, seed, path) if held_aside else None
            save_whole(fit(train, healthy, recipe, seed, adapt_to, stop), path)
    return load_file(path)


def _held_aside_stop(train: Sequence[Case], healthy: Sequence[Pixels], recipe: Recipe, seed: int, path: Path) -> int:
    """The checkpoint that is chosen; all of them are printed, and kept beside the model as JSON."""
    found = checkpoints.measured(train, healthy, recipe, seed)
    stop = checkpoints.best(found)
    text = json.dumps({"chosen": stop, "checkpoints": [asdict(one) for one in found]})
    path.with_suffix(".checkpoints.json").write_text(text)
    print(path.name, text, flush=True)
    return stop


def shifted(mask: Mask, share: float) -> Mask:
    """``mask`` moved to the right by a share of the width."""
    by = round(share * mask.shape[1])
    moved = np.zeros_like(mask)
    moved[:, by:] = mask[:, : mask.shape[1] - by]
    return moved


@lru_cache(maxsize=1)
def _out_of_fold(trial: Trial) -> list[tuple[frozenset[int], nn.Module]]:
    """Segmenters of the real cases alone, and beside each the places of the training cases that it did not see."""
    settings = EVALUATION.model_copy(update={"segmenter": trial.segmenter})
    cases = load(trial.folder, trial.development)
    real = cases.pairs(drawn(cases, trial.train, trial.draw).train)
    found = []
    for number, held in enumerate(splits.folds(range(len(real)), settings.inner_folds, derive("apart", trial.draw))):
        inside = Material([pair for place, pair in enumerate(real) if place not in held])
        network = trials.trained(inside, settings, APART_STEPS, derive("apart", number), lambda *_: None, DEVICE)
        found.append((frozenset(held), network))
    return found


def _apart(trial: Trial) -> list[tuple[frozenset[int], nn.Module]]:
    """``_out_of_fold``, which all arms of a draw share."""
    return _out_of_fold(replace(trial, arm=REAL, seeds=(), factor=1.0))


def _blind_to(trial: Trial, case: int) -> nn.Module:
    """A segmenter that did not see this training case."""
    apart = _apart(trial)
    return next((network for held, network in apart if case in held), apart[case % len(apart)][1])


def _pseudo_labelled(trial: Trial) -> list[Case]:
    """The cases that neither train nor test nor share a group with one that does, their masks drawn by the majority of
    the segmenters; where those see no lesion, the case is left out."""
    cases = load(trial.folder, trial.development)
    draw = drawn(cases, trial.train, trial.draw)
    taken = {cases.group_of[place] for place in (*draw.train, *draw.test)}
    found = []
    for case, group in zip(cases.cases.values(), cases.group_of, strict=True):
        if group not in taken:
            seen = [training.predict(network, case.image, EVALUATION.size) for _, network in _apart(trial)]
            mask = np.mean(seen, axis=0) > 0.5
            if mask.any():
                found.append(replace(case, mask=mask))
    return found


def _relabelled(trial: Trial, one: Made) -> Made:
    """The pair with the label that a segmenter blind to its donor sees inside the guide; where the two hardly overlap,
    as it was."""
    seen = training.predict(_blind_to(trial, one.donor), one.image, EVALUATION.size) & one.guide
    return replace(one, label=seen) if figures.figures(seen, one.label).dice > 0.5 else one


def _agreeing(trial: Trial, material: Material, bounds: tuple[float, float]) -> Material:
    """The pairs with which a segmenter of the real cases alone, blind to one of the cases that they were made from,
    agrees within ``bounds`` of Dice."""
    kept = []
    for place, (pair, origin) in enumerate(zip(material.synthetic, material.made_from, strict=True)):
        network = _blind_to(trial, min(origin, default=place))
        if bounds[0] <= trials.judge(network, EVALUATION, pair).dice <= bounds[1]:
            kept.append(place)
    kept = kept or [0]
    return replace(
        material,
        synthetic=[material.synthetic[place] for place in kept],
        made_from=[material.made_from[place] for place in kept],
    )


def _stop_curve(trial: Trial, material: Material) -> dict[int, float]:
    """What the arm's stop is chosen by. It is the arm's and the draw's, so what a row or the disk holds is taken."""
    for one in read(trial.rows):
        same = re.fullmatch(rf"{re.escape(trial.arm)}(, [\d.]+ x steps)?", one.arm)
        if one.curve and same and one.key[:5] == trial.begins[:5]:
            return one.curve
    path = trial.cache / f"{'-'.join(map(str, (*trial.begins[:5], trial.arm))).replace(' ', '_')}.stop.json"
    if not path.exists():
        settings = EVALUATION.model_copy(update={"segmenter": trial.segmenter})
        seed = derive(trial.folder.name, "inner", trial.draw)
        curve = trials.stop_curve(material, settings, seed, lambda *_: None, DEVICE)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(curve))
        partial.replace(path)
    return {int(steps): round(dice, 4) for steps, dice in json.loads(path.read_text()).items()}


# -------------------------------------------------------------------------------------------------------------- rows


def append(path: Path, one: Training) -> None:
    """A line more; one that was cut off stays a line of its own."""
    with path.open("a+b") as file:
        if file.tell() and path.read_bytes()[-1:] != b"\n":
            file.write(b"\n")
        file.write(one.model_dump_json().encode() + b"\n")


def read(path: Path) -> list[Training]:
    """The trainings recorded so far; a line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(Training.model_validate_json(line))
        except ValueError:
            continue
    return found


def trials_due(arguments: argparse.Namespace, done: set[tuple[str | int | bool, ...]]) -> Iterator[Trial]:
    """Draw by draw, and in each the arms as they were named, those trainings that are not there yet."""
    for number in range(arguments.draws):
        for name in arguments.dataset:
            for arm in arguments.arm:
                for factor in arguments.factor:
                    trial = Trial(
                        arguments.data / name, arguments.development, arguments.segmenter, arguments.train, number, arm,
                        (), arguments.cache, arguments.rows, factor, arguments.stop,
                    )  # fmt: skip
                    left = tuple(seed for seed in range(arguments.seeds) if (*trial.begins, seed) not in done)
                    if left and _has_enough(trial):
                        yield replace(trial, seeds=left)


def _has_enough(trial: Trial) -> bool:
    """Whether the draw has as many real cases as the arm takes."""
    draw = drawn(load(trial.folder, trial.development), trial.train, trial.draw)
    return round(real_share(trial.arm) * len(draw.train)) <= len(draw.train) + len(draw.extra)


def record(arguments: argparse.Namespace) -> None:
    """Runs what is due, some trials at a time, until all is done or the hours are over. One that fails is still due;
    the others go on, and the end says so (``SystemExit``)."""
    begun, failed = time.monotonic(), 0
    if arguments.development:
        write_development(arguments)
    due = trials_due(arguments, {one.key for one in read(arguments.rows)})
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:  # A GPU bears no fork.
        running: set[Future[None]] = set()
        while True:
            while len(running) < arguments.processes and time.monotonic() - begun < 3600 * arguments.hours:
                trial = next(due, None)
                if trial is None:
                    break
                running.add(pool.submit(run, trial))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                if (error := future.exception()) is not None:
                    failed += 1
                    print(f"a trial failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f"{failed} trial(s) failed; run it again")


def write_development(arguments: argparse.Namespace) -> None:
    """Digests of the cases that tuning may see, a file a dataset."""
    folder = arguments.rows.parent / "development"
    folder.mkdir(exist_ok=True)
    for name in arguments.dataset:
        digests = sorted(load(arguments.data / name, True).cases)
        (folder / f"{name}.txt").write_text("".join(f"{digest}\n" for digest in digests))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds the datasets")
    parser.add_argument("--dataset", action="append", required=True, help="repeatable")
    parser.add_argument("--development", action="store_true", help="the cases kept for tuning")
    parser.add_argument("--arm", action="append", default=[], help="repeatable: real, real x2, or a variant's name")
    parser.add_argument("--factor", action="append", type=float, default=[], help="of the stop; repeatable")
    parser.add_argument("--stop", type=int, help="steps of every arm, in place of a choice by inner folds")
    parser.add_argument("--hours", type=float, default=1.0, help="no new trial begins after that")
    parser.add_argument("--rows", type=Path, default=Path("docs/experiments/rows.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs"), help="the folder of the page, experiments.md")
    parser.add_argument("--cache", type=Path, default=Path("out/utility"))
    parser.add_argument("--segmenter", default=EVALUATION.segmenter)
    parser.add_argument("--train", type=int, default=30)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args(argv)
    arguments.arm = arguments.arm or ["real", "synthetic", "copy-paste", "real x2", "real x1.5", "real x0.5"]
    arguments.factor = arguments.factor or [1.0]
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    from benchmarks import experiments  # Which reads the rows as this module writes them.

    try:
        record(arguments)
    finally:
        if arguments.rows.exists():
            experiments.write(read(arguments.rows), arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
