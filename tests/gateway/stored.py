"""Objects that jobs, models and datasets leave in the store, for the gateway to read."""

from __future__ import annotations

import io
import uuid
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.dataset import Case, Dataset, dataset_id_of
from meddiff.contracts.ids import uuid7
from meddiff.contracts.jobs import End, GenerateSpec
from meddiff.contracts.manifest import (
    Background,
    Component,
    Counts,
    Label,
    Manifest,
    Pair,
    Picture,
    Rejected,
    Scores,
    Window,
)
from meddiff.contracts.models import ModelCard
from meddiff.contracts.recipes import CPU
from meddiff.contracts.requests import GenerateRequest
from meddiff.store.keys import DatasetKeys, JobKeys, ModelKeys, model_name, newest
from meddiff.store.objects import ObjectStore
from PIL import Image

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@dataclass(frozen=True)
class Generated:
    """A finished generate job of two pairs, one of them before a repaired background."""

    spec: GenerateSpec
    manifest: Manifest
    pictures: dict[str, bytes]


def png(level: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """A grey picture of one level, (width, height) ``size``."""
    buffer = io.BytesIO()
    Image.fromarray(np.full(size[::-1], level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def archive(pairs: int = 3, mask_size: tuple[int, int] = (24, 16)) -> bytes:
    """A zip of ``images/`` and ``masks/``; a dataset with faults where the masks' size is not the images'."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for n in range(pairs):
            mask = np.zeros(mask_size[::-1], np.uint8)
            mask[4:9, 3 : 8 + n] = 255
            drawn = io.BytesIO()
            Image.fromarray(mask).save(drawn, "PNG")
            target.writestr(f"images/{n}.png", png(60 + n))
            target.writestr(f"masks/{n}.png", drawn.getvalue())
    return buffer.getvalue()


def put_dataset(store: ObjectStore, tenant: str, level: int = 10) -> Dataset:
    """Two pairs whose pictures have the grey levels ``level`` and ``level + 1``."""
    images = [png(level), png(level + 1)]
    cases = tuple(
        Case(
            id=f"{n:05d}",
            role="pair",
            width=24,
            height=16,
            channels=1,
            image_sha256=sha256_hex(image),
            mask_sha256=sha256_hex(png(255)),
        )
        for n, image in enumerate(images)
    )
    dataset = Dataset(id=dataset_id_of(cases), layout="pairs", cases=cases)
    keys = DatasetKeys(tenant, dataset.id)
    for case, image in zip(cases, images, strict=True):
        store.put(keys.image(case.id), image)
    store.put_json(keys.dataset, dataset)
    return dataset


def put_model(store: ObjectStore, tenant: str, dataset: Dataset, name: str | None = None) -> ModelCard:
    """A model's card, and its name."""
    weights = Component(source="builtin", sha256="a" * 64)
    card = ModelCard(
        id=f"md_{uuid.uuid4().hex}",
        name=name,
        job_id=uuid7(),
        dataset_id=dataset.id,
        created_at=datetime.now(UTC),
        recipe=CPU,
        foundation=weights,
        inpainter=weights,
        encoder=weights,
        fingerprint={"device": "cpu"},
        cases=tuple(case.image_sha256 for case in dataset.cases),
        backgrounds=0,
        software_version="0",
    )
    store.put_json(ModelKeys(tenant, card.id).card, card)
    if name is not None:
        store.put(model_name(tenant, name), f'{{"model_id":"{card.id}"}}'.encode())
    return card


def put_generated(store: ObjectStore, tenant: str) -> Generated:
    """Spec, pictures, manifest, contact sheet and end of a job that succeeded."""
    dataset = put_dataset(store, tenant)
    card = put_model(store, tenant, dataset)
    spec = GenerateSpec(
        tenant=tenant,
        id=uuid7(),
        created_at=NOW,
        request=GenerateRequest(model=card.id, count=2),
        recipe=CPU,
        model_id=card.id,
        dataset_id=dataset.id,
    )
    keys = JobKeys(tenant, spec.id)
    pictures = {"contact_sheet": png(99)}
    pairs = []
    for index, repaired in ((0, False), (2, True)):
        own = {what: png(100 + 10 * index + n) for n, what in enumerate(("image", "label", "shape", "guide"))}
        pictures |= {f"{index}/{what}": data for what, data in own.items()}
        background = png(50) if repaired else png(10)
        pictures[f"{index}/background"] = background
        if repaired:
            store.put(ModelKeys(tenant, card.id).background("00000"), background)
        for what, data in own.items():
            store.put(keys.candidate(index, what), data)
        pairs.append(_pair(spec, index, own, Background(sha256=dataset.cases[0].image_sha256, repaired=repaired)))
    manifest = Manifest(
        job_id=spec.id,
        model_id=card.id,
        dataset_id=dataset.id,
        created_at=NOW,
        software_version="0",
        fingerprint=card.fingerprint,
        foundation=card.foundation,
        inpainter=card.inpainter,
        encoder=card.encoder,
        recipe=CPU,
        request=spec.request.model_dump(mode="json"),
        cases=card.cases,
        release_class="internal",
        counts=Counts(requested=2, generated=3, accepted=2, rejected={"copy": 1}),
        pairs=tuple(pairs),
        rejected=(Rejected(index=1, reason="copy"),),
        next_start_index=3,
    )
    store.put(newest(tenant, spec.id), b"")
    store.put_json(keys.spec, spec)
    store.put_json(keys.manifest, manifest)
    store.put(keys.contact_sheet, pictures["contact_sheet"])
    store.put_json(keys.end, End(status="succeeded", finished_at=NOW, result={"accepted": 2}))
    return Generated(spec, manifest, pictures)


def _pair(spec: GenerateSpec, index: int, data: dict[str, bytes], background: Background) -> Pair:
    def picture(what: str) -> Picture:
        return Picture(
            uri=f"/jobs/{spec.id}/pairs/{index}/{what}",
            key=JobKeys(spec.tenant, spec.id).candidate(index, what),
            sha256=sha256_hex(data[what]),
            width=24,
            height=16,
        )

    return Pair(
        index=index,
        seed=index,
        image=picture("image"),
        label=Label(**picture("label").model_dump(), eroded_px=0),
        shape=picture("shape"),
        guide=picture("guide"),
        window=Window(top=0, left=0, side=16),
        background=background,
        scores=Scores(nearest_real=0.5, nearest_sha256="b" * 64, mean_real=0.4, margin=0.1, band=(0.2, 0.8)),
        outside_guide_max_diff=0,
    )
