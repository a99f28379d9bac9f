"""Training tasks: cache latents, train a segment, publish the model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from meddiff import __version__, metrics
from meddiff.contracts.dataset import Case
from meddiff.contracts.manifest import Component
from meddiff.contracts.models import ModelCard
from meddiff.contracts.problems import Fault, ProblemError
from meddiff.contracts.tasks import Marker, Stage
from meddiff.importing import load_dataset
from meddiff.science import finetune, geometry, inpainting, mask_generator
from meddiff.science import foundation as foundations
from meddiff.science.training import StepLog, TrainingState
from meddiff.seeds import derive
from meddiff.store.keys import ModelKeys, model_name
from meddiff.store.objects import NotFound
from safetensors.torch import load_file, save_file

from meddiff_services.cases import Masks, Stored, finetuning_recipe, imported, load, training_cases
from meddiff_services.loading import device, fingerprint, load_encoder, load_foundation, merged_fingerprint
from meddiff_services.pictures import Mask, Pixels, sheet
from meddiff_services.trainer.segmenting import segmenter, stop
from meddiff_services.worker import Outcome, Stopped, Work

KEPT_CHECKPOINTS = 2
PAIRS_IN_MEMORY = 30
UNSEEN = Fault(
    pointer="/recipe/override/foundation/source",
    detail="its U-Net sees no mask, so it cannot tell the lesion from what is repainted as healthy: take an inpainting "
    "model, of 9 channels, or recipe paper, whose guide is the lesion alone",
)
TIME_TAKEN = 0.9  # Of the time a task may take: the rest is for leaving a checkpoint.
MAKING: tuple[Stage, ...] = ("cache", "inpainter", "repair", "mask_generator", "backgrounds")
LATELY = 20  # Steps whose median time says how fast training is.


def cache(work: Work) -> Outcome:
    """Latents, masked-image latents and guides of every variant of every pair, and the prompt embedding: once a job."""
    torch.set_num_threads(work.spec.recipe.work.training_threads)
    dataset_id = imported(work)
    read = lru_cache(maxsize=PAIRS_IN_MEMORY)(partial(_pair, work, dataset_id))
    pairs = Stored(work, [partial(read, case) for case in training_cases(work, dataset_id)])
    dataset = load_dataset(work.store, work.tenant, dataset_id)
    backgrounds = Stored(work, [partial(_image, work, dataset_id, case) for case in dataset.backgrounds])
    recipe = finetuning_recipe(work)
    model = load_foundation(recipe.foundation, work.settings, work.store)
    if not (model.sees_the_mask or recipe.finetuning.lesions_alone):
        raise ProblemError("invalid-request", f"{recipe.foundation.source} does not suit the recipe", [UNSEEN])
    begun = time.monotonic()
    tensors = finetune.build_cache(
        model,
        pairs,
        backgrounds,
        recipe,
        derive(work.spec.request.split_seed, "cache"),
        lambda done, total: work.progress(
            done, total, "examples", seconds=(time.monotonic() - begun) / done * total / len(pairs)
        ),
    )
    path = _cache_file(work)
    _save(tensors, path)
    work.store.upload_file(work.keys.cache, path)
    return Outcome(units=len(pairs), output={"fingerprint": fingerprint(recipe, work.settings)})


def _pair(work: Work, dataset_id: str, case: Case) -> tuple[Pixels, Mask]:
    pair = load(work, dataset_id, case)
    return pair.image, pair.mask


def _image(work: Work, dataset_id: str, case: Case) -> Pixels:
    return load(work, dataset_id, case).image


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Whole or not at all: another task of this machine may read it."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def _cache_file(work: Work) -> Path:
    return work.scratch / "latents.safetensors"


def _cached(work: Work) -> dict[str, torch.Tensor]:
    path = _cache_file(work)
    if not path.exists():
        work.store.download_file(work.keys.cache, path)
    return load_file(path)


def _segment(work: Work, part: Stage, steps: int, segment_steps: int, train: Train) -> tuple[TrainingState, Outcome]:
    """Train steps [start, stop) of ``part`` from the newest checkpoint there is of them, and leave the next one. A
    worker that is asked to leave within it, or whose time for a task is nearly over, leaves a checkpoint of where it
    is."""
    torch.set_num_threads(work.spec.recipe.work.training_threads)
    start = work.shard * segment_steps
    stop = min(start + segment_steps, steps)
    begun = _newest_checkpoint(work, part, range(start, stop + 1))
    log = [entry for entry in _stored_log(work, part) if entry.step <= begun] if begun > start else []

    entered = time.monotonic()

    def should_stop() -> bool:
        return work.should_stop() or time.monotonic() - entered > TIME_TAKEN * work.settings.task_seconds

    def on_step(entry: StepLog) -> None:
        log.append(entry)
        metrics.TRAINING_STEPS.labels(part).inc()
        metrics.TRAINING_LOSS.labels(part).set(entry.loss)
        lately = float(np.median([one.seconds for one in log[-LATELY:]]))
        work.tell(entry.step, steps, "steps", loss=entry.loss, learning_rate=entry.learning_rate, seconds=lately)

    try:
        state = train(_load_checkpoint(work, part, begun) if begun else None, stop, on_step, should_stop)
    except FloatingPointError:
        metrics.TRAININGS_DIVERGED.labels(part).inc()
        raise
    left_alone = not work.should_stop() or work.leaving
    if state.step > begun and (state.step == stop or left_alone):
        work.store.put(work.keys.training_log(part, work.shard), _log_lines(log), "application/x-ndjson")
        _save_checkpoint(work, part, state)
    if state.step != stop:
        work.log.info("segment left", part=part, step=state.step, of=stop)
        raise Stopped
    losses = [entry.loss for entry in log]
    work.log.info(
        "segment trained",
        part=part,
        step=stop,
        loss=round(float(np.mean(losses)), 5),
        learning_rate=log[-1].learning_rate,
        seconds_per_step=round(float(np.median([entry.seconds for entry in log])), 4),
        memory_bytes=log[-1].memory_bytes,
    )
    output = {
        "step": stop,
        "mean_loss": float(np.mean(losses)),
        "fingerprint": fingerprint(work.spec.recipe, work.settings),
    }
    return state, Outcome(units=stop - start, output=output)


Train = Callable[[TrainingState | None, int, Callable[[StepLog], None], Callable[[], bool]], TrainingState]


def _stored_log(work: Work, part: Stage) -> list[StepLog]:
    try:
        lines = work.store.get(work.keys.training_log(part, work.shard)).splitlines()
    except NotFound:
        return []
    return [StepLog(**json.loads(line)) for line in lines]


def _log_lines(log: list[StepLog]) -> bytes:
    return b"".join(json.dumps(vars(entry)).encode() + b"\n" for entry in log)


def _checkpoint_file(work: Work, part: Stage, step: int) -> Path:
    return work.scratch / f"{part}.{step:08d}.safetensors"


def _newest_checkpoint(work: Work, part: Stage, steps: range) -> int:
    """The step to go on from: of the checkpoints within ``steps`` the newest, else the first step."""
    stored = [int(step) for step in work.store.children(work.keys.checkpoints(part))]
    return max([steps.start, *(step for step in stored if step in steps)])


def _load_checkpoint(work: Work, part: Stage, step: int) -> TrainingState:
    path = _checkpoint_file(work, part, step)
    try:
        return TrainingState.from_tensors(load_file(path))
    except FileNotFoundError:  # Of another worker, or tidied away.
        work.store.download_file(work.keys.checkpoint(part, step, "state.safetensors"), path)
        return TrainingState.from_tensors(load_file(path))


def _save_checkpoint(work: Work, part: Stage, state: TrainingState) -> None:
    """Upload the checkpoint; keep the newest two in the store and the newest on this disk, which never holds two: of
    Stable Diffusion one is 13 GiB."""
    path = _checkpoint_file(work, part, state.step)
    for old in path.parent.glob(f"{part}.*.safetensors"):
        old.unlink(missing_ok=True)
    _save(state.to_tensors(), path)
    work.store.upload_file(work.keys.checkpoint(part, state.step, "state.safetensors"), path)
    stored = sorted(work.store.list(work.keys.checkpoints(part)))
    work.store.delete(stored[:-KEPT_CHECKPOINTS])


def inpainter(work: Work) -> Outcome:
    """A segment of the guided inpainter (eq. 1), and pictures of what it paints so far."""
    state, outcome = _diffusion_segment(work, "inpainter")
    _preview_inpainter(work, state)
    return outcome


def repair(work: Work) -> Outcome:
    """A segment of the paper's second U-Net, on inverted masks."""
    return _diffusion_segment(work, "repair")[1]


