"""The main job through the real services over HTTP, the same bytes on three inpainters as on one, backgrounds of the
user's own, and a fine-tuned model in plain diffusers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from meddiff import phantoms
from meddiff.client import Client
from meddiff.contracts.jobs import Job
from meddiff.contracts.manifest import Manifest
from meddiff.embedded import stack
from meddiff.store.keys import ModelKeys
from meddiff.store.objects import ObjectStore
from meddiff_services.loading import fetch_folder
from meddiff_services.pictures import decode_mask, decode_png
from PIL import Image

from benchmarks import outside_guide
from benchmarks.sources import Pulled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COUNT = 10
SMALL = {
    "finetuning": {"steps": 24, "segment_steps": 12, "variants": 2, "preview_pairs": 2},
    "mask_generation": {"steps": 40, "segment_steps": 20, "sampling_steps": 10},
    "inpainting": {"solver_steps": 6},
    "work": {"shard_size": 4},
}


def succeeded(client: Client, job: Job) -> Job:
    ended = client.wait(job.id)
    assert ended.status == "succeeded", ended.problem
    return ended


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    phantoms.write(folder, pairs=12, backgrounds=4)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Two lesion-free photographs of 3024 x 2016."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "backgrounds").mkdir()
    for n, path in enumerate(sorted((dataset / "backgrounds").iterdir())[:2]):
        skin = Image.open(path).resize((3024, 2016), Image.Resampling.BICUBIC)
        skin.save(folder / "backgrounds" / f"{n}.jpg", quality=95)
    return folder


@dataclass(frozen=True)
class Made:
    """What one request gives on one inpainter and on three, by their number; the pairs on the large photographs; and
    the fine-tuned model's folder."""

    pulled: dict[int, tuple[Path, Manifest]]
    on_large: Path
    model: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, dataset: Path, large: Path) -> Made:
    home, on_large, model = (tmp_path_factory.mktemp(name) for name in ("stack", "on_large", "model"))
    results = {}
    for inpainters in (1, 3):
        running = stack.up(home / str(inpainters), inpainters=inpainters, data=home / "data", file_roots=[dataset])
        try:
            with Client(running.address) as client:
                if inpainters == 1:
                    tuned = client.finetune(f"file://{dataset}", name="phantom", override=SMALL)
                    succeeded(client, tuned)
                    assert client.previews(tuned.id)
                    model_id = client.model("phantom").id
                    fetch_folder(
                        ObjectStore.from_settings(running.settings),
                        ModelKeys("local", model_id).root + "/",
                        model,
                        "model.json",
                    )
                job = succeeded(client, client.generate("phantom", COUNT, seed=7))
                folder = tmp_path_factory.mktemp(f"pulled{inpainters}")
                results[inpainters] = (folder, client.pull(job.id, folder))
                if inpainters == 3:
                    backgrounds = client.upload(large).id
                    job = succeeded(client, client.generate("phantom", 2, backgrounds=backgrounds))
                    client.pull(job.id, on_large)
        finally:
            stack.down(home / str(inpainters))
    return Made(results, on_large, model)


@pytest.fixture(scope="module")
def pulled(made: Made) -> dict[int, tuple[Path, Manifest]]:
    return made.pulled


def test_delivers_what_was_asked_for(pulled: dict[int, tuple[Path, Manifest]]) -> None:
    folder, manifest = pulled[1]
    assert len(manifest.pairs) == manifest.counts.accepted == COUNT
    assert manifest.counts.generated == COUNT + sum(manifest.counts.rejected.values())
    assert [p.index for p in manifest.pairs] == sorted(p.index for p in manifest.pairs)
    assert {p.donor for p in manifest.pairs} <= set(manifest.cases)
    assert (folder / "contact_sheet.png").stat().st_size > 0


def test_outside_the_guide_nothing_changes(pulled: dict[int, tuple[Path, Manifest]]) -> None:
    folder, manifest = pulled[1]
    for pair in manifest.pairs:
        assert pair.outside_guide_max_diff == 0
        read = {what: (folder / "pairs" / f"{pair.index:08d}.{what}.png").read_bytes() for what in ("shape", "guide")}
        label = decode_mask((folder / "pairs" / f"{pair.index:08d}.label.png").read_bytes())
        shape, guide = decode_mask(read["shape"]), decode_mask(read["guide"])
        assert not (shape & ~guide).any()
        assert not (label & ~shape).any()
        assert label.any()


def test_the_manifest_is_what_the_published_schema_says(pulled: dict[int, tuple[Path, Manifest]]) -> None:
    published = json.loads((Path(__file__).parents[2] / "docs" / "manifest.schema.json").read_bytes())
    jsonschema.validate(json.loads((pulled[1][0] / "manifest.json").read_bytes()), published)


def test_large_backgrounds_of_the_users_own_keep_every_pixel_outside_the_guide(made: Made, large: Path) -> None:
    manifest = Pulled(made.on_large).manifest
    assert {(pair.image.width, pair.image.height) for pair in manifest.pairs} == {(3024, 2016)}
    assert outside_guide.main(Pulled(made.on_large), large) == 0


def test_plain_diffusers_paints_with_a_fine_tuned_model(made: Made) -> None:
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(made.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    mask = np.zeros((128, 128), np.uint8)
    mask[40:90, 40:90] = 255
    picture, hole = Image.fromarray(np.full((128, 128, 3), 150, np.uint8)), Image.fromarray(mask)
    painted = pipeline(
        "An image of hta", picture, hole, height=128, width=128, num_inference_steps=3, guidance_scale=1.0
    ).images[0]
    assert np.std(np.asarray(painted)[45:85, 45:85]) > 1


def test_pictures_show_something(pulled: dict[int, tuple[Path, Manifest]]) -> None:
    folder, manifest = pulled[1]
    for pair in manifest.pairs:
        image = decode_png((folder / "pairs" / f"{pair.index:08d}.image.png").read_bytes())
        shape = decode_mask((folder / "pairs" / f"{pair.index:08d}.shape.png").read_bytes())
        assert np.std(image[shape].astype(float)) > 0


def test_one_and_three_inpainters_give_the_same_bytes(pulled: dict[int, tuple[Path, Manifest]]) -> None:
    (one, first), (three, second) = pulled[1], pulled[3]
    assert masked(first) == masked(second)
    files = sorted(path.name for path in (one / "pairs").iterdir())
    assert files == sorted(path.name for path in (three / "pairs").iterdir())
    for name in files:
        assert (one / "pairs" / name).read_bytes() == (three / "pairs" / name).read_bytes()


def masked(manifest: Manifest) -> dict[str, Any]:
    """The manifest without ids, keys and times."""
    fields = manifest.model_dump(mode="json", exclude={"job_id", "created_at"})
    for pair in fields["pairs"]:
        for picture in ("image", "label", "shape", "guide"):
            pair[picture].pop("uri")
            pair[picture].pop("key")
    return fields
