"""What an experiment may change of how synthetic pairs are made and mixed: one entry a candidate, by name.

``first foundation`` needs the weights of then: ``mkdir -p out/first-foundation; git archive eff7a7a^
shared/meddiff/foundations/small | tar x -C out/first-foundation --strip-components 4``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from meddiff.contracts.evaluation import Mixing


@dataclass(frozen=True)
class Variant:
    """``what``: a line for the table. ``fitting`` and ``painting``: changes of the recipe before and after the
    fine-tune (variants of equal ``fitting`` share one). ``start``: the composites themselves, nothing painted.
    ``shift``: labels moved by this share of the width. ``copies``: the real cases in place of synthetic ones.
    ``healthy``: the dataset's lesion-free images with empty masks in their place. ``relabel``: inside the guide the
    label is what segmenters see that did not train on the donor. ``unlabelled``: real cases without their masks, which
    segmenters of the training cases draw instead: as they are (``pairs``), or among the training cases as donors and
    backgrounds (``sources``), or repainted to fit the drawn masks (``retexture``), or for the foundation to be
    fine-tuned on before the training cases (``foundation``). ``held_aside``: the fine-tune ends at the checkpoint that
    cases held aside choose. ``alone``: segmenters see the pairs and no real case; their stop has to be given."""

    what: str
    fitting: dict[str, Any] = field(default_factory=dict)
    painting: dict[str, Any] = field(default_factory=dict)
    retexture: bool = False
    decoys: bool = False
    start: bool = False
    shift: float = 0.0
    copies: bool = False
    healthy: bool = False
    agreement: tuple[float, float] | None = None
    relabel: bool = False
    unlabelled: Literal["pairs", "sources", "retexture", "foundation"] | None = None
    held_aside: bool = False
    alone: bool = False
    mixing: Mixing = "falling"
    pairs: int = 90


def strength(value: float, ring: float) -> dict[str, Any]:
    return {"inpainting": {"strength": value, "ring_strength": ring}}


VARIANTS: dict[str, Variant] = {
    "synthetic": Variant(
        "the cpu recipe as it stands: composite start, strength 0.2, detail kept; ever fewer in a batch, then none"
    ),
    "any size": Variant(
        "shapes of whatever size the mask generator draws; what follows a comma is a variant of that",
        fitting={"mask_generation": {"area_conditioned": False}},
    ),
    "copy-paste": Variant("the composites themselves: a lesion fitted into a new shape, colours matched", start=True),
    "copy-paste, repaired": Variant(
        "the composites of ``repaired``, nothing painted in them",
        painting={"inpainting": {"background": "repair"}},
        start=True,
    ),
    "retexture 0.5": Variant("a: own mask, own image, strength 0.5", painting=strength(0.5, 0.3), retexture=True),
    "strength 0.4": Variant("b: strength 0.4", painting=strength(0.4, 0.3)),
    "strength 0.6": Variant("b: strength 0.6", painting=strength(0.6, 0.3)),
    "strength 0.8": Variant("b: strength 0.8", painting=strength(0.8, 0.3)),
    "alone": Variant("the pairs without the real cases: what they teach wrongly shows", alone=True),
    "copy-paste, alone": Variant("the composites without the real cases", start=True, alone=True),
    "painted detail, alone": Variant(
        "the pairs without the real cases, every detail as it was painted",
        painting={"inpainting": {"kept_detail": 0}},
        alone=True,
    ),
    "repaired": Variant(
        "c: the paper's backgrounds, lesions repaired away, and shapes anywhere on them",
        painting={"inpainting": {"background": "repair"}},
    ),
    "wide guide": Variant("d: a guide twice as wide", painting={"inpainting": {"guide_margin": 0.3}}),
    "edge band": Variant("d: the loss weighs five times as much along the edge", {"finetuning": {"edge_weight": 4.0}}),
    "no erosion": Variant("labels not eroded", painting={"erosion": {"share": 0.0}}),
    "agreement": Variant(
        "e: pairs on which segmenters of the real cases agree with Dice 0.6 to 0.97", agreement=(0.6, 0.97)
    ),
    "relabelled": Variant("e: labels inside the guide as segmenters see them", relabel=True),
    "joint": Variant("f: as many synthetic as real pairs in every batch", mixing="joint"),
    "pretrain": Variant("f: synthetic first, then real", mixing="pretrain"),
    "300 pairs": Variant("300 pairs instead of 90", pairs=300),
    "240 steps": Variant("h: fine-tuned for half as long", fitting={"finetuning": {"steps": 240}}),
    "held-aside checkpoint": Variant(
        "h: the fine-tune ends where eq. 1 of cases held aside is lowest among the checkpoints that hardly copy",
        held_aside=True,
    ),
    "first foundation": Variant(
        "j: the built-in foundation as it was before: 4 px to a cell, 29 dB on PH2, the U-Net trained for less",
        fitting={"foundation": {"source": "out/first-foundation"}},
    ),
    "decoys": Variant("i: healthy tissue repainted elsewhere", decoys=True),
    "pseudo-labels": Variant("g: unlabelled images with the masks segmenters draw", unlabelled="pairs"),
    "unlabelled": Variant("g: unlabelled images as donors and backgrounds", unlabelled="sources"),
    "unlabelled retexture": Variant(
        "g with a: unlabelled images repainted to fit the masks segmenters draw",
        painting=strength(0.5, 0.3),
        unlabelled="retexture",
    ),
    "adapted": Variant(
        "g: the foundation fine-tuned on unlabelled images first, with the masks segmenters draw",
        unlabelled="foundation",
    ),
    "adapted, retexture 0.5": Variant(
        "g with a: retexture 0.5 of an adapted foundation",
        painting=strength(0.5, 0.3),
        retexture=True,
        unlabelled="foundation",
    ),
    "held-aside checkpoint, retexture 0.5": Variant(
        "h with a: retexture 0.5 of the checkpoint that cases held aside choose",
        painting=strength(0.5, 0.3),
        retexture=True,
        held_aside=True,
    ),
    "lesion-free": Variant("the lesion-free images as they are: what a gain owes to them alone", healthy=True),
    "shifted": Variant("must lose: labels moved by 15 % of the width", shift=0.15, mixing="joint"),
    "copies": Variant("must be null: the real cases again", copies=True, mixing="joint"),
}

BEFORE = "any size"
"""The recipe as it stood when most variants were measured; ``any size, joint`` is ``joint`` of that."""


def variant_of(name: str) -> Variant:
    """The variant of that name, with a prefix of ``BEFORE`` one of the recipe as it stood before."""
    base, comma, rest = name.partition(", ")
    if base != BEFORE or not comma:
        return VARIANTS[name]
    return replace(VARIANTS[rest], fitting=VARIANTS[rest].fitting | VARIANTS[BEFORE].fitting)


GONE = {
    "like donors": "b: a donor of the four whose outlines are most like the shape, its speckle not stretched",
    "like donors, copy-paste": "the same, nothing painted",
    "painted detail": "of the painting every detail kept, ``kept_detail`` 0; what follows a comma is a variant of that",
    "painted detail, wider sizes": "c: drawn shapes larger or smaller by exp(N(0, 0.5))",
    "painted detail, contrast": "b: the lesion's contrast to its surroundings to a power of 0.4 to 1.3",
    "painted detail, cropped grounds": "c: the largest part of an image that its lesion leaves free, as a background",
    "first recipe": "lesions fitted by an affine map alone, strength 0.6; what follows a comma is a variant of that",
    "first recipe, laid over, strength 0.2": "c: any background, shapes laid over its lesion",
    "first recipe, copy-paste, laid over": "the same, nothing painted",
    "first recipe, trimmed": "e: pixels whose loss is above 98 % of the real ones' ignored, joint",
}
"""Arms of the rows whose code is gone, for they did not help."""
