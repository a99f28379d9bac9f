"""Import: judge every file of a source, then store its cases in one form. Also reading them back and choosing some."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Literal

from meddiff.contracts.base import sha256_hex
from meddiff.contracts.dataset import Case, Dataset, Role, ValidationReport, dataset_id_of
from meddiff.contracts.problems import Fault, ProblemError
from meddiff.contracts.requests import FinetuneRequest
from meddiff.importing.pixels import (
    DecodedImage,
    Mask,
    PixelError,
    Pixels,
    Window,
    decode_image,
    decode_mask,
    encode_mask,
    encode_png,
    merge,
)
from meddiff.importing.sources import UnreadableFile, is_dataset_id, sorted_faults
from meddiff.layouts import Files, Layout, Listing, RawCase, detect, is_image
from meddiff.seeds import derive
from meddiff.store.keys import DatasetKeys
from meddiff.store.objects import NotFound, ObjectStore

MIN_PAIRS = 2
WINDOW_FILE = "window.json"
_DECODING = threading.BoundedSemaphore(2)
"""However many imports run at once: a picture of 64 megapixels takes most of a gigabyte while it is decoded."""

Progress = Callable[[int, int], None]
What = Literal["image", "mask"]
Keep = Callable[[str, What, bytes], None]

_OTHER_FORMATS = {
    "DICOM": (".dcm", ".dicom", ".ima"),
    "NIfTI": (".nii", ".nii.gz"),
    "WebP": (".webp",),
    "HEIF": (".heic", ".heif"),
    "JPEG 2000": (".jp2", ".j2k"),
    "MetaImage": (".mha", ".mhd"),
    "NRRD": (".nrrd",),
    "NumPy": (".npy", ".npz"),
    "A whole slide": (".svs", ".ndpi", ".mrxs"),
}


def validate(source: Files) -> ValidationReport:
    """Every fault of ``source`` at once, or the id that an import of it would have. Nothing is written."""
    judged = _judge(source, keep=lambda case, what, png: None, progress=lambda done, total: None)
    return ValidationReport(
        valid=not judged.faults,
        layout=judged.layout.name if judged.layout else None,
        pairs=judged.count("pair"),
        backgrounds=judged.count("background"),
        unlabelled=judged.count("unlabelled"),
        errors=tuple(sorted_faults(judged.faults)),
        notes=judged.notes(named=True),
        dataset_id=None if judged.faults else dataset_id_of(judged.cases, judged.listing.prompt),
    )


def import_dataset(source: Files, store: ObjectStore, tenant: str, progress: Progress, limit: int) -> Dataset:
    """The dataset of ``source``, in the tenant's part of ``store``: its cases first, ``dataset.json`` last.

    The same data imported twice is the same dataset, and what the first import wrote stays. ``progress`` is told cases
    judged and cases in all; ``limit``: bytes of all its pictures as they are stored. Raises ``ProblemError``
    ``invalid-dataset`` with every fault, and ``too-large``; then nothing is written.
    """
    with tempfile.TemporaryFile() as file:  # It has no name, so that no crash leaves pixels behind.
        spool = _Spool(file, limit)
        judged = _judge(source, spool.keep, progress)
        if judged.layout is None or judged.faults:
            faults = sorted_faults(judged.faults)
            raise ProblemError(
                "invalid-dataset", f"{len(faults)} fault{'s' * (len(faults) > 1)} in the dataset", faults
            )
        dataset = Dataset(
            id=dataset_id_of(judged.cases, judged.listing.prompt),
            layout=judged.layout.name,
            cases=tuple(judged.cases),
            prompt=judged.listing.prompt,
            notes=judged.notes(named=False),
        )
        keys = DatasetKeys(tenant, dataset.id)
        present = set(store.list(f"{keys.root}/"))
        if keys.dataset not in present:  # Of an import that was cut off long ago the sweep may be taking the cases.
            present = set()
        for case in dataset.cases:  # Also of a dataset that is there: a deletion beside its import may have taken some.
            if keys.image(case.id) not in present:
                store.put(keys.image(case.id), spool.get(case.id, "image"), "image/png")
            if case.mask_sha256 is not None and keys.mask(case.id) not in present:
                store.put(keys.mask(case.id), spool.get(case.id, "mask"), "image/png")
        if keys.dataset in present:
            return store.get_json(keys.dataset, Dataset)
        store.put_json(keys.dataset, dataset)
    return dataset


def load_dataset(store: ObjectStore, tenant: str, dataset_id: str) -> Dataset:
    """The tenant's dataset of that id. Raises ``ProblemError`` ``not-found``."""
    try:
        if is_dataset_id(dataset_id):
            return store.get_json(DatasetKeys(tenant, dataset_id).dataset, Dataset)
    except NotFound:
        pass
    raise ProblemError("not-found", "there is no dataset of that id")


