"""Pairs: ``images/`` and ``masks/`` with equal stems, and if there are any ``backgrounds/`` and ``unlabelled/``."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from meddiff.contracts.dataset import Role
from meddiff.contracts.problems import Fault
from meddiff.layouts.base import Files, Layout, Listing, RawCase, is_image, pair_up

_FILE = re.compile(r"^(?P<root>(?:.*?/)?)(?P<folder>images|masks|backgrounds|unlabelled)/(?P<name>.+)$", re.IGNORECASE)
_MASK_ENDING = re.compile(r"_(?:mask|segmentation)(?:_\d+)?$", re.IGNORECASE)


def read(files: Files) -> Listing | None:
    """Cases of ``images/x.jpg`` and ``masks/x.png``, or ``masks/x_mask.png``, ``masks/x_mask_1.png`` and so on.

    Images of ``backgrounds/`` show no lesion; those of ``unlabelled/`` have no mask yet. Two datasets in one source
    are a fault.
    """
    found = [match for path in files if is_image(path) and (match := _FILE.match(path))]
    if not found:
        return None
    roots = sorted({match["root"] for match in found})
    if len(roots) > 1:
        return Listing(
            (), tuple(Fault(pointer=root or "/", detail="one of several datasets; name one") for root in roots)
        )
    images = {_stem(match): match.string for match in found if match["folder"].lower() == "images"}
    paired = pair_up(
        [(_stem(match), match.string) for match in found if match["folder"].lower() == "images"],
        [(_image_stem(match, images), match.string) for match in found if match["folder"].lower() == "masks"],
    ) or Listing(())
    return Listing(paired.cases + _alone(found, "background") + _alone(found, "unlabelled"), paired.faults)


def _stem(match: re.Match[str]) -> str:
    return str(PurePosixPath(match["name"]).with_suffix(""))


def _image_stem(mask: re.Match[str], images: dict[str, str]) -> str:
    stem = _stem(mask)
    return stem if stem in images else _MASK_ENDING.sub("", stem)


def _alone(found: list[re.Match[str]], role: Role) -> tuple[RawCase, ...]:
    return tuple(
        RawCase(match.string, role=role) for match in found if match["folder"].lower().removesuffix("s") == role
    )


LAYOUT = Layout("pairs", "images/x.jpg and masks/x.png; if there are any, backgrounds/ and unlabelled/", read)
