"""ISIC 2017 and 2018 (task 1), dermoscopy (Codella et al.): images in ``…_Data`` or ``…_Input``, masks in
``…_GroundTruth`` as ``<image>_segmentation.png``. Training, validation and test folders may lie side by side."""

from __future__ import annotations

import re

from meddiff.layouts.base import Files, Layout, Listing, pair_up

_IMAGE = re.compile(
    r"(?:^|/)ISIC[^/]*?(?P<year>\d{4})[^/]*_(?P<split>Training|Validation|Test)[^/]*_(?:Data|Input)/"
    r"(?P<id>ISIC_\d+)\.(?:jpe?g|png)$",
    re.IGNORECASE,
)
_MASK = re.compile(
    r"(?:^|/)ISIC[^/]*?(?P<year>\d{4})[^/]*_(?P<split>Training|Validation|Test)[^/]*_GroundTruth/"
    r"(?P<id>ISIC_\d+)_segmentation\.png$",
    re.IGNORECASE,
)


def read(files: Files) -> Listing | None:
    """Cases of ``ISIC-2017_Training_Data/ISIC_0000003.jpg`` and
    ``ISIC-2017_Training_Part1_GroundTruth/ISIC_0000003_segmentation.png``, or 2018's names, for each split."""
    return pair_up(
        [(_key(match), path) for path in files if (match := _IMAGE.search(path))],
        [(_key(match), path) for path in files if (match := _MASK.search(path))],
    )


def _key(match: re.Match[str]) -> tuple[str, str, str]:
    return match["year"], match["split"].lower(), match["id"].upper()


LAYOUT = Layout(
    "isic",
    "ISIC…_Training_Data/ISIC_0000003.jpg (or …_Input/) and ISIC…_Training_…GroundTruth/ISIC_0000003_segmentation.png",
    read,
)