def load_case(store: ObjectStore, tenant: str, dataset_id: str, case: Case) -> tuple[Pixels, Mask | None]:
    """Image uint8 (h, w, c), c 1 or 3, and mask bool (h, w), None where the case has none."""
    keys = DatasetKeys(tenant, dataset_id)
    image = decode_image(store.get(keys.image(case.id))).pixels
    return image, None if case.mask_sha256 is None else decode_mask(store.get(keys.mask(case.id)))


def mask_png(store: ObjectStore, tenant: str, dataset_id: str, case: Case) -> bytes:
    """The mask of a case that has one, as the PNG that ``decode_mask`` takes."""
    return store.get(DatasetKeys(tenant, dataset_id).mask(case.id))


def first_of_each_picture(dataset: Dataset) -> dict[str, Case]:
    """The pairs by the digest of their image; of those with the same image, the first."""
    return {case.image_sha256: case for case in reversed(dataset.pairs)}


def select_cases(dataset: Dataset, max_pairs: int | None, seed: int) -> tuple[Case, ...]:
    """At most ``max_pairs`` pairs (None: all) in an order drawn from ``seed``: one of each patient, then the second
    of each, and so on, so that few pairs come from many patients. Where patients are unknown each case is its own. Of
    cases with the same picture only the first counts.

    Raises ``ProblemError`` ``invalid-dataset`` where the dataset has fewer than two pairs.
    """
    different = first_of_each_picture(dataset)
    if len(different) < MIN_PAIRS:
        raise ProblemError("invalid-dataset", f"{len(different)} different pairs; fine-tuning needs {MIN_PAIRS}")
    drawn = sorted(different.values(), key=lambda case: derive(seed, "pairs", case.id))
    turn: dict[str, int] = defaultdict(int)
    turns: list[int] = []
    for case in drawn:
        patient = case.patient or f"case {case.id}"
        turns.append(turn[patient])
        turn[patient] += 1
    spread = sorted(range(len(drawn)), key=lambda i: turns[i])
    return tuple(drawn[i] for i in spread[:max_pairs])


def chosen_cases(dataset: Dataset, request: FinetuneRequest, max_pairs: int) -> tuple[Case, ...]:
    """The pairs that a request names, or those that ``select_cases`` draws for it.

    Raises ``ProblemError`` ``invalid-dataset`` naming every digest that is no pair of the dataset.
    """
    if request.cases is None:
        return select_cases(dataset, request.max_pairs or max_pairs, request.split_seed)
    pairs = first_of_each_picture(dataset)
    faults = [
        Fault(pointer=f"/cases/{place}", detail="no pair of the dataset has an image of this digest")
        for place, digest in enumerate(request.cases)
        if digest not in pairs
    ]
    if faults:
        raise ProblemError("invalid-dataset", f"{len(faults)} of the cases named are not in the dataset", faults)
    return tuple(pairs[digest] for digest in request.cases)


