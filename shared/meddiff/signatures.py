"""Shape signatures: a small bit picture of a shape, by which two shapes are compared without their pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE = 64
BYTES = SIDE * SIDE // 8

_SET_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint16)


def of(shape: NDArray[np.bool_]) -> str:
    """The signature of a shape (H, W): hex of its picture in a 64x64 frame, 8 cells a byte, row by row.

    A cell is set where the shape covers at least half as much of it as of the cell that it covers most, so that a
    shape smaller than a cell leaves a mark as well. An empty shape has no cell set.
    """
    covered = _overlap(shape.shape[0]) @ shape.astype(np.float32) @ _overlap(shape.shape[1]).T
    cells = (covered >= covered.max() / 2) & (covered > 0)
    return np.packbits(cells).tobytes().hex()


def iou(a: str, b: str) -> float:
    """Intersection over union of two signatures in [0, 1]; 0 if either is empty."""
    return max_iou(bytes.fromhex(a), bytes.fromhex(b))


def max_iou(signature: bytes, others: bytes) -> float:
    """Highest IoU of ``signature`` with any of ``others``, signatures one after the other; 0 if there are none."""
    one = np.frombuffer(signature, np.uint8)
    many = np.frombuffer(others, np.uint8).reshape(-1, BYTES)
    shared = _SET_BITS[many & one].sum(axis=1, dtype=np.int64)
    joined = _SET_BITS[many | one].sum(axis=1, dtype=np.int64)
    return float((shared / np.maximum(joined, 1)).max(initial=0.0))


def _overlap(length: int) -> NDArray[np.float32]:
    """(64, length): how much of each pixel lies in each cell when ``length`` pixels are spread over the cells."""
    edges = np.linspace(0, length, SIDE + 1)
    pixels = np.arange(length)
    inside = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.clip(inside, 0, None), dtype=np.float32)
