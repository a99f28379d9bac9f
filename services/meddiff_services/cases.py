"""The cases of a job as arrays: what every stage reads first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from meddiff.contracts.dataset import Case
from meddiff.importing import load_case, load_dataset, select_cases

from meddiff_services.pictures import Mask, Pixels
from meddiff_services.worker import Work


@dataclass(frozen=True)
class Loaded:
    """A case and its pixels: image (H, W, C) uint8, mask (H, W), all false for a lesion-free image."""

    dataset_id: str
    case: Case
    image: Pixels
    mask: Mask


def load(work: Work, dataset_id: str, case: Case) -> Loaded:
    """One case from the store."""
    image, mask = load_case(work.store, work.tenant, dataset_id, case)
    return Loaded(dataset_id, case, image, mask if mask is not None else np.zeros(image.shape[:2], np.bool_))


def imported(work: Work) -> str:
    """Id of the dataset a fine-tune imported."""
    return str(work.marker("import", 0).output["dataset_id"])


def training_cases(work: Work, dataset_id: str) -> tuple[Case, ...]:
    """The pairs a fine-tune learns from: a function of dataset, ``max_pairs`` and ``split_seed``."""
    request = work.spec.request
    max_pairs = getattr(request, "max_pairs", None) or work.spec.recipe.max_pairs
    dataset = load_dataset(work.store, work.tenant, dataset_id)
    return select_cases(dataset, max_pairs, getattr(request, "split_seed", 0))
