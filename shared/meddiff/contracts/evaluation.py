"""An evaluation: which arms are compared on which cases, the figures of each case, and what they say."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from meddiff.contracts.base import Contract, DatasetId, JobId, Sha256, Stored
from meddiff.contracts.recipes import Recipe

Mixing = Literal["joint", "falling", "pretrain"]
ComparedArm = Literal["synthetic", "copy-paste", "oracle"]
Verdict = Literal["helps", "adds nothing", "harms"]

REAL = "real"
"""The arm every other is compared with: the training cases alone."""


class Arm(Contract):
    """What a segmenter is trained on: ``share`` times as many real cases as there are training cases (2 is the oracle,
    0.5 a point of the learning curve) and ``pairs`` of ``source``, mixed in every batch (``joint``), ever fewer until
    there are none (``falling``), or trained on first (``pretrain``)."""

    name: str
    share: Annotated[float, Field(gt=0, le=2)] = 1.0
    source: Literal["synthetic", "copy-paste"] | None = None
    pairs: Annotated[int, Field(ge=0)] = 0
    mixing: Mixing = "joint"


class Split(Contract):
    """One draw of the cases, by the digests of their images: those that train, further real ones for the oracle (none
    of the training cases' groups), and those that test, with the number of each one's group in ``groups``."""

    train: tuple[Sha256, ...]
    extra: tuple[Sha256, ...] = ()
    test: tuple[Sha256, ...]
    groups: tuple[int, ...] = ()


class Row(Contract):
    """The figures of one test case (``case``: the digest of its image) under one trained segmenter. ``real``: cases it
    was trained on; ``steps``: where its training stopped; ``area``: the true mask's share of the image; ``dice`` and
    ``nsd`` in [0, 1], 1 best; ``hd95`` in shares of the image's diagonal, 0 best. ``group``: a number that
    cases of one patient, or of nearly the same picture, share."""

    split: int
    arm: str
    seed: int
    steps: int
    real: int
    case: str
    group: int | None = None
    area: float
    dice: float
    nsd: float
    hd95: float


class Interval(Contract):
    """A mean and its 95 % interval: of gains in points (hundredths) of Dice, of equivalents in cases."""

    mean: float
    low: float
    high: float


class ArmResult(Contract):
    """An arm's mean figures over all of its runs. ``gain``: Dice over the arm ``real`` in points, by a hierarchical
    paired bootstrap over splits, seeds and groups of cases; ``p`` from the same resamples; ``spread``: standard
    deviation of a run's mean Dice between seeds, in points; ``equivalents``: how many more real cases are worth as
    much, read off the learning curve, none where it does not rise beyond ``real``; beyond its end they are ``at_least``
    as many, and no end of their interval lies beyond it."""

    name: str
    runs: int
    real: float
    pairs: int
    steps: tuple[int, ...]
    dice: float
    nsd: float
    hd95: float
    spread: float | None = None
    gain: Interval | None = None
    p: float | None = None
    verdict: Verdict | None = None
    equivalents: Interval | None = None
    at_least: bool = False


class CurvePoint(Contract):
    """Mean Dice of segmenters trained on ``real`` cases alone."""

    real: float
    dice: float


class SizeGain(Contract):
    """Gain of the headline arm on the cases whose lesion covers [``low``, ``high``) of the image."""

    low: float
    high: float
    cases: int
    gain: Interval


class Worst(Contract):
    """A picture to look at: a test case the headline arm does worst on, or a synthetic pair that segmenters trained on
    real cases alone disagree with most. ``dice``: how far they agree."""

    name: str
    dice: float
    split: int


class Report(Stored):
    """``GET /jobs/{id}/report``: the verdict first. ``headline`` is the arm the verdict is of: the first with synthetic
    pairs."""

    job_id: JobId
    dataset_id: DatasetId
    created_at: datetime
    software_version: str
    verdict: Verdict
    summary: str
    headline: str
    arms: tuple[ArmResult, ...]
    curve: tuple[CurvePoint, ...]
    by_size: tuple[SizeGain, ...]
    worst_cases: tuple[Worst, ...] = ()
    doubtful_pairs: tuple[Worst, ...] = ()
    splits: tuple[Split, ...]
    notes: tuple[str, ...] = ()
    recipe: Recipe
    request: dict[str, Any]
    fingerprint: dict[str, str] = {}
