"""What an experiment may change of how synthetic pairs are made and mixed: one entry a candidate, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from meddiff.contracts.evaluation import Mixing


@dataclass(frozen=True)
class Variant:
    """``what``: a line for the table. ``fitting`` and ``painting``: changes of the recipe before and after the
    fine-tune (variants of equal ``fitting`` share one). ``start``: the composites themselves, nothing painted.
    ``shift``: labels moved by this share of the width. ``copies``: the real cases in place of synthetic ones."""

    what: str
    fitting: dict[str, Any] = field(default_factory=dict)
    painting: dict[str, Any] = field(default_factory=dict)
    retexture: bool = False
    decoys: bool = False
    start: bool = False
    shift: float = 0.0
    copies: bool = False
    agreement: tuple[float, float] | None = None
    mixing: Mixing = "joint"
    pairs: int = 90


def strength(value: float, ring: float) -> dict[str, Any]:
    return {"inpainting": {"strength": value, "ring_strength": ring}}


VARIANTS: dict[str, Variant] = {
    "synthetic": Variant("the cpu recipe as it stands: composite start, strength 0.6, joint"),
    "copy-paste": Variant("the composites themselves: a lesion fitted into a new shape, colours matched", start=True),
    "retexture 0.5": Variant("4a: own mask, own image, strength 0.5", painting=strength(0.5, 0.3), retexture=True),
    "strength 0.4": Variant("4b: strength 0.4", painting=strength(0.4, 0.3)),
    "strength 0.8": Variant("4b: strength 0.8", painting=strength(0.8, 0.3)),
    "wide guide": Variant("4d: a guide twice as wide", painting={"inpainting": {"guide_margin": 0.3}}),
    "no erosion": Variant("labels not eroded", painting={"erosion": {"share": 0.0}}),
    "agreement": Variant(
        "4e: pairs on which segmenters of the real cases agree with Dice 0.6 to 0.97", agreement=(0.6, 0.97)
    ),
    "pretrain": Variant("4f: synthetic first, then real", mixing="pretrain"),
    "300 pairs": Variant("300 pairs instead of 90", pairs=300),
    "240 steps": Variant("4h: fine-tuned for half as long", fitting={"finetuning": {"steps": 240}}),
    "decoys": Variant("4i: healthy tissue repainted elsewhere", decoys=True),
    "shifted": Variant("must lose: labels moved by 15 % of the width", shift=0.15),
    "copies": Variant("must be null: the real cases again", copies=True),
}