def _diffusion_segment(work: Work, part: Stage) -> tuple[TrainingState, Outcome]:
    recipe = work.spec.recipe
    cached = _cached(work)
    model = load_foundation(recipe.foundation, work.settings, work.store)

    def train(
        state: TrainingState | None, stop: int, on_step: Callable[[StepLog], None], should_stop: Callable[[], bool]
    ) -> TrainingState:
        seed = derive(work.spec.request.split_seed, "finetune")
        return finetune.train(model, cached, recipe, seed, part, state, stop, on_step, should_stop)

    return _segment(work, part, recipe.finetuning.steps, recipe.finetuning.segment_steps, train)


def _preview_inpainter(work: Work, state: TrainingState) -> None:
    """Lesions painted into a few training images where their masks say, with the averaged weights so far."""
    recipe = finetuning_recipe(work)
    count = recipe.finetuning.preview_pairs
    if count == 0:
        return
    dataset_id = imported(work)
    cases = [load(work, dataset_id, case) for case in training_cases(work, dataset_id)[:count]]
    model = load_foundation(recipe.foundation, work.settings, work.store)
    model.unet.load_state_dict(state.ema)
    canvases = []
    for n, here in enumerate(cases):
        guide = geometry.guide_of(here.mask, recipe.inpainting.guide_margin)
        donor = cases[n - 1]
        start = inpainting.fit_lesion(here.image, here.mask, guide, donor.image, donor.mask, cover=here.mask)
        canvases.append(inpainting.Canvas(here.image, here.mask, guide, start, derive("preview", n)))
    painted = inpainting.inpaint(model, canvases, recipe, work.should_stop)
    work.raise_if_stopped()
    rows: list[list[Pixels | np.ndarray]] = [
        [here.image, here.mask, image] for here, image in zip(cases, painted, strict=True)
    ]
    png = sheet(rows, ["real", "shape", f"painted, step {state.step}"])
    work.store.put(work.keys.preview(work.shard, "inpainter"), png, "image/png")


