"""Shape signatures: a small bit picture of a shape, by which two shapes are compared without their pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE = 64
BYTES = SIDE * SIDE // 8
WORDS = BYTES // 8


class Shapes:
    """Signatures that others are compared with, at 64 bits a step: a job has thousands."""

    def __init__(self, signatures: bytes = b"") -> None:
        """``signatures``: one after the other."""
        self._count = len(signatures) // BYTES
        self._rows = np.frombuffer(signatures, np.uint64).reshape(-1, WORDS).copy()

    def __len__(self) -> int:
        return self._count

    def add(self, signature: bytes) -> None:
        """One more."""
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros((max(64, self._count), WORDS), np.uint64)])
        self._rows[self._count] = np.frombuffer(signature, np.uint64)
        self._count += 1

    def max_iou(self, signature: bytes) -> float:
        """Highest intersection over union of ``signature`` with any of them, in [0, 1]; 0 if there are none."""
        one, many = np.frombuffer(signature, np.uint64), self._rows[: self._count]
        shared = np.bitwise_count(many & one).sum(axis=1, dtype=np.int64)
        joined = np.bitwise_count(many | one).sum(axis=1, dtype=np.int64)
        return float((shared / np.maximum(joined, 1)).max(initial=0.0))


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
    return Shapes(bytes.fromhex(a)).max_iou(bytes.fromhex(b))


def _overlap(length: int) -> NDArray[np.float32]:
    """(64, length): how much of each pixel lies in each cell when ``length`` pixels are spread over the cells."""
    edges = np.linspace(0, length, SIDE + 1)
    pixels = np.arange(length)
    inside = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.clip(inside, 0, None), dtype=np.float32)
