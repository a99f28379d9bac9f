"""What the benchmarks read: a pulled job, and the dataset's own files by the digests a manifest names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.dataset import Role
from meddiff.contracts.manifest import Manifest, Pair
from meddiff.importing.pixels import decode_image, encode_png, merge
from meddiff.importing.pixels import decode_mask as decode_foreign_mask
from meddiff.importing.sources import Folder
from meddiff.layouts import detect
from meddiff_services.pictures import Mask, Pixels, decode_mask, decode_png


@dataclass(frozen=True)
class Case:
    """A real image (H, W, C) and its mask (H, W), all false where there is none; its role in the dataset, and the
    patient where the layout tells."""

    image: Pixels
    mask: Mask
    role: Role
    patient: str | None = None


def cases_by_digest(folder: Path) -> dict[str, Case]:
    """The dataset in ``folder`` by the digests that manifests name: SHA-256 of each image as the service stores it."""
    source = Folder(folder, folder)
    cases = {}
    for raw in detect(source)[1].cases:
        image = decode_image(source[raw.image]).pixels
        masks = [decode_foreign_mask(source[name]) for name in raw.masks]
        mask = merge(masks) if masks else np.zeros(image.shape[:2], np.bool_)
        cases[sha256_hex(encode_png(image))] = Case(image, mask, raw.role, raw.patient)
    return cases


@dataclass(frozen=True)
class Pulled:
    """A folder as ``meddiff pull`` leaves it."""

    folder: Path

    @property
    def manifest(self) -> Manifest:
        return Manifest.model_validate_json((self.folder / "manifest.json").read_bytes())

    def image(self, pair: Pair) -> Pixels:
        return decode_png(self._bytes(pair, "image"))

    def mask(self, pair: Pair, what: str) -> Mask:
        """``what``: shape, guide or label."""
        return decode_mask(self._bytes(pair, what))

    def _bytes(self, pair: Pair, what: str) -> bytes:
        return (self.folder / "pairs" / f"{pair.index:08d}.{what}.png").read_bytes()
