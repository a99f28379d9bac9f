"""What a layout reads out of a listing of files: which image belongs to which masks, before any pixel is looked at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from meddiff.contracts.dataset import Role
from meddiff.contracts.problems import Fault

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff"})

Files = Mapping[str, bytes]
"""The files of a dataset: relative POSIX path -> content, read on access."""


@dataclass(frozen=True)
class RawCase:
    """One image as it lies in the source. ``patient`` is the layout's own label, made opaque at import.

    A ``background`` may name masks too: they must turn out empty.
    """

    image: str
    masks: tuple[str, ...] = ()
    role: Role = "pair"
    patient: str | None = None


@dataclass(frozen=True)
class Listing:
    """A source read by one layout: its cases, and every fault that shows without opening an image."""

    cases: tuple[RawCase, ...]
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    prompt: str | None = None


@dataclass(frozen=True)
class Layout:
    """A dataset layout. ``read`` gives None where the files are not of this layout; ``shape`` tells a user what is."""

    name: str
    shape: str
    read: Callable[[Files], Listing | None]


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: names of files that are not, and halves of surrogate pairs, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_image(path: str) -> bool:
    """Whether the name ends like an image the service reads."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def pair_up(
    images: Iterable[tuple[Hashable, str]],
    masks: Iterable[tuple[Hashable, str]],
    role: Callable[[str], Role] = lambda image: "pair",
    patient: Callable[[str], str | None] = lambda image: None,
) -> Listing | None:
    """Join images and masks, given as (key, path), by their keys; None where there is neither.

    Masks of one key belong to one image. An image without a mask, a mask without an image, two images of one key and
    two masks whose names differ in their endings alone are faults.
    """
    images_of, masks_of = _grouped(images), _grouped(masks)
    if not images_of and not masks_of:
        return None
    cases, faults = [], []
    for key, (image, *others) in images_of.items():
        faults += [Fault(pointer=other, detail=f"a second image beside {image} for the same mask") for other in others]
        if key in masks_of:
            cases.append(RawCase(image, tuple(masks_of[key]), role(image), patient(image)))
        else:
            faults.append(Fault(pointer=image, detail="no mask belongs to this image"))
    for of_one in masks_of.values():
        first: dict[str, str] = {}
        for mask in of_one:
            if (other := first.setdefault(str(PurePosixPath(mask).with_suffix("")), mask)) != mask:
                faults.append(Fault(pointer=mask, detail=f"a second file of the name of {other}; remove one"))
    for key in masks_of.keys() - images_of.keys():
        faults += [Fault(pointer=mask, detail="no image belongs to this mask") for mask in masks_of[key]]
    return Listing(tuple(cases), tuple(faults))


def _grouped(entries: Iterable[tuple[Hashable, str]]) -> dict[Hashable, list[str]]:
    groups = defaultdict(list)
    for key, path in sorted(entries, key=lambda entry: entry[1]):
        groups[key].append(path)
    return dict(groups)
