"""The figures of one case: Dice, normalised surface distance, and the 95th percentile of the Hausdorff distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from meddiff.science.geometry import Mask

TOLERANCE = 0.02  # Of the image's diagonal: surfaces that lie nearer agree.


@dataclass(frozen=True)
class Figures:
    """``dice`` and ``nsd`` in [0, 1], 1 best; ``hd95`` in shares of the image's diagonal, 0 best, at most 1."""

    dice: float
    nsd: float
    hd95: float


def figures(predicted: Mask, true: Mask) -> Figures:
    """Of two masks (H, W). Two empty ones agree wholly; of one empty and one not, every figure is the worst.

    NSD after Nikolov et al. (2018), on boundary pixels; HD95 is the greater of the two directed 95th percentiles.
    Raises ``ValueError`` for masks of different size.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"masks of different size: {predicted.shape} and {true.shape}")
    if not (predicted.any() and true.any()):
        same = float(predicted.any() == true.any())
        return Figures(same, same, 1 - same)
    diagonal = float(np.hypot(*true.shape))
    to_true, to_predicted = _surface_distances(predicted, true)
    near = (to_true <= TOLERANCE * diagonal).sum() + (to_predicted <= TOLERANCE * diagonal).sum()
    return Figures(
        dice=float(2 * (predicted & true).sum() / (predicted.sum() + true.sum())),
        nsd=float(near / (len(to_true) + len(to_predicted))),
        hd95=float(max(np.percentile(to_true, 95), np.percentile(to_predicted, 95)) / diagonal),
    )


def _surface_distances(one: Mask, other: Mask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances in pixels from each boundary pixel of one mask to the other's boundary, and the other way round."""
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (one, other)]
    fields = [ndimage.distance_transform_edt(~edge) for edge in edges]
    return fields[1][edges[0]], fields[0][edges[1]]
