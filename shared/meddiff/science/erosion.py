"""Mask corrosion (section 2.2 of the paper): the label is the shape without its outermost pixels."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from meddiff.science.geometry import Mask, equivalent_diameter


def erode(shape: Mask, share: float) -> tuple[Mask, int]:
    """The label (H, W) of a shape, and the radius in pixels by which it was eroded (Euclidean distance).

    The radius is ``share`` times the shape's equivalent diameter, rounded, at least 1 where ``share`` is above 0. Any
    component that would vanish is eroded only as far as it survives. A shape that reaches the image's edge goes on
    beyond it, so nothing is taken off there.
    """
    if share == 0 or not shape.any() or shape.all():
        return shape.copy(), 0
    radius = max(1, round(share * equivalent_diameter(shape)))
    depth = ndimage.distance_transform_edt(shape)
    components, count = ndimage.label(shape, np.ones((3, 3)))
    deepest = np.asarray(ndimage.maximum(depth, components, range(count + 1)))
    radii = np.minimum(radius, np.ceil(deepest) - 1).clip(min=0)
    return shape & (depth > radii[components]), int(radii[1:].max())
