"""Guided inpainting: lesions into backgrounds (eq. 2), and, for the paper's recipe, lesions out of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from meddiff.contracts.tasks import Stage
from meddiff.importing.pixels import encode_png
from meddiff.science import inpainting
from meddiff.science.foundation import Foundation
from meddiff.science.training import TrainingState
from meddiff.seeds import derive
from meddiff.store.keys import ModelKeys
from safetensors.torch import load_file

from meddiff_services.candidates import Candidate, composite, drawn, ground_of
from meddiff_services.cases import finetuning_recipe, imported, load, training_cases
from meddiff_services.loading import fetch_folder, fingerprint, load_foundation, load_model
from meddiff_services.pictures import decode_mask
from meddiff_services.worker import Outcome, Work


def inpaint(work: Work) -> Outcome:
    """Images of a shard: each lesion painted where its shape says, nothing else changed."""
    recipe = work.spec.recipe
    torch.set_num_threads(recipe.work.inference_threads)
    candidates, model, at_once = drawn(work), _model(work), recipe.inpainting.batch_size
    for first in range(0, len(candidates), at_once):  # A batch in memory at a time.
        some = candidates[first : first + at_once]
        canvases = []
        for candidate in some:
            canvases.append(_canvas(work, candidate))
            work.raise_if_stopped()
        images = inpainting.inpaint(model, canvases, recipe, work.should_stop)
        work.raise_if_stopped()
        for candidate, image in zip(some, images, strict=True):
            work.store.put(work.keys.candidate(candidate.index, "image"), encode_png(image), "image/png")
        work.tell(first + len(some), len(candidates), "pairs")
    return Outcome(units=len(candidates), output={"fingerprint": fingerprint(recipe, work.settings)})


def _model(work: Work) -> Foundation:
    keys = ModelKeys(work.tenant, work.spec.model_id)
    folder = work.model_scratch / "folder"
    fetch_folder(work.store, keys.root + "/", folder, "model.json")
    return load_model(folder, work.spec.recipe, work.settings)


def _canvas(work: Work, candidate: Candidate) -> inpainting.Canvas:
    ground = ground_of(work, candidate)
    shape = decode_mask(work.store.get(work.keys.candidate(candidate.index, "shape")))
    guide = decode_mask(work.store.get(work.keys.candidate(candidate.index, "guide")))
    start = composite(work, candidate, ground, shape, guide) if work.spec.recipe.inpainting.strength < 1 else None
    return inpainting.Canvas(ground.image, shape, guide, start, derive(candidate.seed, "noise"))


def backgrounds(work: Work) -> Outcome:
    """Lesion-free backgrounds of the model: the lesions of a shard of training cases repaired away."""
    recipe = finetuning_recipe(work)
    torch.set_num_threads(recipe.work.inference_threads)
    dataset_id = imported(work)
    size = recipe.work.shard_size
    cases = training_cases(work, dataset_id)[work.shard * size : (work.shard + 1) * size]
    model = load_foundation(recipe.foundation, work.settings, work.store)
    model.unet.load_state_dict(_averaged(work))
    keys = ModelKeys(work.tenant, work.spec.model_id)
    at_once = recipe.inpainting.batch_size
    for first in range(0, len(cases), at_once):
        some = [load(work, dataset_id, case) for case in cases[first : first + at_once]]
        seeded = [(one.image, one.mask, derive("repair", one.case.image_sha256)) for one in some]
        for one, image in zip(some, inpainting.repair(model, seeded, recipe), strict=True):
            work.store.put(keys.background(one.case.id), encode_png(image), "image/png")
        work.progress(first + len(some), len(cases), "backgrounds")
        work.raise_if_stopped()
    return Outcome(units=len(cases), output={"fingerprint": fingerprint(recipe, work.settings)})


def _averaged(work: Work) -> dict[str, torch.Tensor]:
    """Averaged weights of the U-Net that repairs: the paper's second one, or the one that does both."""
    finetuning = work.spec.recipe.finetuning
    part = "repair" if finetuning.separate_repair else "inpainter"
    path = work.scratch / f"{part}.{finetuning.steps:08d}.safetensors"
    if not path.exists():
        work.store.download_file(work.keys.checkpoint(part, finetuning.steps, "state.safetensors"), path)
    return TrainingState.from_tensors(load_file(path)).ema


STAGES: dict[Stage, Callable[[Work], Outcome]] = {"inpainting": inpaint, "backgrounds": backgrounds}
