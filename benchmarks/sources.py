"""What the benchmarks read: a pulled job, and the dataset's own files by the digests a manifest names."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from meddiff.contracts.manifest import Manifest, Pair
from meddiff.importing import cases_of, open_folder
from meddiff_services.pictures import Mask, Pixels, decode_mask, decode_png


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
