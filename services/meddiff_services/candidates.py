"""What a candidate is made of: decided by its index and the job's seed, before a pixel is painted."""

from __future__ import annotations

import numpy as np
from meddiff.contracts.base import Contract, DatasetId
from meddiff.contracts.dataset import Case
from meddiff.contracts.manifest import Window
from meddiff.science import inpainting
from meddiff.store.keys import ModelKeys

from meddiff_services.cases import Job, Loaded, load
from meddiff_services.pictures import Mask, Pixels, decode_png
from meddiff_services.worker import Work


class Candidate(Contract):
    """One entry of a ``masks`` marker: the seed of candidate ``index``, the background below it, the case whose lesion
    the composite starts from, and the window the inpainter works in."""

    index: int
    seed: int
    dataset_id: DatasetId
    background: Case
    repaired: bool
    donor: Case
    window: Window


def shard_indices(work: Work) -> range:
    """Indices of the shard in hand: always a full one."""
    size = work.spec.recipe.work.shard_size
    first = work.spec.request.start_index + work.shard * size
    return range(first, first + size)


def drawn(work: Work) -> list[Candidate]:
    """The shard's candidates as its ``masks`` task decided them."""
    return [Candidate.model_validate(c) for c in work.marker("masks", work.shard).output["candidates"]]


def ground_of(work: Job, candidate: Candidate) -> Loaded:
    """The picture below the lesion and the old lesion in it: the case itself, or the model's repaired copy of it, which
    has none."""
    if not candidate.repaired:
        return load(work, candidate.dataset_id, candidate.background)
    image = decode_png(work.store.get(ModelKeys(work.tenant, work.spec.model_id).background(candidate.background.id)))
    return Loaded(candidate.dataset_id, candidate.background, image, np.zeros(image.shape[:2], np.bool_))


def composite(work: Job, candidate: Candidate, ground: Loaded, shape: Mask, guide: Mask) -> Pixels:
    """The donor's lesion fitted into the shape on the ground, colours matched: what painting starts from."""
    donor = load(work, work.spec.dataset_id, candidate.donor)
    return inpainting.fit_lesion(ground.image, shape, guide, donor.image, donor.mask, cover=ground.mask)
