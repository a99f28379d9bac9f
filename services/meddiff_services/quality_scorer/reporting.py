"""An evaluation's report: what its rows say, as JSON and as one page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import jinja2
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from meddiff import __version__
from meddiff.contracts.evaluation import REAL, Arm, ArmResult, CurvePoint, Report, Row, Worst
from meddiff.contracts.tasks import Marker
from meddiff.planning import evaluation
from meddiff.science.evaluation import figures, segmenters, training
from meddiff.science.evaluation import report as reports
from PIL import Image
from safetensors.torch import load

from meddiff_services.loading import device, merged_fingerprint
from meddiff_services.pictures import Mask, Pixels, decode_mask, decode_png, overlay, tile
from meddiff_services.trials import load_cases, made, splits
from meddiff_services.worker import Outcome, Work

SHOWN = 6
"""Worst cases and doubtful pairs in the report."""
MARKERS = "Dsv"
"""Of arms on the learning curve: another after every ten colours."""
TILE_PX = 160


def report(work: Work) -> Outcome:
    """Reads every row, and writes ``report.json`` and ``report.html``."""
    torch.set_num_threads(work.spec.recipe.work.inference_threads)
    cut = splits(work)
    arms = evaluation.arms(work.spec.request, cut)
    runs = evaluation.runs(work.spec, cut)
    rows = [
        Row.model_validate_json(line)
        for number in range(len(runs))
        for line in work.store.get(work.keys.rows(number)).splitlines()
    ]
    results = reports.arm_results(rows, arms)
    headline, arm = reports.headline(results, arms)
    painted = arm.source == "synthetic"
    worst, cases = _worst_cases(work, rows, headline.name) if painted else ([], [])
    doubtful, pairs = _doubtful_pairs(work, len(cut), max(arm.pairs for arm in arms)) if painted else ([], [])
    found = Report(
        job_id=work.spec.id,
        dataset_id=work.marker("import", 0).output["dataset_id"],
        created_at=datetime.now(UTC),
        software_version=__version__,
        verdict=headline.verdict or "adds nothing",
        summary=reports.in_words(headline, arm, results[0].real),
        headline=headline.name,
        arms=results,
        curve=reports.learning_curve(rows, arms),
        by_size=reports.gains_by_size(rows, headline.name),
        worst_cases=tuple(worst),
        doubtful_pairs=tuple(doubtful),
        splits=cut,
        notes=(*work.marker("split", 0).output["notes"], *_missing_pairs(work, arms, len(cut))),
        recipe=work.spec.recipe,
        request=work.spec.request.model_dump(mode="json"),
        fingerprint=merged_fingerprint([*work.markers("stop"), *work.markers("segmenter")]),
    )
    page = page_of(found, [*zip(worst, cases, strict=True)], [*zip(doubtful, pairs, strict=True)], work.markers("stop"))
    work.store.put(work.keys.report("html"), page.encode(), "text/html")
    work.store.put_json(work.keys.report("json"), found)
    gain = headline.gain.model_dump() if headline.gain is not None else None
    return Outcome(1, {"verdict": found.verdict, "summary": found.summary, "gain": gain, "runs": len(runs)})


def _missing_pairs(work: Work, arms: Sequence[Arm], count: int) -> list[str]:
    """Splits with fewer pairs than the largest arm was to have."""
    wanted = max(arm.pairs for arm in arms)
    if wanted == 0:
        return []
    found = [(split, len(made(work, split))) for split in range(count)]
    return [f"split {split} had {pairs} pairs, {wanted} were asked for" for split, pairs in found if pairs < wanted]


# ------------------------------------------------------------------------------------------------- pictures to look at


def _network(work: Work, split: int, arm: str) -> torch.nn.Module:
    network = segmenters.build(work.spec.recipe.evaluation.segmenter, 0)
    network.load_state_dict(load(work.store.get(work.keys.segmenter(split, arm))))
    return network.to(device(work.settings)).eval()


def _worst_cases(work: Work, rows: Sequence[Row], arm: str) -> tuple[list[Worst], list[Pixels]]:
    """Test cases on which an arm does worst, each with the true outline and, beside it, what its segmenter sees."""
    by_case: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in rows:
        if row.arm == arm:
            by_case[row.split, row.case].append(row.dice)
    chosen = sorted(by_case, key=lambda key: float(np.mean(by_case[key])))[:SHOWN]
    found, shown = [], []
    for split, case in chosen:
        (loaded,) = load_cases(work, [case])
        seen = training.predict(_network(work, split, arm), loaded.image, work.spec.recipe.evaluation.size)
        found.append(Worst(name=case, dice=float(np.mean(by_case[split, case])), split=split))
        shown.append(_beside(loaded.image, loaded.mask, seen))
    return found, shown


def _doubtful_pairs(work: Work, count: int, used: int) -> tuple[list[Worst], list[Pixels]]:
    """Of the ``used`` synthetic pairs of each split those on which segmenters of the real cases alone disagree most
    with the label: what does harm is among them, and so is what no real case has taught."""
    judged: list[tuple[float, int, int, Pixels, Mask, Mask]] = []
    for split in range(count):
        network = _network(work, split, REAL)
        for pair, _ in made(work, split)[:used]:
            image = decode_png(work.store.get(pair.image.key))
            label = decode_mask(work.store.get(pair.label.key))
            seen = training.predict(network, image, work.spec.recipe.evaluation.size)
            judged.append((figures.figures(seen, label).dice, split, pair.index, image, label, seen))
            judged = sorted(judged, key=lambda one: one[:3])[:SHOWN]
            work.raise_if_stopped()
    found = [Worst(name=f"pair {index}", dice=dice, split=split) for dice, split, index, *_ in judged]
    return found, [_beside(image, label, seen) for _, _, _, image, label, seen in judged]


def _beside(image: Pixels, true: Mask, seen: Mask) -> Pixels:
    """(TILE_PX, 2 TILE_PX, 3): the outline of the mask, and that of what a segmenter sees."""
    return np.concatenate([np.asarray(tile(overlay(image, mask), TILE_PX)) for mask in (true, seen)], axis=1)


# ---------------------------------------------------------------------------------------------------------- the page


def page_of(
    found: Report,
    worst: Sequence[tuple[Worst, Pixels]],
    doubtful: Sequence[tuple[Worst, Pixels]],
    stops: Sequence[Marker] = (),
) -> str:
    """The report as one self-contained HTML page."""
    return _template().render(
        report=found,
        question=_question(found),
        learning_curve=_svg(_curve_figure(found.curve, found.arms)),
        gains=_svg(_gain_figure(found.arms)),
        worst=[(one, _data_uri(picture)) for one, picture in worst],
        doubtful=[(one, _data_uri(picture)) for one, picture in doubtful],
        stops=[stop.output for stop in stops],
    )


def _question(found: Report) -> str:
    """What the verdict answers: it is of the headline arm."""
    arm = next(arm for arm in found.arms if arm.name == found.headline)
    if arm.name.startswith("copy-paste"):
        return "Are copied and pasted lesions worth training on?"
    return "Are the synthetic pairs worth training on?" if arm.pairs else "Are more annotated cases worth having?"


@cache
def _template() -> jinja2.Template:
    text = (Path(__file__).parent / "report.html.jinja").read_text()
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)


def _curve_figure(curve: Sequence[CurvePoint], arms: Sequence[ArmResult]) -> Figure:
    """Dice against the number of real cases, and on it the arms with pairs: at their gain over the curve, which is what
    their worth is read by."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([p.real for p in curve], [100 * p.dice for p in curve], "o-", color="0.3", label="real cases alone")
    for place, (arm, gained) in enumerate((arm, arm.gain) for arm in arms if arm.pairs and arm.gain is not None):
        level = 100 * float(np.interp(arm.real, [p.real for p in curve], [p.dice for p in curve])) + gained.mean
        colour, marker = f"C{place % 10}", MARKERS[place // 10 % len(MARKERS)]
        axes.plot(arm.real, level, marker, color=colour, label=f"{arm.real:.0f} real + {arm.name}")
        axes.axhline(level, color=colour, linewidth=0.6, linestyle="--")
    axes.set(xlabel="real annotated cases", ylabel="Dice on unseen cases")
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def _gain_figure(arms: Sequence[ArmResult]) -> Figure:
    """Each arm's gain over real only, with its 95 % interval."""
    shown = [(arm.name, arm.gain) for arm in reversed(arms) if arm.gain is not None]
    figure = Figure(figsize=(6, 0.8 + 0.35 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, (_, gain) in enumerate(shown):
        axes.plot([gain.low, gain.high], [place, place], color="0.3")
        axes.plot(gain.mean, place, "o", color="0.1")
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="points of Dice over real only", yticks=range(len(shown)), yticklabels=[name for name, _ in shown])
    return figure


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return Markup(drawn[drawn.index("<svg") :])  # Without the XML declaration, which HTML does not know.


def _data_uri(picture: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