def mask_generator_segment(work: Work) -> Outcome:
    """A segment of the mask DDPM, and after the last one shapes that it draws."""
    recipe = work.spec.recipe
    dataset_id = imported(work)
    masks = Masks.of(work, dataset_id, training_cases(work, dataset_id))
    where = device(work.settings)

    def train(
        state: TrainingState | None, stop: int, on_step: Callable[[StepLog], None], should_stop: Callable[[], bool]
    ) -> TrainingState:
        seed = derive(work.spec.request.split_seed, "mask_generator")
        return mask_generator.train(masks, recipe, seed, state, stop, on_step, should_stop, where)

    settings = recipe.mask_generation
    state, outcome = _segment(work, "mask_generator", settings.steps, settings.segment_steps, train)
    if state.step == settings.steps:
        unet = mask_generator.build(settings).to(where)
        unet.load_state_dict(state.ema)
        shapes = mask_generator.sample(unet, recipe, [derive("preview", n) for n in range(16)], masks)
        png = sheet([shapes[n : n + 8] for n in range(0, 16, 8)], ["shapes", *[""] * 7], side=64)
        work.store.put(work.keys.preview(work.shard, "shapes"), png, "image/png")
    return outcome


def publish(work: Work) -> Outcome:
    """Assemble the model: a diffusers folder, the mask generator beside it, and its card last."""
    started = time.monotonic()
    recipe = finetuning_recipe(work)
    keys = ModelKeys(work.tenant, work.spec.model_id)
    dataset_id = imported(work)
    dataset = load_dataset(work.store, work.tenant, dataset_id)
    cases = training_cases(work, dataset_id)
    folder = work.scratch / "model"
    base = load_foundation(recipe.foundation, work.settings, work.store)
    foundation = Component(source=recipe.foundation.source, sha256=base.sha256)
    finetuning = recipe.finetuning
    base.unet.load_state_dict(_load_checkpoint(work, "inpainter", finetuning.steps).ema)
    foundations.save(base, folder)
    if recipe.has_second_unet(len(dataset.backgrounds)):
        base.unet.load_state_dict(_load_checkpoint(work, "repair", finetuning.steps).ema)
        base.unet.save_pretrained(folder / "repair_unet")
    if len(cases) >= recipe.mask_generation.min_masks:
        masks = mask_generator.build(recipe.mask_generation)
        masks.load_state_dict(_load_checkpoint(work, "mask_generator", recipe.mask_generation.steps).ema)
        masks.save_pretrained(folder / "mask_generator")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for n, path in enumerate(files):
        work.store.upload_file(keys.file(*path.relative_to(folder).parts), path)
        work.progress(n + 1, len(files), "files")
    encoder = load_encoder(recipe.quality, work.settings, work.store)
    segments: list[Stage] = ["inpainter", "mask_generator", "repair"]
    card = ModelCard(
        id=work.spec.model_id,
        name=work.spec.request.name,
        job_id=work.spec.id,
        dataset_id=dataset_id,
        created_at=datetime.now(UTC),
        recipe=recipe,
        foundation=foundation,
        inpainter=Component(source=f"job {work.spec.id}", sha256=foundations.digest(folder / "unet")),
        encoder=Component(source=encoder.source, sha256=encoder.sha256),
        fingerprint=merged_fingerprint(marker for stage in MAKING for marker in work.markers(stage)),
        cases=tuple(case.image_sha256 for case in cases),
        backgrounds=len(dataset.backgrounds),
        training={stage: _training_summary(work.markers(stage)) for stage in segments if work.markers(stage)},
        quality=work.marker("calibrate", 0).output,
        software_version=__version__,
    )
    work.raise_if_ended()
    work.store.put(keys.card, card.model_dump_json().encode(), "application/json")
    if work.spec.request.name is not None:
        _name(work, work.spec.request.name)
    work.log.info("model published", seconds=round(time.monotonic() - started, 1))
    return Outcome(units=1, output={"model_id": work.spec.model_id, "inpainter_sha256": card.inpainter.sha256})


def _name(work: Work, name: str) -> None:
    """Gives the model its name, unless a fine-tune that was asked for later has it already."""
    key = model_name(work.tenant, name)
    with suppress(NotFound, ValueError):  # A card of another version holds no name against this one.
        holder = ModelKeys(work.tenant, json.loads(work.store.get(key))["model_id"])
        if work.store.get_json(holder.card, ModelCard).job_id > work.spec.id:
            return
    work.store.put(key, json.dumps({"model_id": work.spec.model_id}).encode(), "application/json")


def _training_summary(markers: list[Marker]) -> dict[str, float]:
    steps = sum(m.units for m in markers)
    return {
        "steps": steps,
        "mean_loss_last_segment": markers[-1].output["mean_loss"],
        "seconds_per_step": round(sum(m.seconds for m in markers) / steps, 4),
    }


for _part in ("inpainter", "repair", "mask_generator"):
    metrics.TRAININGS_DIVERGED.labels(_part)

STAGES: dict[Stage, Callable[[Work], Outcome]] = {
    "cache": cache,
    "inpainter": inpainter,
    "repair": repair,
    "mask_generator": mask_generator_segment,
    "publish": publish,
    "stop": stop,
    "segmenter": segmenter,
}
