"""Mask sampling: for each candidate a shape, the background it lies on, and the guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from meddiff.contracts.dataset import Case
from meddiff.contracts.tasks import Stage
from meddiff.importing import load_dataset, mask_png
from meddiff.importing.pixels import encode_mask
from meddiff.science import geometry, mask_generator
from meddiff.seeds import derive
from meddiff.store.keys import ModelKeys

from meddiff_services.candidates import Candidate, shard_indices
from meddiff_services.cases import Masks, training_cases
from meddiff_services.loading import device, fetch_folder, fingerprint
from meddiff_services.pictures import Mask, decode_mask
from meddiff_services.worker import Outcome, Work

COARSE = (64, 64)
"""Where an old lesion lies, in the frame of the whole image: fine enough to choose a background by."""
COVERING = 5
"""Among how many backgrounds whose old lesion a shape covers best one is drawn."""


@dataclass(frozen=True)
class Ground:
    """A possible background: its case, and where a lesion lies on it that has to be covered (``COARSE``), if any."""

    dataset_id: str
    case: Case
    repaired: bool
    lesion: Mask


@dataclass(frozen=True)
class Lesion:
    """Of a real case: the share of the image that its lesion covers, and where it lies (``COARSE``)."""

    area: float
    coarse: Mask

    @classmethod
    def of(cls, mask: Mask) -> Lesion:
        return cls(float(mask.mean()), geometry.resize_mask(mask, COARSE))


def masks(work: Work) -> Outcome:
    """Shapes and guides of a shard, and the background and donor of each."""
    torch.set_num_threads(work.spec.recipe.work.inference_threads)
    recipe = work.spec.recipe
    cases = training_cases(work, work.spec.dataset_id)
    real = Masks.of(work, work.spec.dataset_id, cases)
    pngs = dict(zip((case.image_sha256 for case in cases), real.pngs, strict=True))
    lesions = [Lesion.of(mask) for mask in real]
    donors = [(case, lesion.area) for case, lesion in zip(cases, lesions, strict=True)]
    grounds = _grounds(work, {case.image_sha256: one.coarse for case, one in zip(cases, lesions, strict=True)})
    indices = shard_indices(work)
    seeds = [derive(work.spec.request.seed, "candidate", index) for index in indices]
    shapes = _shapes(work, real, seeds)
    candidates = []
    for index, seed, low in zip(indices, seeds, shapes, strict=True):
        ground = choose_ground(low, grounds, derive(seed, "background"))
        shape = mask_generator.place(low, (ground.case.height, ground.case.width))
        guide = geometry.guide_of(shape, recipe.inpainting.guide_margin, _to_cover(work, ground, pngs))
        work.store.put(work.keys.candidate(index, "shape"), encode_mask(shape), "image/png")
        work.store.put(work.keys.candidate(index, "guide"), encode_mask(guide), "image/png")
        candidates.append(
            Candidate(
                index=index,
                seed=seed,
                dataset_id=ground.dataset_id,
                background=ground.case,
                repaired=ground.repaired,
                donor=choose_donor(shape, donors, derive(seed, "donor")),
                window=geometry.window_around(guide, recipe.inpainting.context),
            )
        )
        work.progress(len(candidates), len(indices), "shapes")
    output = {
        "candidates": [c.model_dump(mode="json") for c in candidates],
        "fingerprint": fingerprint(recipe, work.settings),
    }
    return Outcome(units=len(candidates), output=output)


def _shapes(work: Work, real: Sequence[Mask], seeds: Sequence[int]) -> list[Mask]:
    """Low-resolution shapes: the user's own masks in turn, drawn by the mask DDPM, or geometric where masks are too
    few."""
    settings = work.spec.recipe.mask_generation
    if work.spec.request.masks is not None:
        dataset = load_dataset(work.store, work.tenant, work.spec.request.masks)
        order = np.random.default_rng(derive(work.spec.request.seed, "masks")).permutation(len(dataset.pairs))
        chosen = [dataset.pairs[order[index % len(order)]] for index in shard_indices(work)]
        return list(Masks.of(work, dataset.id, chosen))
    if len(real) < settings.min_masks:
        return [mask_generator.geometric(real, derive(seed, "shape")) for seed in seeds]
    keys = ModelKeys(work.tenant, work.spec.model_id)
    folder = work.model_scratch / "mask_generator"
    fetch_folder(work.store, keys.file("mask_generator") + "/", folder, "config.json")
    unet = mask_generator.load(folder, device(work.settings))
    return mask_generator.sample(unet, work.spec.recipe, [derive(seed, "shape") for seed in seeds], real)


def _grounds(work: Work, own: Mapping[str, Mask]) -> list[Ground]:
    """Backgrounds to choose from: real lesion-free images; without them repaired ones, or the pairs to be covered,
    which go with lesion-free ones that are few. ``own``: the lesion of each training case (``COARSE``) by the digest of
    its image."""
    dataset_id = work.spec.request.backgrounds or work.spec.dataset_id
    dataset = load_dataset(work.store, work.tenant, dataset_id)
    nothing = np.zeros(COARSE, np.bool_)
    lesion_free = [Ground(dataset_id, case, False, nothing) for case in dataset.backgrounds]
    given, repaired = work.spec.request.backgrounds is not None, work.spec.recipe.inpainting.background == "repair"
    if lesion_free and (given or repaired or len(lesion_free) >= COVERING):
        return lesion_free
    if given:
        covered = zip(dataset.pairs, Masks.of(work, dataset_id, dataset.pairs), strict=True)
        return [Ground(dataset_id, case, False, Lesion.of(mask).coarse) for case, mask in covered]
    return lesion_free + [
        Ground(dataset_id, case, repaired, nothing if repaired else own[case.image_sha256])
        for case in training_cases(work, dataset_id)
    ]


def _to_cover(work: Work, ground: Ground, pngs: Mapping[str, bytes]) -> Mask | None:
    """The lesion (H, W) that a background shows; ``pngs``: the masks of the training cases by the digest of their
    image."""
    if ground.repaired or ground.case.mask_sha256 is None:
        return None
    own = pngs.get(ground.case.image_sha256) if ground.dataset_id == work.spec.dataset_id else None
    return decode_mask(own or mask_png(work.store, work.tenant, ground.dataset_id, ground.case))


def choose_ground(low: Mask, grounds: Sequence[Ground], seed: int) -> Ground:
    """One of the backgrounds whose old lesion the shape covers best, so that little has to be repaired around it.

    ``low``: shape (h, w) in the frame of the whole image, whatever its size. Lesion-free backgrounds are all alike.
    """
    shape = geometry.resize_mask(low, COARSE)

    def uncovered(ground: Ground) -> float:
        lesion = geometry.resize_mask(ground.lesion, COARSE)
        return float((lesion & ~shape).sum()) / max(1.0, float(shape.sum()))

    if not any(ground.lesion.any() for ground in grounds):
        return grounds[seed % len(grounds)]
    best = sorted(grounds, key=lambda g: (uncovered(g), derive(seed, g.case.id)))[:COVERING]
    return best[seed % len(best)]


def choose_donor(shape: Mask, donors: Sequence[tuple[Case, float]], seed: int) -> Case:
    """A real case whose lesion is stretched least by the shape: one of the half that is nearest in relative area.
    ``donors``: cases, and the share of each that its lesion covers."""
    area = shape.mean()

    def stretch(donor: tuple[Case, float]) -> float:
        return abs(float(np.log((donor[1] + 1e-6) / (area + 1e-6))))

    nearest = sorted(donors, key=lambda d: (stretch(d), d[0].id))[: max(1, len(donors) // 2)]
    return nearest[seed % len(nearest)][0]


STAGES: dict[Stage, Callable[[Work], Outcome]] = {"masks": masks}