@dataclass
class _Judged:
    """A source, judged: its cases so far, its faults, and remarks (what was done -> to which files)."""

    layout: Layout | None
    listing: Listing
    cases: list[Case] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def count(self, role: Role) -> int:
        return sum(raw.role == role for raw in self.listing.cases)

    def notes(self, named: bool) -> tuple[str, ...]:
        """One line a remark, with the names of files for the user, or their number alone for what is stored."""
        return self.listing.notes + tuple(
            f"{remark}: {', '.join(names) if named else f'{len(names)} files'}"
            for remark, names in sorted(self.remarks.items())
        )


def _judge(source: Files, keep: Keep, progress: Progress) -> _Judged:
    """Every case of ``source`` decoded and encoded again, one at a time; ``keep`` gets the PNGs of faultless ones."""
    layout, listing = detect(source)
    judged = _Judged(layout, listing, faults=list(listing.faults))
    judged.faults += _other_formats(source)
    window = _window(source, judged.faults)
    patients: dict[str, str] = {}
    first_with: dict[str, tuple[RawCase, Case]] = {}
    raw_cases = sorted(listing.cases, key=lambda raw: raw.image)
    for number, raw in enumerate(raw_cases):
        image, mask, faults = _decode(raw, source, window)
        if image is None or faults:
            judged.faults += faults
        else:
            case_id = f"{number:05d}"
            image_png = encode_png(image.pixels)
            mask_png = None if mask is None else encode_mask(mask)
            case = _case(case_id, raw, image, image_png, mask_png, patients)
            for remark in image.notes:
                judged.remarks[remark].append(raw.image)
            first, its_case = first_with.setdefault(case.image_sha256, (raw, case))
            if {its_case.role, case.role} == {"pair", "background"}:
                detail = f"the same picture as {first.image}: one of the two says that it shows no lesion"
                judged.faults.append(Fault(pointer=raw.image, detail=detail))
            elif first != raw:
                judged.remarks[_same_picture(its_case, case)].append(raw.image)
            if mask is not None and its_case.mask_sha256 != case.mask_sha256:
                other = _decode(first, source, window)[1]
                if other is not None and not (mask & other).any():
                    detail = f"the same picture as {first.image}, with a mask elsewhere: give one picture all its masks"
                    judged.faults.append(Fault(pointer=raw.image, detail=detail))
            judged.cases.append(case)
            keep(case_id, "image", image_png)
            if mask_png is not None:
                keep(case_id, "mask", mask_png)
        progress(number + 1, len(raw_cases))
    if layout is not None:
        judged.remarks |= _left_out(source, listing)
        judged.faults += _too_few(judged.count("pair"), judged.count("background"))
    return judged


def _same_picture(first: Case, case: Case) -> str:
    if first.mask_sha256 != case.mask_sha256:
        return "the same picture as another of the dataset with another mask: the first is used"
    return "the same picture as another of the dataset"


def _case(
    case_id: str, raw: RawCase, image: DecodedImage, image_png: bytes, mask_png: bytes | None, patients: dict[str, str]
) -> Case:
    width, height = image.size
    return Case(
        id=case_id,
        patient=None if raw.patient is None else patients.setdefault(raw.patient, f"{len(patients):05d}"),
        role=raw.role,
        width=width,
        height=height,
        channels=1 if image.pixels.shape[2] == 1 else 3,
        image_sha256=sha256_hex(image_png),
        mask_sha256=None if mask_png is None else sha256_hex(mask_png),
    )


