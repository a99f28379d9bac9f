"""Pairs of the real datasets, read as the service reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from meddiff.importing.pixels import decode_image, decode_mask, merge
from meddiff.importing.sources import Folder
from meddiff.layouts import detect
from meddiff.science.geometry import Image, Mask

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NAMES = ("PH2", "BUSI", "DDTI", "ISIC-2017", "ISIC-2018")


@dataclass(frozen=True)
class RealCase:
    """Image (H, W, C), mask (H, W), and who it is of (its file name where the layout does not tell)."""

    image: Image
    mask: Mask
    patient: str


def real_cases(name: str, count: int, seed: int = 0) -> list[RealCase]:
    """``count`` pairs of a dataset in an order drawn from ``seed``; the test is skipped where there is no data."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    source = Folder(folder, DATA)
    _, listing = detect(source)
    pairs = sorted((case for case in listing.cases if case.role == "pair"), key=lambda case: case.image)
    cases: list[RealCase] = []
    for n in np.random.default_rng(seed).permutation(len(pairs)):
        raw = pairs[n]
        mask = merge([decode_mask(source[path]) for path in raw.masks])
        image = decode_image(source[raw.image]).pixels
        if mask.any() and mask.shape == image.shape[:2]:
            cases.append(RealCase(image, mask, raw.patient or raw.image))
        if len(cases) == count:
            break
    return cases
