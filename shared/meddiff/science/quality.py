"""The quality gate (section 2.2 of the paper): neither too unlike the real lesions nor a copy of one of them.

Everything is measured on lesion crops: outside its guide a synthetic pair is its background, bit for bit, so whole
images would say nothing. A fixed similarity does not tell copies from likenesses; rank and margin do: a copy is much
nearer to its original than to any other real lesion.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from scipy import stats
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from meddiff.contracts.manifest import Reason, Scores
from meddiff.contracts.recipes import Quality
from meddiff.science.encoders import Encoder
from meddiff.science.geometry import Image, Mask, resize_image
from meddiff.seeds import derive

__all__ = ["Encoder", "Reference", "Verdict", "calibrate", "judge", "lesion_crop"]

SMALLEST_CROP = 16
FLAT_STD = 2.0  # Grey levels; the flattest real lesion of five public datasets has 4.5.
SUBCROP = 0.85
LIT = (20, -20)  # Grey levels.
SAFETY = 0.85  # A low quantile of thirty ratios is uncertain; new real cases must not pass for copies.
LEAST_SPREAD = 0.15  # Of log distances: a handful of cases may lie equally far from each other by chance.
ALIKE_QUANTILE = 0.1
NEW_REAL = 0.01  # Of new real lesions so many may pass for copies.
CORNERS = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))

Similarities = NDArray[np.float64]


class Verdict(NamedTuple):
    """``reason`` is None where the candidate passes."""

    reason: Reason | None
    scores: Scores


@dataclass(frozen=True)
class Reference:
    """The real lesions a candidate is compared with.

    ``embeddings``: (n, v, d), unit vectors of v views of each of n crops, the first the crop itself; ``cases``: the
    digest of each case's image; ``lesions``: the number of the lesion that each crop shows, 0 to g - 1, for one may be
    there twice; ``lowest``: the nearest similarity below which a candidate is too far; ``copy_ratio``: the ratio of the
    distances to the nearest and second nearest lesion below which it is a copy of the nearest.
    """

    embeddings: Tensor
    cases: tuple[str, ...]
    lesions: tuple[int, ...]
    lowest: float
    copy_ratio: float

    def to_bytes(self) -> bytes:
        """safetensors: the embeddings, and the rest as JSON in its metadata."""
        rest = {
            "cases": self.cases, "lesions": self.lesions, "lowest": self.lowest, "copy_ratio": self.copy_ratio,
        }  # fmt: skip
        return bytes(save({"embeddings": self.embeddings.contiguous()}, {"reference": json.dumps(rest)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> Reference:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        rest = json.loads(header["__metadata__"]["reference"])
        cases = tuple(rest["cases"])
        lesions = tuple(rest.get("lesions", range(len(cases))))
        return cls(load(data)["embeddings"], cases, lesions, rest["lowest"], rest["copy_ratio"])

    def summary(self) -> dict[str, Any]:
        """What the model card says of the calibration."""
        return {
            "cases": len(self.cases),
            "lesions": len(set(self.lesions)),
            "lowest": round(self.lowest, 4),
            "copy_ratio": round(self.copy_ratio, 4),
        }


def lesion_crop(image: Image, region: Mask, context: float, px: int) -> Image:
    """The lesion of an image (H, W, C) and what is around it, as (px, px, C) whatever its size.

    A square of ``context`` times the larger side of the region's box about the box's centre. Where the image ends the
    square is cut, so the crop shows nothing that is not there, and what is left is stretched. An empty region means the
    whole image.
    """
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return resize_image(image, (px, px))
    side = max(SMALLEST_CROP, round(context * max(np.ptp(rows) + 1, np.ptp(columns) + 1)))

    def span(filled: NDArray[np.intp]) -> slice:
        first = round((filled[0] + filled[-1] + 1 - side) / 2)
        return slice(max(first, 0), first + side)

    return resize_image(image[span(rows), span(columns)], (px, px))


# ------------------------------------------------------------------------------------------------------- calibration


def calibrate(encoder: Encoder, crops: Sequence[Image], cases: Sequence[str], settings: Quality) -> Reference:
    """The reference of real crops (px, px, C), each of the case whose digest stands at its place.

    Crops as near to each other as the tenth that changes least is to itself after a small change show one lesion: two
    frames, or a picture stored twice. The band comes from real-to-real, each lesion
    against the others. ``lowest``: a new real case would be farther from its nearest with probability
    ``far_quantile``. ``copy_ratio`` lies half way (in logarithm) between the 1 - ``copy_quantile`` quantile of what
    crops have to themselves after a small change and the ``NEW_REAL`` quantile of what distinct lesions have to each
    other, and always below the latter.
    Raises ``ValueError`` for crops of fewer than two lesions.
    """
    views = torch.stack([encoder(_batch(_views(crop))) for crop in crops])
    among = _similarities(views[:, 0], views)
    changed = _similarities(
        encoder(_batch([_changed(crop, derive("changed", n)) for n, crop in enumerate(crops)])), views
    )
    alike = 1 - among <= np.quantile(1 - np.diag(changed), ALIKE_QUANTILE)
    count, lesions = connected_components(alike, directed=False)
    if count < 2:
        raise ValueError("similarity between real lesions needs at least two of them")
    to_itself = np.quantile(_distance_ratios(_by_lesion(changed, lesions)), 1 - settings.copy_quantile)
    among[lesions[:, None] == lesions] = -1.0
    to_lesions = _by_lesion(among, lesions)
    to_others = np.quantile(_distance_ratios(to_lesions), NEW_REAL) if count > 2 else 1.0
    copy_ratio = min(SAFETY * to_others, np.sqrt(to_itself * to_others))
    nearest = _by_lesion(to_lesions.max(axis=1)[None], lesions)[0]
    lowest = 1 - _farthest(1 - nearest, settings.far_quantile)
    return Reference(views, tuple(cases), tuple(lesions.tolist()), float(lowest), float(copy_ratio))


def _farthest(distances: NDArray[np.float64], quantile: float) -> float:
    """The distance that one more of the same log-normal kind exceeds with probability ``quantile`` (a prediction
    interval by Student's t), at most 2."""
    logs = np.log(distances.clip(min=1e-3))
    spread = max(float(logs.std(ddof=1)), LEAST_SPREAD) * np.sqrt(1 + 1 / len(logs))
    return min(2.0, float(np.exp(logs.mean() + stats.t.ppf(1 - quantile, len(logs) - 1) * spread)))


def _views(crop: Image) -> list[Image]:
    """The crop, turned by quarters, its middle and corners enlarged, and crop and middle lighter and darker. (Encoders
    see mirror images as the same.)"""
    turned = [np.rot90(crop, turn) for turn in (1, 2, 3)]
    parts = [_enlarged(crop, SUBCROP, y, x) for y, x in CORNERS]
    lit = [
        np.clip(view.astype(np.int16) + change, 0, 255).astype(np.uint8) for view in (crop, parts[0]) for change in LIT
    ]
    return [crop, *turned, *parts, _enlarged(crop, (1 + SUBCROP) / 2, 0.5, 0.5), *lit]


def _enlarged(crop: Image, share: float, y: float, x: float) -> Image:
    """A part of the crop, ``share`` of its side, at (y, x) in [0, 1] from the first place to the last."""
    size = crop.shape[0]
    part = round(share * size)
    top, left = round(y * (size - part)), round(x * (size - part))
    return resize_image(crop[top : top + part, left : left + part], (size, size))


def _changed(crop: Image, seed: int) -> Image:
    """A small change, as someone would make who passes off a copy: another brightness and contrast, a tenth cut off,
    a little noise."""
    rng = np.random.default_rng(seed)
    size = crop.shape[0]
    part = round(rng.uniform(0.88, 0.98) * size)
    y, x = rng.integers(0, size - part + 1, 2)
    cut = resize_image(crop[y : y + part, x : x + part], (size, size)).astype(np.float32)
    noisy = cut * rng.uniform(0.9, 1.1) + rng.uniform(-20, 20) + rng.normal(0, 2, cut.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _batch(crops: Sequence[Image]) -> Tensor:
    """Crops (px, px, C) as the encoder takes them: (n, 3, px, px) in [0, 1]."""
    coloured = np.stack([np.broadcast_to(crop, (*crop.shape[:2], 3)) for crop in crops])
    return torch.from_numpy(coloured.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def _similarities(vectors: Tensor, views: Tensor) -> Similarities:
    """Cosine similarity of vectors (m, d) to cases (n, v, d): that of the view most like it. (m, n)."""
    return torch.einsum("md,nvd->mnv", vectors, views).amax(dim=2).double().numpy()


def _by_lesion(similarities: Similarities, lesions: Sequence[int] | NDArray[np.integer]) -> Similarities:
    """Of similarities (m, n) to cases those to lesions (m, g): that of the case most like it."""
    numbers = np.asarray(lesions)
    return np.stack([similarities[:, numbers == one].max(axis=1) for one in range(numbers.max() + 1)], axis=1)


def _distance_ratios(similarities: Similarities) -> Similarities:
    """Distance to the nearest lesion over that to the second nearest (Lowe 2004), for each row of (m, g)."""
    second, first = np.sort(1 - similarities, axis=1)[:, 1::-1].T
    return np.asarray(first.clip(min=0) / second.clip(min=1e-6))


# ----------------------------------------------------------------------------------------------------------- judging


def judge(reference: Reference, encoder: Encoder, image: Image, shape: Mask, settings: Quality) -> Verdict:
    """Whether a candidate, image (H, W, C) and shape (H, W), may be delivered, and if not, why.

    ``empty_shape``: there is no lesion; ``flat``: nothing is to be seen in it; ``copy``: it is much nearer to one real
    lesion than to the next; ``too_far``: it is like none of them.
    """
    crop = lesion_crop(image, shape, settings.context, settings.crop_px)
    similarities = _similarities(encoder(_batch([crop])), reference.embeddings)
    to_lesions = _by_lesion(similarities, reference.lesions)
    ratio = float(_distance_ratios(to_lesions)[0])
    second, nearest = np.sort(to_lesions[0])[-2:]
    scores = Scores(
        nearest_real=float(nearest),
        nearest_sha256=reference.cases[int(similarities[0].argmax())],
        mean_real=float(similarities.mean()),
        margin=float(nearest - second),
        band=(reference.lowest, float(1 - reference.copy_ratio * (1 - second))),
    )
    return Verdict(_reason(image, shape, scores, ratio < reference.copy_ratio), scores)


def _reason(image: Image, shape: Mask, scores: Scores, is_copy: bool) -> Reason | None:
    if not shape.any():
        return "empty_shape"
    if image[shape].std(axis=0).max() < FLAT_STD:
        return "flat"
    if is_copy:
        return "copy"
    if scores.nearest_real < scores.band[0]:
        return "too_far"
    return None