def _decode(raw: RawCase, source: Files, window: Window | None) -> tuple[DecodedImage | None, Mask | None, list[Fault]]:
    """A case's image, its merged mask where it is a pair, and every fault of both."""
    faults: list[Fault] = []
    image: DecodedImage | None = None
    try:
        data = source[raw.image]
        with _DECODING:
            image = decode_image(data, window)
    except (PixelError, UnreadableFile) as error:
        faults.append(Fault(pointer=raw.image, detail=str(error)))
    masks: list[Mask] = []
    for name in raw.masks:
        try:
            data = source[name]
            with _DECODING:
                mask = decode_mask(data)
        except (PixelError, UnreadableFile) as error:
            faults.append(Fault(pointer=name, detail=str(error)))
            continue
        masks.append(mask)
        if image is not None and (mask.shape[1], mask.shape[0]) != image.size:
            faults.append(Fault(pointer=name, detail=_size_differs(mask, image)))
    if not masks or len(masks) < len(raw.masks) or len({mask.shape for mask in masks}) > 1:
        return image, None, faults
    if image is not None and image.orientation > 1 and image.unturned == image.size and raw.role == "pair":
        detail = "turned by its EXIF orientation, and no size tells whether its mask is: save the image upright"
        faults.append(Fault(pointer=raw.image, detail=detail))
    merged = merge(masks)
    faults += [Fault(pointer=raw.masks[0], detail=detail) for detail in _coverage(merged, raw.role)]
    return image, merged if raw.role == "pair" else None, faults


def _coverage(mask: Mask, role: Role) -> Iterator[str]:
    """What is wrong with where a mask is True."""
    if role == "background" and mask.any():
        yield "shows a lesion in a lesion-free class"
    elif role == "pair" and not mask.any():
        yield "empty: it marks no lesion"
    elif role == "pair" and mask.all():
        yield "white all over: it leaves no background"


def _size_differs(mask: Mask, image: DecodedImage) -> str:
    width, height = image.size
    detail = f"{mask.shape[1]}x{mask.shape[0]} beside an image of {width}x{height}"
    turned = image.unturned != image.size and image.unturned == (mask.shape[1], mask.shape[0])
    return detail + (" (upright, as its EXIF orientation says; the mask is not)" if turned else "")


def _other_formats(source: Files) -> list[Fault]:
    return [
        Fault(pointer=path, detail=f"{name} is not read; export it as 8-bit PNG")
        for path in source
        for name, endings in _OTHER_FORMATS.items()
        if path.lower().endswith(endings)
    ]


def _window(source: Files, faults: list[Fault]) -> Window | None:
    """The window that the dataset records for grey of more than 8 bits, in the ``window.json`` nearest its top."""
    paths = sorted((p for p in source if PurePosixPath(p).name == WINDOW_FILE), key=lambda p: p.count("/"))
    if not paths:
        return None
    try:
        value = json.loads(source[paths[0]])
        low, high = value["low"], value["high"]
        if type(low) is int and type(high) is int and low < high:
            return Window(low, high)
    except (ValueError, KeyError, TypeError, RecursionError, UnreadableFile):
        pass
    faults.append(Fault(pointer=paths[0], detail='expected {"low": integer, "high": larger integer}'))
    return None


def _left_out(source: Files, listing: Listing) -> dict[str, list[str]]:
    used = {path for raw in listing.cases for path in (raw.image, *raw.masks)}
    used |= {fault.pointer for fault in listing.faults}
    left_out = [path for path in source if is_image(path) and path not in used]
    return {"images outside the layout, left out": left_out} if left_out else {}


def _too_few(pairs: int, backgrounds: int) -> list[Fault]:
    """Lesion-free images alone are a dataset too: backgrounds for ``POST /generate``."""
    if pairs >= MIN_PAIRS or (pairs == 0 and backgrounds > 0):
        return []
    return [Fault(pointer="/", detail=f"{pairs} pair{'s' * (pairs != 1)}; at least {MIN_PAIRS} are needed")]


class _Spool:
    """PNGs that wait in a file until all are judged."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._limit = file, limit
        self._places: dict[tuple[str, str], tuple[int, int]] = {}

    def keep(self, case: str, what: What, png: bytes) -> None:
        place = self._file.seek(0, os.SEEK_END)
        if place + len(png) > self._limit:
            raise ProblemError(
                "too-large", f"the dataset's pictures, as PNG, have more than the {self._limit} bytes that one may have"
            )
        self._places[case, what] = (place, len(png))
        self._file.write(png)

    def get(self, case: str, what: What) -> bytes:
        offset, size = self._places[case, what]
        self._file.seek(offset)
        return self._file.read(size)
