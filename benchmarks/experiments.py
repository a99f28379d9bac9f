"""Writes ``docs/experiments.md`` and its plots from the rows that ``benchmarks.utility`` has left.

python -m benchmarks.experiments
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from meddiff.contracts.evaluation import REAL, Arm, ArmResult, Interval
from meddiff.science.evaluation import report
from meddiff.science.evaluation.comparison import Paired, gain, holm

from benchmarks.utility import EVALUATION, Training, read, real_share
from benchmarks.variants import BEFORE, GONE, VARIANTS

Key = tuple[str, bool, str, int]
"""Dataset, whether its development half, segmenter, real cases."""
ASKED = ("synthetic", "copy-paste", "real x1.5", "real x2")
AGAINST = (
    *((arm, REAL) for arm in ASKED),
    ("synthetic", "copy-paste"),
    ("synthetic", "real x1.5"),
    ("synthetic", BEFORE),
    ("real, 2 x steps", REAL),
    (BEFORE, REAL),
    (f"{BEFORE}, copy-paste", REAL),
    (f"{BEFORE}, 2 x steps", "real, 2 x steps"),
)
"""The comparisons that the page opens with."""
MATCHED = (
    "A gain is that over `real` on the runs (draw, seed) that both arms have, so it need not be the difference of "
    "their Dice; where one arm ran on a card and the other did not, that difference is in it; where both ran on both, "
    "a seed on a card is a run of its own. "
    "The cases are not those that the recipe was chosen by; yet former recipes were measured on them as "
    "well, and areas of their masks were among those that shapes were compared with, which makes small p a little too "
    "small. All arms but those named at the page's end were given one stop.\n\n"
    "Of `synthetic` and `copy-paste` at 30 real cases, the rows of PH2, DDTI, ISIC-2018 and two draws of ISIC-2017 "
    "were made with a first version of how shapes are told their size, which draws a few of them otherwise "
    "([decisions/0021](decisions/0021-shapes-have-sizes.md))."
)
RETEXTURED = "retexture 0.5"
DEFAULT = "synthetic"
"""The recipe as it stands, which an ablation changes in one point."""
CONTROLS = {
    "shifted": "must lose: the labels are wrong",
    f"{BEFORE}, shifted": "must lose, of a former recipe",
    "painted detail, shifted": "must lose, of a former recipe",
    "copies": "must add nothing: no new case is in them",
    "real, 0.5 x steps": "must gain nothing: the stop is not too late",
    "real, 2 x steps": "must gain nothing: the stop is not too early",
}
"""Arms whose answer is known, that show whether the ruler can be read. Both kinds of pairs beside as many real ones in
every batch (``joint``): as ``falling`` leaves none in the end, it would forgive much."""
AGAINST_DEFAULT = (
    f"Points of Dice over `{DEFAULT}`, of what begins with `{BEFORE}, ` over `{BEFORE}`, the recipe as it stood before "
    f"its shapes were given sizes, and of what ends with `, {RETEXTURED}` over `{RETEXTURED}`; on the development "
    "halves, of one draw: what other draws would say is not in the intervals. The letters are explained at the page's "
    "end. A variant takes the default's place where its interval lies above zero on the mean. Three changes were made "
    "without that, for what the pairs look like, and say so: decisions [0019](decisions/0019-rim-on-rim.md), "
    "[0020](decisions/0020-pairs-alone.md) and [0021](decisions/0021-shapes-have-sizes.md)."
)
KNOWN = {name: variant.what for name, variant in VARIANTS.items()} | GONE
CANDIDATES = (
    "a: a real case repainted in its own mask; b: how strongly a composite is painted over; c: what a new shape lies "
    "on; d: the edge; e: segmenters that choose or label; f: mixing with real cases; g: unlabelled images; h: when the "
    "fine-tune stops; i: decoys; j: the foundation. Cases held aside chose step 480 of 480 on DDTI (so that arm is the "
    "default, to the bit) and step 300 on ISIC-2018, where the loss of checkpoints from 240 on is 0.1575 to 0.1581; "
    "painting from noise, none of them copied."
)


def arm_of(training: Training) -> Arm:
    """The arm as the report knows it: its place on the learning curve, or its pairs."""
    name = training.arm
    if name.startswith(REAL):
        return Arm(name=name, share=real_share(name))
    return Arm(name=name, source="copy-paste" if "copy-paste" in name else "synthetic", pairs=training.pairs)


def results(trainings: Sequence[Training]) -> tuple[ArmResult, ...]:
    """Every arm of one dataset, half and size, real only first."""
    arms = {one.arm: arm_of(one) for one in trainings}
    ordered = sorted(arms.values(), key=lambda arm: (arm.name != REAL, arm.source or "", arm.share, arm.name))
    return report.arm_results([row for one in told_apart(trainings) for row in one.rows()], ordered)


def over_datasets(groups: Mapping[Key, Sequence[Training]], arm: str, other: str) -> tuple[int, Interval] | None:
    """The mean gain of an arm over another, on the datasets that have both; datasets are fixed, their draws and cases
    resampled."""
    found = [change for trainings in groups.values() if (change := differences(trainings, arm, other))]
    if not found:
        return None
    gains = [gain(change) for change in found]
    half = float(np.sqrt(np.sum([((one.high - one.low) / 2) ** 2 for one in gains])) / len(gains))
    mean = float(np.mean([one.mean for one in gains]))
    return len(found), Interval(mean=100 * mean, low=100 * (mean - half), high=100 * (mean + half))


def differences(trainings: Sequence[Training], arm: str, other: str) -> list[Paired]:
    """One arm's Dice less another's, of one dataset, half and size."""
    both = told_apart([one for one in trainings if one.arm in (arm, other)])
    one, another = ([row for each in both if each.arm == name for row in each.rows()] for name in (arm, other))
    return report.differences(one, another)


def told_apart(trainings: Sequence[Training]) -> list[Training]:
    """The trainings, where an arm ran with one seed on two devices numbered as runs of their own: a device has its own
    rounding, so a seed gives other pairs on it. There every arm is compared with what ran beside it."""
    count = Counter(one.key for one in trainings)
    twice = {one.key[:-2] for one in trainings if count[one.key] > 1}
    devices = list(dict.fromkeys(one.device for one in trainings))
    seeds = 1 + max((one.seed for one in trainings), default=0)
    return [
        one.model_copy(update={"seed": one.seed + seeds * devices.index(one.device)}) if one.key[:-2] in twice else one
        for one in trainings
    ]


def grouped(trainings: Sequence[Training]) -> dict[Key, list[Training]]:
    found: dict[Key, list[Training]] = defaultdict(list)
    for one in trainings:
        found[one.dataset, one.development, one.segmenter, one.train].append(one)
    return dict(sorted(found.items()))


def interval(found: Interval) -> str:
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def table(trainings: Sequence[Training]) -> list[str]:
    lines = [
        "| arm | runs of each draw | steps | Dice | between seeds | gain (95 % interval) | p, Holm | worth | s a run "
        "| on |"
    ]
    lines.append("|---" * 10 + "|")
    for one in results(trainings):
        seconds = np.median([t.seconds for t in trainings if t.arm == one.name])
        runs = Counter(t.draw for t in trainings if t.arm == one.name)
        cells = [
            one.name,
            " + ".join(str(runs[draw]) for draw in sorted(runs)),
            " ".join(map(str, one.steps)),
            f"{100 * one.dice:.1f}",
            "" if one.spread is None else f"{one.spread:.1f}",
            "" if one.gain is None else interval(one.gain),
            "" if one.p is None else f"{one.p:.3f}",
            worth(one),
            f"{seconds:.0f}",
            ", ".join(sorted({t.device for t in trainings if t.arm == one.name})),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def worth(result: ArmResult | None) -> str:
    """Annotation equivalents, where there is a gain to be worth any."""
    if result is None or result.equivalents is None:
        return ""
    return f"{'≥ ' if result.at_least else ''}{result.equivalents.mean:+.0f} cases"


def plot(groups: Mapping[Key, Sequence[Training]], path: Path) -> None:
    """Gains over real only, a panel for each dataset."""
    gains = {
        key: [(one.name, one.gain) for one in results(trainings) if one.gain is not None][::-1]
        for key, trainings in groups.items()
    }
    tallest = max(len(shown) for shown in gains.values())
    figure = Figure(figsize=(5 * len(groups), max(4, 1 + tallest / 4)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(groups)))
    for axes, (key, shown) in zip(panels, gains.items(), strict=True):
        for place, (_, found) in enumerate(shown):
            axes.plot([found.low, found.high], [place, place], color="0.3")
            axes.plot(found.mean, place, "o", color="0.1")
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.set(title=f"{key[0]}, {key[3]} real", xlabel="points of Dice over real only")
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    figure.savefig(path, dpi=80)


def page(trainings: Sequence[Training]) -> str:
    groups = grouped(trainings)
    lines = [
        "# What synthetic pairs were worth, measured",
        "",
        "Recipe `cpu` with the built-in foundation, downscaled excerpts of the datasets (see the README).",
        "",
    ]
    lines += [*answer(groups), ""]
    lines += ["## Controls: arms whose answer is known", "", *controls(groups), ""]
    tuned = {key: found for key, found in groups.items() if key[1] and key[2] == EVALUATION.segmenter}
    lines += [
        "## Ablation: each variant against the recipe as it stands",
        "",
        AGAINST_DEFAULT,
        "",
        *ablation(tuned),
        "",
    ]
    for development, title in ((False, "Kept for the end"), (True, "Development half: the recipe is tuned on it")):
        some = {key: found for key, found in groups.items() if key[1] == development}
        if not some:
            continue
        lines += [f"## {title}", ""]
        for (name, _, segmenter, train), found in some.items():
            tested = {one.draw: len(one.cases) for one in found}
            lines += [f"### {name}, {train} real cases", ""]
            cases = ", ".join(str(tested[draw]) for draw in sorted(tested))
            lines += [f"{segmenter}; draws {sorted(tested)}, with {cases} test cases.", ""]
            lines += [*table(found), ""]
    lines += ["## What the variants are", "", CANDIDATES, "", "| name | what |", "|---|---|"]
    arms = {re.sub(r", [\d.]+ x steps$", "", one.arm) for one in trainings}
    run = arms | {arm.removeprefix(f"{prefix}, ") for arm in arms for prefix in (BEFORE, *GONE)}
    lines += [f"| {name} | {what} |" for name, what in KNOWN.items() if name in run]
    due = [name for name in VARIANTS if name not in run]
    lines += ["", f"Not run yet: {'; '.join(due)}."] if due else []
    return "\n".join(lines) + "\n"


def overview(groups: Mapping[Key, Sequence[Training]]) -> list[str]:
    """The gain of the arms that the question is about, a dataset a line; p of ``synthetic`` is Holm's over datasets."""
    found = {key[0]: {one.name: one for one in results(trainings)} for key, trainings in groups.items()}
    raw = {
        key[0]: gain(change).p
        for key, trainings in groups.items()
        if (change := differences(trainings, "synthetic", REAL))
    }
    adjusted = holm(raw)
    lines = ["| dataset | real | " + " | ".join(ASKED) + " | p of synthetic, Holm over datasets | worth |"]
    lines.append("|---" * (len(ASKED) + 4) + "|")
    for name, arms in found.items():
        cells = [
            name,
            f"{100 * arms[REAL].dice:.1f}" if REAL in arms else "",
            *(_gain_of(arms.get(arm)) for arm in ASKED),
            f"{adjusted[name]:.3f}" if name in adjusted else "",
            worth(arms.get("synthetic")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _base(name: str) -> str | None:
    """What a variant is held against that changes another one than the default."""
    return RETEXTURED if name in VARIANTS and name.endswith(f", {RETEXTURED}") else None


def ablation(groups: Mapping[Key, Sequence[Training]]) -> list[str]:
    """Each variant against the default recipe, on every dataset that has both and on their mean."""
    compared = [(name, DEFAULT, what) for name, what in KNOWN.items() if name not in (DEFAULT, *CONTROLS, *GONE)]
    compared += [(f"{BEFORE}, {name}", BEFORE, what) for name, _, what in compared]
    compared = [(name, _base(name) or other, what) for name, other, what in compared]
    known = list(dict.fromkeys(key[0] for key in groups))
    datasets = [one for one in known if any(over_datasets(_of(groups, one), *pair[:2]) for pair in compared)]
    lines = [f"| variant | {' | '.join(datasets)} | mean | runs | changed |", "|---" * (len(datasets) + 4) + "|"]
    for name, other, what in compared:
        each = [over_datasets(_of(groups, dataset), name, other) for dataset in datasets]
        mean = over_datasets(groups, name, other)
        if mean is None:
            continue
        runs = sum(one.arm == name for trainings in groups.values() for one in trainings)
        cells = [*("" if one is None else interval(one[1]) for one in each)]
        cells.append(interval(mean[1]) if mean[0] > 1 else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {runs} | {what} |")
    return lines


def controls(groups: Mapping[Key, Sequence[Training]]) -> list[str]:
    """The arms whose answer is known, wherever they ran, and the verdict on each."""
    lines = ["| arm | what it must show | dataset | runs | gain over `real` | verdict |", "|---" * 6 + "|"]
    found = {key: {one.name: one for one in results(trainings)} for key, trainings in groups.items()}
    for name, must in CONTROLS.items():
        for (dataset, development, _, train), arms in found.items():
            one = arms.get(name)
            if one is None or one.gain is None:
                continue
            where = f"{dataset}, {train} real{', development half' if development else ''}"
            lines.append(f"| {name} | {must} | {where} | {one.runs} | {interval(one.gain)} | {one.verdict} |")
    return lines


def _of(groups: Mapping[Key, Sequence[Training]], dataset: str) -> dict[Key, Sequence[Training]]:
    return {key: trainings for key, trainings in groups.items() if key[0] == dataset}


def _gain_of(result: ArmResult | None) -> str:
    return "" if result is None or result.gain is None else interval(result.gain)


def answer(groups: Mapping[Key, Sequence[Training]]) -> list[str]:
    """What the page opens with: for each number of real cases, on the cases kept for the end."""
    lines = []
    for train in sorted({key[3] for key in groups}, reverse=True):
        some = {key: found for key, found in groups.items() if key[1:] == (False, EVALUATION.segmenter, train)}
        found = {names: over_datasets(some, *names) for names in AGAINST}
        told = [
            f"* {arm} over {other}: {interval(one[1])} points of Dice, mean of {one[0]} dataset(s)."
            for (arm, other), one in found.items()
            if one is not None
        ]
        if told:
            lines += [f"## With {train} real cases", "", conclusion(found), "", *told, "", *overview(some), ""]
    return [*lines, MATCHED] if lines else ["No run has ended yet."]


def conclusion(found: Mapping[tuple[str, str], tuple[int, Interval] | None]) -> str:
    """The answer in a sentence or two."""
    gained = found["synthetic", REAL]
    if gained is None:
        return "Synthetic pairs have not been measured here yet."
    low, high = gained[1].low, gained[1].high
    first = "help" if low > 0 else "harm" if high < 0 else "are not shown to help: the interval holds zero"
    told = [f"**Synthetic pairs {first}.**"]
    for other, words in {"copy-paste": "plain copy-paste", "real x1.5": "half as many real cases again"}.items():
        if (one := found["synthetic", other]) is not None:
            rank = "better" if one[1].low > 0 else "worse" if one[1].high < 0 else "not told apart"
            told.append(f"Against {words}: {rank}.")
    return " ".join(told)


def devices(trainings: Sequence[Training]) -> str:
    """How many rows each device computed."""
    count = Counter(one.device for one in trainings)
    return ", ".join(f"{device} ({rows} rows)" for device, rows in count.most_common())


def stops(trainings: Sequence[Training]) -> str:
    """Where arms stopped that chose it, and that the others were told to stop there."""
    chosen = [one for one in trainings if one.curve and "x steps" not in one.arm]
    capped = sum(one.steps == EVALUATION.steps for one in chosen)
    of = ", ".join(sorted({f"{one.dataset}{' (development half)' if one.development else ''}" for one in chosen}))
    return (
        f"{len(chosen)} rows hold a stop that inner folds chose, of {of}: {capped} of them the longest that can be, "
        f"{EVALUATION.steps} steps. The others were given that one (`--stop`); whether twice as many would be better "
        "is among the controls."
    )


def write(trainings: Sequence[Training], out: Path) -> None:
    """``experiments.md`` in the folder ``out``, and its plots."""
    (out / "experiments").mkdir(parents=True, exist_ok=True)
    text = page(trainings)
    for development, name in ((True, "development"), (False, "final")):
        some = {key: found for key, found in grouped(trainings).items() if key[1] == development}
        if some:
            plot(some, out / "experiments" / f"{name}.png")
            text += f"\n![Gains, {name}](experiments/{name}.png)\n"
    command = "python -m benchmarks.utility --data FOLDER --dataset NAME … (--development) --hours H"
    text += (
        f"\nRows: `docs/experiments/rows.jsonl`, a training a line. Made, and this page after them, by `{command}`\n"
    )
    text += (
        "(`--help` tells of `--arm`, `--train`, `--stop` and `--factor`); this page alone by `python -m "
        "benchmarks.experiments`. Wall time of a run is one thread's with other work beside it; on a card,\n"
    )
    text += f"that of one of eight to eighteen runs at once. Run on: {devices(trainings)}.\n{stops(trainings)}\n"
    (out / "experiments.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, default=Path("docs/experiments/rows.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    write(read(arguments.rows), arguments.out)


if __name__ == "__main__":
    main()
