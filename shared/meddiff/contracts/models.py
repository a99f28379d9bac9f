"""The model card: what a fine-tune leaves behind."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from meddiff.contracts.base import Contract, DatasetId, JobId, ModelId, Sha256, Stored
from meddiff.contracts.manifest import Component
from meddiff.contracts.recipes import Recipe


class ModelCard(Stored):
    """``model.json``, written last: the model exists once it is there. ``training`` holds final losses and speeds,
    ``quality`` the calibrated similarity band (``lesions`` fewer than ``cases`` where some show the same one),
    ``backgrounds`` how many lesion-free images its dataset has; ``fingerprint`` is of the tasks that made it."""

    id: ModelId
    name: str | None = None
    job_id: JobId
    dataset_id: DatasetId
    created_at: datetime
    recipe: Recipe
    foundation: Component
    inpainter: Component
    encoder: Component
    fingerprint: dict[str, str]
    cases: tuple[Sha256, ...]
    backgrounds: int
    training: dict[str, Any] = {}
    quality: dict[str, Any] = {}
    software_version: str


class ModelList(Contract):
    """A page of models, newest first; ``next`` is the cursor of the following page."""

    models: tuple[ModelCard, ...]
    next: str | None = None
