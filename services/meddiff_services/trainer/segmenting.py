"""Evaluation's training tasks: where an arm stops, and its segmenters with the figures of their test cases."""

from __future__ import annotations

from typing import Any

import torch
from meddiff.contracts.evaluation import REAL, Row
from meddiff.planning import evaluation
from meddiff.science.evaluation import trials
from meddiff.seeds import derive
from safetensors.torch import save

from meddiff_services.loading import device, fingerprint
from meddiff_services.trials import load_cases, material, splits
from meddiff_services.worker import Outcome, Work


def stop(work: Work) -> Outcome:
    """Where an arm's training stops on a split: the step of the best Dice on its own training cases, held aside in
    turn."""
    run = next(run for run in evaluation.runs(work.spec, splits(work)) if run.stop == work.shard)
    settings = work.spec.recipe.evaluation
    torch.set_num_threads(work.spec.recipe.work.training_threads)
    seed = derive(work.spec.request.seed, "inner", run.split)
    curve = trials.stop_curve(
        material(work, run.split, run.arm),
        settings,
        seed,
        lambda done, total: work.progress(done, total, "steps"),
        device(work.settings),
    )
    output: dict[str, Any] = {"arm": run.arm.name, "split": run.split, "steps": trials.best_stop(curve)}
    output["curve"] = {str(steps): dice for steps, dice in curve.items()}
    return Outcome(1, output | {"fingerprint": fingerprint(work.spec.recipe, work.settings)})


def segmenter(work: Work) -> Outcome:
    """One run: a segmenter trained to its arm's stop, and a row for each test case, stored as it ends."""
    cut = splits(work)
    run = evaluation.runs(work.spec, cut)[work.shard]
    settings = work.spec.recipe.evaluation
    torch.set_num_threads(work.spec.recipe.work.training_threads)
    steps = int(work.marker("stop", run.stop).output["steps"])
    trained_on = material(work, run.split, run.arm)
    network = trials.trained(
        trained_on,
        settings,
        steps,
        derive(work.spec.request.seed, "segmenter", run.split, run.seed),
        lambda done, total: work.progress(done, total, "steps"),
        device(work.settings),
    )
    rows = []
    test = cut[run.split].test
    groups = cut[run.split].groups or (None,) * len(test)
    for digest, group, case in zip(test, groups, load_cases(work, test), strict=True):
        found = trials.judge(network, settings, (case.image, case.mask))
        rows.append(
            Row(
                split=run.split,
                arm=run.arm.name,
                seed=run.seed,
                steps=steps,
                real=len(trained_on.real),
                case=digest,
                group=group,
                area=float(case.mask.mean()),
                dice=found.dice,
                nsd=found.nsd,
                hd95=found.hd95,
            )
        )
        work.raise_if_stopped()
    if run.seed == 0 and (run.arm.name == REAL or run.arm.source == "synthetic"):
        weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
        work.store.put(work.keys.segmenter(run.split, run.arm.name), save(weights))
    lines = b"".join(row.model_dump_json().encode() + b"\n" for row in rows)
    work.store.put(work.keys.rows(work.shard), lines, "application/x-ndjson")
    mean = sum(row.dice for row in rows) / len(rows)
    work.log.info("segmenter trained", arm=run.arm.name, split=run.split, seed=run.seed, dice=round(mean, 4))
    output = {"arm": run.arm.name, "split": run.split, "steps": steps, "dice": mean}
    return Outcome(1, output | {"fingerprint": fingerprint(work.spec.recipe, work.settings)})
