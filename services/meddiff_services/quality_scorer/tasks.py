"""Judging pairs: those that come in (import, calibration) and those that were made (scores, labels, the manifest)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import get_args

import numpy as np
import torch
from meddiff import __version__, metrics, signatures
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.dataset import Dataset
from meddiff.contracts.jobs import EvaluateSpec, FinetuneSpec
from meddiff.contracts.manifest import (
    Background,
    Counts,
    Label,
    Manifest,
    Pair,
    Picture,
    Reason,
    Rejected,
    Scores,
)
from meddiff.contracts.problems import Fault, ProblemError
from meddiff.contracts.recipes import with_prompt
from meddiff.contracts.tasks import Stage
from meddiff.importing import chosen_cases, import_dataset, is_dataset_id, load_dataset, open_source
from meddiff.importing.pixels import encode_mask
from meddiff.planning import selection
from meddiff.science import erosion, quality
from meddiff.store.keys import ModelKeys

from meddiff_services.candidates import Candidate, drawn, ground_of
from meddiff_services.cases import imported, load, model_card, training_cases
from meddiff_services.loading import load_encoder, merged_fingerprint
from meddiff_services.pictures import Mask, Pixels, decode_mask, decode_png, overlay, sheet, tile
from meddiff_services.quality_scorer.reporting import report
from meddiff_services.quality_scorer.splitting import split
from meddiff_services.worker import Outcome, Work

SHEET_PAIRS = 100
SHEET_PX = 112


def import_(work: Work) -> Outcome:
    """Read, judge and store the dataset; every fault ends the job before any training."""
    spec: FinetuneSpec | EvaluateSpec = work.spec
    dataset = _dataset(work, spec.request.dataset_uri)
    try:
        with_prompt(spec.recipe, spec.request.recipe.override, dataset.prompt)
    except ValueError:
        fault = Fault(pointer="data.json", detail="its prompt is empty or longer than the recipe takes")
        raise ProblemError("invalid-dataset", "1 fault in the dataset", [fault]) from None
    output = {
        "dataset_id": dataset.id,
        "layout": dataset.layout,
        "backgrounds": len(dataset.backgrounds),
        "prompt": dataset.prompt,
    }
    if isinstance(spec, EvaluateSpec):
        test = _dataset(work, spec.request.test_uri) if spec.request.test_uri is not None else None
        return Outcome(len(dataset.cases), output | {"test_dataset_id": test.id if test is not None else None})
    cases = chosen_cases(dataset, spec.request, spec.recipe.max_pairs)
    digests = [case.image_sha256 for case in cases]
    return Outcome(len(dataset.cases), output | {"pairs": len(cases), "cases": digests})


def _dataset(work: Work, uri: str) -> Dataset:
    if is_dataset_id(uri):
        return load_dataset(work.store, work.tenant, uri)
    with open_source(uri, work.settings, work.store, work.tenant) as source:
        limit = work.settings.max_dataset_bytes
        return import_dataset(
            source, work.store, work.tenant, lambda done, total: work.progress(done, total, "cases"), limit
        )  # fmt: skip


def calibrate(work: Work) -> Outcome:
    """Embeddings of the real lesion crops and the similarity band that follows from them."""
    recipe = work.spec.recipe
    torch.set_num_threads(recipe.work.inference_threads)
    dataset_id = imported(work)
    cases = training_cases(work, dataset_id)
    encoder = load_encoder(recipe.quality, work.settings, work.store)
    crops = []
    for case in cases:
        pair = load(work, dataset_id, case)
        crops.append(quality.lesion_crop(pair.image, pair.mask, recipe.quality.context, recipe.quality.crop_px))
        work.progress(len(crops), len(cases), "cases")
    try:
        reference = quality.calibrate(encoder, crops, [case.image_sha256 for case in cases], recipe.quality)
    except ValueError as error:
        raise ProblemError("invalid-dataset", f"The training cases cannot tell copies: {error}") from None
    keys = ModelKeys(work.tenant, work.spec.model_id)
    work.store.put(keys.reference, reference.to_bytes(), "application/octet-stream")
    return Outcome(units=len(cases), output=reference.summary())


def score(work: Work) -> Outcome:
    """Verdict, label and digests of each candidate of a shard."""
    recipe = work.spec.recipe
    torch.set_num_threads(recipe.work.inference_threads)
    encoder = load_encoder(recipe.quality, work.settings, work.store)
    reference = quality.Reference.from_bytes(work.store.get(ModelKeys(work.tenant, work.spec.model_id).reference))
    entries = []
    for candidate in drawn(work):
        entries.append(_judged(work, candidate, encoder, reference))
        work.progress(len(entries), recipe.work.shard_size, "candidates")
    return Outcome(units=len(entries), output={"candidates": [entry.model_dump(mode="json") for entry in entries]})


def _judged(
    work: Work, candidate: Candidate, encoder: quality.Encoder, reference: quality.Reference
) -> selection.Entry:
    """The verdict on one candidate, and its label if it is good."""
    recipe = work.spec.recipe
    data = {what: work.store.get(work.keys.candidate(candidate.index, what)) for what in ("image", "shape", "guide")}
    image, shape, guide = decode_png(data["image"]), decode_mask(data["shape"]), decode_mask(data["guide"])
    reason, scores = quality.judge(reference, encoder, image, shape, recipe.quality)
    metrics.CANDIDATES.labels(reason or "accepted").inc()
    metrics.SIMILARITY.observe(scores.nearest_real)
    signature = signatures.of(shape)
    if reason is not None:
        rejected = Rejected(index=candidate.index, reason=reason, scores=scores)
        return selection.Entry(index=candidate.index, reason=reason, signature=signature, rejected=rejected)
    label, eroded_px = erosion.erode(shape, recipe.erosion.share)
    data["label"] = encode_mask(label)
    work.store.put(work.keys.candidate(candidate.index, "label"), data["label"], "image/png")
    pictures = {what: _picture(work, candidate.index, what, png, shape) for what, png in data.items()}
    pair = Pair(
        index=candidate.index,
        seed=candidate.seed,
        image=pictures["image"],
        label=Label(**pictures["label"].model_dump(), eroded_px=eroded_px),
        shape=pictures["shape"],
        guide=pictures["guide"],
        window=candidate.window,
        background=Background(sha256=candidate.background.image_sha256, repaired=candidate.repaired),
        donor=candidate.donor.image_sha256 if recipe.inpainting.strength < 1 else None,
        scores=scores,
        outside_guide_max_diff=max_difference(image, ground_of(work, candidate).image, ~guide),
    )
    return selection.Entry(index=candidate.index, reason=None, signature=signature, pair=pair)


def _picture(work: Work, index: int, what: str, png: bytes, shape: Mask) -> Picture:
    height, width = shape.shape
    return Picture(
        uri=f"/jobs/{work.spec.id}/pairs/{index}/{what}",
        key=work.keys.candidate(index, what),
        sha256=sha256_hex(png),
        width=width,
        height=height,
    )


def max_difference(one: Pixels, other: Pixels, where: Mask) -> int:
    """Largest absolute difference of two images (H, W, C) in grey levels at the pixels of ``where``; 0 if none."""
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16))[where].max(initial=0))


def manifest(work: Work) -> Outcome:
    """The manifest of the first N accepted pairs in index order, and the sheet to look at; the surplus is swept."""
    request = work.spec.request
    entries = [
        selection.Entry.model_validate(entry)
        for marker in work.markers("quality")
        for entry in marker.output["candidates"]
    ]
    chosen = selection.select(entries, work.spec)
    duplicates = sum(reason == "duplicate_shape" for _, reason in chosen.rejected)
    metrics.CANDIDATES.labels("duplicate_shape").inc(duplicates)
    card = model_card(work)
    pairs = tuple(entry.pair for entry in chosen.accepted if entry.pair is not None)
    rejected = tuple(
        Rejected(index=entry.index, reason=reason, scores=_scores(entry)) for entry, reason in chosen.rejected
    )
    manifest = Manifest(
        job_id=work.spec.id,
        model_id=work.spec.model_id,
        dataset_id=work.spec.dataset_id,
        created_at=datetime.now(UTC),
        software_version=__version__,
        fingerprint=_painters(work, chosen.next_index),
        foundation=card.foundation,
        inpainter=card.inpainter,
        encoder=card.encoder,
        recipe=work.spec.recipe,
        request=request.model_dump(mode="json"),
        cases=card.cases,
        release_class="internal",
        counts=Counts(
            requested=request.count,
            generated=len(pairs) + len(rejected),
            accepted=len(pairs),
            rejected=chosen.by_reason(),
        ),
        pairs=pairs,
        rejected=rejected,
        next_start_index=chosen.next_index,
    )
    _sweep(work, {picture.key for pair in pairs for picture in (pair.image, pair.label, pair.shape, pair.guide)})
    work.store.put(work.keys.contact_sheet, _contact_sheet(work, pairs[:SHEET_PAIRS]), "image/png")
    work.store.put(work.keys.manifest, manifest.model_dump_json(indent=1).encode(), "application/json")
    return Outcome(units=len(pairs), output={"accepted": len(pairs)})


def _painters(work: Work, end: int) -> dict[str, str]:
    """The fingerprint of the processes that drew and painted the candidates before ``end``."""
    shards = -((work.spec.request.start_index - end) // work.spec.recipe.work.shard_size)
    markers = [*work.markers("masks"), *work.markers("inpainting")]
    return merged_fingerprint(marker for marker in markers if marker.shard < shards)


def _scores(entry: selection.Entry) -> Scores | None:
    judged = entry.pair or entry.rejected
    return judged.scores if judged else None


def _sweep(work: Work, kept: set[str]) -> None:
    """Remove the pixels of candidates that the manifest does not hold."""
    work.store.delete([key for key in work.store.list(work.keys.candidates_root) if key not in kept])


def _contact_sheet(work: Work, pairs: tuple[Pair, ...]) -> bytes:
    """Image, guide, label and overlay of each pair, and beside each the nearest real image."""
    cases = {case.image_sha256: case for case in load_dataset(work.store, work.tenant, work.spec.dataset_id).cases}
    rows: list[list[Pixels]] = []
    nearest: dict[str, Pixels] = {}
    for pair in pairs:
        image = decode_png(work.store.get(pair.image.key))
        label = decode_mask(work.store.get(pair.label.key))
        guide = decode_mask(work.store.get(pair.guide.key))
        digest = pair.scores.nearest_sha256
        if digest not in nearest:
            real = load(work, work.spec.dataset_id, cases[digest])
            nearest[digest] = _thumbnail(overlay(real.image, real.mask))
        shown = [_thumbnail(image), _thumbnail(guide), _thumbnail(label), _thumbnail(overlay(image, label))]
        rows.append([*shown, nearest[digest]])
        work.progress(len(rows), len(pairs), "pairs")
    header = ["synthetic", "guide", "label", "overlay", "nearest real"]
    captions = [f"{pair.index}: {pair.scores.nearest_real:.2f} to the nearest real" for pair in pairs]
    return sheet(rows, header, captions, side=SHEET_PX, groups=2)


def _thumbnail(pixels: Pixels | Mask) -> Pixels:
    return np.asarray(tile(pixels, SHEET_PX))


for _outcome in ("accepted", *get_args(Reason)):
    metrics.CANDIDATES.labels(_outcome)

STAGES: dict[Stage, Callable[[Work], Outcome]] = {
    "import": import_,
    "calibrate": calibrate,
    "quality": score,
    "manifest": manifest,
    "split": split,
    "report": report,
}
