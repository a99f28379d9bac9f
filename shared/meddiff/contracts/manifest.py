"""The manifest: every synthetic pair, where it came from, and what was turned away."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from meddiff.contracts.base import Contract, DatasetId, JobId, ModelId, Sha256, Stored
from meddiff.contracts.recipes import Recipe

Reason = Literal["too_far", "copy", "flat", "empty_shape", "duplicate_shape"]


class Picture(Contract):
    """A stored PNG. ``uri`` is a link of the API that never expires; ``key`` its object key under the tenant."""

    uri: str
    key: str
    sha256: Sha256
    width: int
    height: int


class Label(Picture):
    """The delivered mask: the shape eroded by ``eroded_px`` pixels."""

    eroded_px: int


class Window(Contract):
    """The square the inpainter worked in, in pixels of the image; it may reach beyond the image's edge."""

    top: int
    left: int
    side: int


class Background(Contract):
    """Which case lies behind the pair: the digest of its stored image, and whether its lesion was repaired away."""

    sha256: Sha256
    repaired: bool


class Scores(Contract):
    """Cosine similarities of lesion crops in [-1, 1] and the band they were judged by.

    ``nearest_real``: highest similarity to a real crop; ``nearest_sha256``: that case's image; ``mean_real``: mean over
    all real crops; ``margin``: nearest minus second nearest; ``band``: lowest and highest ``nearest_real`` accepted.
    """

    nearest_real: float
    nearest_sha256: Sha256
    mean_real: float
    margin: float
    band: tuple[float, float]


class Pair(Contract):
    """One accepted synthetic pair. ``donor``: the digest of the image whose lesion a composite start fits into the
    shape, and shows where the recipe paints lightly; None where painting starts from noise."""

    index: int
    seed: int
    image: Picture
    label: Label
    shape: Picture
    guide: Picture
    window: Window
    background: Background
    donor: Sha256 | None = None
    scores: Scores
    outside_guide_max_diff: Annotated[int, Field(ge=0, le=255)]
    synthetic: Literal[True] = True


class Rejected(Contract):
    """A candidate that was turned away, and why."""

    index: int
    reason: Reason
    scores: Scores | None = None


class Counts(Contract):
    """Counts run to the N-th accepted index."""

    requested: int
    generated: int
    accepted: int
    rejected: dict[Reason, int]


class Component(Contract):
    """A network that had a part in it: the source it came from and the digest of its weights."""

    source: str
    sha256: Sha256


class Manifest(Stored):
    """``GET /jobs/{id}/manifest``. ``release_class`` is ``internal`` while any pair shows a patient's own pixels: all
    do, outside the guide, and those of a composite start inside it too."""

    job_id: JobId
    model_id: ModelId
    dataset_id: DatasetId
    created_at: datetime
    software_version: str
    fingerprint: dict[str, str]
    foundation: Component
    inpainter: Component
    encoder: Component
    recipe: Recipe
    request: dict[str, Any]
    cases: tuple[Sha256, ...]
    release_class: Literal["internal", "synthetic"]
    counts: Counts
    pairs: tuple[Pair, ...]
    rejected: tuple[Rejected, ...]
    next_start_index: int
