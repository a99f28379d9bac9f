"""One arm on one split: where its training stops, chosen among the training cases, and the figures of test cases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from meddiff.contracts.evaluation import Mixing
from meddiff.contracts.recipes import Evaluation
from meddiff.science.evaluation import figures, segmenters, splits, training
from meddiff.science.evaluation.figures import Figures
from meddiff.science.evaluation.training import Pairs
from meddiff.science.geometry import Image, Mask
from meddiff.seeds import derive

Pair = tuple[Image, Mask]
TOLERANCE = 0.005
OnStep = Callable[[int, int], None]
"""Called at each training step with the steps done and the steps in all; what it raises ends the training."""


@dataclass(frozen=True)
class Material:
    """What an arm's segmenters are trained on. Pairs may be read as they are asked for: only small copies of them are
    kept. ``made_from``: of each synthetic pair the places of the real ones that
    it shows (its donor, its background). ``groups``: of each real one the number that cases of one patient, or nearly
    the same picture, share; where empty, all differ."""

    real: Sequence[Pair]
    synthetic: Sequence[Pair] = ()
    made_from: Sequence[frozenset[int]] = ()
    mixing: Mixing = "joint"
    groups: Sequence[int] = ()


def stop_curve(
    material: Material, settings: Evaluation, seed: int, on_step: OnStep, device: torch.device
) -> dict[int, float]:
    """Mean Dice of the training cases, each held aside in one of ``settings.inner_folds`` trainings, by steps trained.

    Cases of a group are held aside together. A synthetic pair that shows one of them is left out of that training.
    """
    several = len(set(material.groups)) > 1  # Of one group's cases each is held aside alone.
    group_of = material.groups if several else range(len(material.real))
    parts = splits.folds(group_of, min(settings.inner_folds, len(set(group_of))), seed)
    dice: dict[int, list[float]] = defaultdict(list)
    real, synthetic = _pairs(material, settings)
    for number, held in enumerate(parts):
        inside = real.some([place for place in range(len(material.real)) if place not in held])
        made = zip(range(len(material.synthetic)), material.made_from, strict=True)
        apart = [place for place, origin in made if not origin & set(held)]
        kept = synthetic.some(apart) if synthetic is not None and apart else None
        told = _from(on_step, number * settings.steps, len(parts) * settings.steps)
        seeded = derive(seed, "inner", number)
        for steps, network in _fitted(inside, kept, material.mixing, settings, settings.steps, seeded, told, device):
            dice[steps] += [judge(network, settings, material.real[place]).dice for place in held]
    return {steps: float(np.mean(values)) for steps, values in dice.items()}


def _from(on_step: OnStep, begun: int, total: int) -> Callable[[int], None]:
    return lambda step: on_step(begun + max(step, 0), total)


def best_stop(curve: Mapping[int, float]) -> int:
    """The last step whose Dice is as good as the best one, within ``TOLERANCE``: each is averaged with its neighbours,
    for a single one is too noisy to choose by, and where a curve is level the later stop is the safer one."""
    steps = sorted(curve)
    smooth = {
        step: np.mean([curve[near] for near in steps[max(0, place - 1) : place + 2]])
        for place, step in enumerate(steps)
    }
    return max(step for step in steps if smooth[step] >= max(smooth.values()) - TOLERANCE)


def trained(
    material: Material, settings: Evaluation, steps: int, seed: int, on_step: OnStep, device: torch.device
) -> nn.Module:
    """A segmenter trained for ``steps`` steps, its weights averaged, on ``device``."""
    real, synthetic = _pairs(material, settings)
    told = _from(on_step, 0, steps)
    (*_, (_, network)) = _fitted(real, synthetic, material.mixing, settings, steps, seed, told, device)
    return network


def _pairs(material: Material, settings: Evaluation) -> tuple[Pairs, Pairs | None]:
    synthetic = Pairs.of(material.synthetic, settings.size) if material.synthetic else None
    return Pairs.of(material.real, settings.size), synthetic


def _fitted(
    real: Pairs,
    synthetic: Pairs | None,
    mixing: Mixing,
    settings: Evaluation,
    steps: int,
    seed: int,
    on_step: Callable[[int], None],
    device: torch.device,
) -> Iterator[tuple[int, nn.Module]]:
    network = segmenters.build(settings.segmenter, derive(seed, "weights")).to(device)
    return training.fit(network, real, synthetic, settings, steps, derive(seed, "batches"), mixing, on_step)


def judge(network: nn.Module, settings: Evaluation, pair: Pair) -> Figures:
    """The figures of what the segmenter sees in an image, against its mask."""
    image, mask = pair
    return figures.figures(training.predict(network, image, settings.size), mask)
