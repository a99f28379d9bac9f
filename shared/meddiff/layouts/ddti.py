"""DDTI, thyroid ultrasound (Pedraza et al., SIPAIM 2015), cropped a nodule: ``<patient>_<view>(<nodule>)``."""

from __future__ import annotations

import re

from meddiff.layouts.base import Files, Layout, Listing, pair_up

_FILE = re.compile(
    r"(?:^|/)(?P<folder>cropped|mask)/(?P<stem>(?P<patient>\d+)_\d+(?:\(\d+\))?)\.(?:png|jpe?g|gif|bmp)$", re.IGNORECASE
)


def read(files: Files) -> Listing | None:
    """Cases of ``cropped/101_1(2).png`` and ``mask/101_1(2).gif``, grouped by patient 101."""
    found = [match for path in files if (match := _FILE.search(path))]
    return pair_up(
        [(match["stem"], match.string) for match in found if match["folder"].lower() == "cropped"],
        [(match["stem"], match.string) for match in found if match["folder"].lower() == "mask"],
        patient=_patient,
    )


def _patient(image: str) -> str | None:
    match = _FILE.search(image)
    return match["patient"] if match else None


LAYOUT = Layout("ddti", "cropped/101_1(2).png and mask/101_1(2).gif, named <patient>_<view>(<nodule>)", read)
