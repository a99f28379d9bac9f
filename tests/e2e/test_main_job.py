"""The main job through the real services over HTTP, and the same bytes on three inpainters as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meddiff import phantoms
from meddiff.client import Client
from meddiff.contracts.jobs import Job
from meddiff.contracts.manifest import Manifest
from meddiff.embedded import stack
from meddiff_services.pictures import decode_mask, decode_png

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
def pulled(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[int, tuple[Path, Manifest]]:
    """What one request gives on one inpainter and on three, by their number."""
    home = tmp_path_factory.mktemp("stack")
    results = {}
    for inpainters in (1, 3):
        running = stack.up(home / str(inpainters), inpainters=inpainters, data=home / "data", file_roots=[dataset])
        try:
            with Client(running.address) as client:
                if inpainters == 1:
                    tuned = client.finetune(f"file://{dataset}", name="phantom", override=SMALL)
                    succeeded(client, tuned)
                    assert client.previews(tuned.id)
                made = succeeded(client, client.generate("phantom", COUNT, seed=7))
                assert made.result is not None
                folder = tmp_path_factory.mktemp(f"pulled{inpainters}")
                results[inpainters] = (folder, client.pull(made.id, folder))
        finally:
            stack.down(home / str(inpainters))
    return results


def test_delivers_what_was_asked_for(pulled: dict[int, tuple[Path, Manifest]]) -> None:
    folder, manifest = pulled[1]
    assert len(manifest.pairs) == manifest.counts.accepted == COUNT
    assert manifest.counts.generated == COUNT + sum(manifest.counts.rejected.values())
    assert [p.index for p in manifest.pairs] == sorted(p.index for p in manifest.pairs)
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
