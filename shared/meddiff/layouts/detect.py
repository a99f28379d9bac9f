"""Which layout a source has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from meddiff.contracts.problems import Fault
from meddiff.layouts import busi, data_json, ddti, isic, pairs, ph2
from meddiff.layouts.base import Files, Layout, Listing, is_image

LAYOUTS: tuple[Layout, ...] = (
    data_json.LAYOUT,
    ph2.LAYOUT,
    busi.LAYOUT,
    ddti.LAYOUT,
    isic.LAYOUT,
    pairs.LAYOUT,
)

_JUNK_NAMES = frozenset({"thumbs.db", "desktop.ini"})


def relevant(paths: Iterable[str]) -> list[str]:
    """The paths, sorted, without what file managers leave behind and ISIC's ``*_superpixels.png``."""
    return sorted(path for path in paths if not _is_junk(path))


def _is_junk(path: str) -> bool:
    parts = path.lower().split("/")
    hidden = any(part.startswith(".") or part == "__macosx" for part in parts)
    return hidden or parts[-1] in _JUNK_NAMES or parts[-1].endswith("_superpixels.png")


def detect(files: Files) -> tuple[Layout | None, Listing]:
    """The layout that fits and what it reads; a fault where none fits, or several do. ``files`` holds relevant paths.

    ``data.json`` names its files itself, so it goes before all others; ``pairs``, the least specific, goes last.
    """
    fitting = {layout.name: (layout, listing) for layout in LAYOUTS if (listing := layout.read(files)) is not None}
    if data_json.LAYOUT.name in fitting:
        return fitting[data_json.LAYOUT.name]
    if len(fitting) > 1:
        fitting.pop(pairs.LAYOUT.name, None)
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    detail = f"files of several layouts ({', '.join(fitting)}); name one dataset" if fitting else _unknown(files)
    return None, Listing((), (Fault(pointer="/", detail=detail),))


def _unknown(files: Files) -> str:
    images = [path for path in files if is_image(path)]
    folders = sorted({str(PurePosixPath(path).parent) for path in images})
    seen = (
        f"{len(images)} images in {', '.join(folders[:5])}{' …' if len(folders) > 5 else ''}" if images else "no image"
    )
    known = "; ".join(f"{layout.name}: {layout.shape}" for layout in LAYOUTS)
    return f"no known layout ({seen}). Known are {known}"
