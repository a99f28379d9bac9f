"""A dataset as it is stored: cases in one form, whatever layout they came in."""

from __future__ import annotations

from typing import Literal

from meddiff.contracts.base import Contract, DatasetId, Sha256, Stored, canonical_json, sha256_hex
from meddiff.contracts.problems import Fault

Role = Literal["pair", "background", "unlabelled"]


class Case(Contract):
    """One image and, for role ``pair``, its mask.

    ``id`` is a zero-padded running number ("00017"); the user's file names are not kept. ``patient`` is an opaque
    number that groups images of one patient where the layout tells. Images are stored as 8-bit PNG (mode L or RGB),
    masks as 8-bit PNG (mode L, values 0 and 255). The digests are of the stored PNG bytes.
    """

    id: str
    patient: str | None = None
    role: Role
    width: int
    height: int
    channels: Literal[1, 3]
    image_sha256: Sha256
    mask_sha256: Sha256 | None = None


class Dataset(Stored):
    """``dataset.json``: what was imported, from which layout, and what was noticed on the way."""

    id: DatasetId
    layout: str
    cases: tuple[Case, ...]
    prompt: str | None = None
    notes: tuple[str, ...] = ()

    def summary(self) -> DatasetSummary:
        roles = [c.role for c in self.cases]
        return DatasetSummary(
            id=self.id,
            layout=self.layout,
            pairs=roles.count("pair"),
            backgrounds=roles.count("background"),
            unlabelled=roles.count("unlabelled"),
            notes=self.notes,
        )

    @property
    def pairs(self) -> tuple[Case, ...]:
        return tuple(c for c in self.cases if c.role == "pair")

    @property
    def backgrounds(self) -> tuple[Case, ...]:
        return tuple(c for c in self.cases if c.role == "background")


class DatasetSummary(Contract):
    """A dataset by its counts: what an upload and ``GET /datasets`` answer."""

    id: DatasetId
    layout: str
    pairs: int
    backgrounds: int
    unlabelled: int
    notes: tuple[str, ...] = ()


class DatasetList(Contract):
    """A page of the tenant's datasets, in order of id; ``next`` is the cursor of the following page."""

    datasets: tuple[DatasetSummary, ...]
    next: str | None = None


def dataset_id_of(cases: tuple[Case, ...] | list[Case], prompt: str | None = None) -> DatasetId:
    """The hash of the list of cases, and of the prompt where the data brings one: the same data imported twice is the
    same dataset."""
    listed: list[object] = [c.model_dump(mode="json") for c in cases]
    return "ds_" + sha256_hex(canonical_json(listed if prompt is None else [*listed, prompt]))[:32]


class ValidationReport(Contract):
    """Answer of ``POST /datasets/validate``: every fault at once; ``dataset`` only where there is none."""

    valid: bool
    layout: str | None
    pairs: int
    backgrounds: int
    unlabelled: int
    errors: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    dataset_id: DatasetId | None = None
