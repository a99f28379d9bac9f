"""An evaluation through the real services over HTTP: k folds from ``POST /evaluate`` to the page, all processes killed
twice on the way; and pairs that had a test case in them, refused."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from meddiff import phantoms
from meddiff.client import Client
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.jobs import Job
from meddiff.embedded import stack
from meddiff.embedded.servers import sockets_removed
from meddiff.importing.pixels import decode_image, encode_png
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SMALL = {
    "finetuning": {"steps": 12, "segment_steps": 6, "variants": 2, "preview_pairs": 0},
    "mask_generation": {"steps": 20, "segment_steps": 20, "sampling_steps": 5},
    "inpainting": {"solver_steps": 4},
    "quality": {"far_quantile": 0.0},
    "work": {"shard_size": 4},
    "evaluation": {
        "segmenter": "unet",
        "size": 64,
        "steps": 20,
        "every": 10,
        "inner_folds": 2,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "ema_decay": 0.9,
    },
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    phantoms.write(folder, pairs=20, backgrounds=2)
    return folder


class Service:
    """An embedded stack that may be killed and started again on the same data."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.up()

    def up(self) -> None:
        self.running = stack.up(self.home / "stack", inpainters=1, data=self.home / "data")
        self.client = Client(self.running.address)

    def kill(self) -> None:
        """Every process at once, as a power cut would."""
        members = [process for member in self.running.members if (process := member.process()) is not None]
        pids = [one.pid for process in members for one in (process, *process.children(recursive=True))]
        with sockets_removed(pids):
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        stack.down(self.home / "stack")

    def until(self, job_id: str, reached: Callable[[Job], bool]) -> Job:
        """Waits for a moment of the job; fails where it ends before."""

        class Reached(Exception):
            pass

        def look(job: Job) -> None:
            if reached(job):
                raise Reached

        try:
            ended = self.client.wait(job_id, look)
        except Reached:
            return self.client.job(job_id)
        raise AssertionError(f"{ended.status}: {ended.problem}")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"))
    yield service
    stack.down(service.home / "stack")


def test_k_folds_from_the_request_to_the_page_killed_twice(service: Service, dataset: Path) -> None:
    imported = service.client.upload(dataset).id
    recipe = {"name": "cpu", "override": SMALL}
    job = service.client.evaluate(imported, folds=2, seeds=2, synthetic=(6,), recipe=recipe)
    assert job.status in ("queued", "validating", "running")
    service.until(job.id, lambda job: job.stage not in (None, "import", "split"))
    service.kill()
    service.up()
    service.until(job.id, lambda job: job.progress is not None and job.progress.done >= 3)
    service.kill()
    service.up()
    ended = service.client.wait(job.id)
    assert ended.status == "succeeded", ended.problem
    report = service.client.report(job.id)
    assert {arm.name for arm in report.arms} == {"real", "real x0.5", "synthetic 6 falling", "copy-paste 6"}
    assert all(arm.runs == 4 for arm in report.arms)
    assert report.verdict in ("helps", "adds nothing", "harms")
    tested = [set(split.test) for split in report.splits]
    assert len(set.union(*tested)) == sum(map(len, tested)) == 20
    for split in report.splits:
        assert not set(split.train) & set(split.test)
    page = service.client.report_page(job.id).decode()
    assert report.summary in page.replace("&#39;", "'")
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    children = [one for one in service.client.jobs() if one.parent == job.id]
    assert sorted(one.kind for one in children) == ["finetune", "finetune", "generate", "generate"]


@pytest.fixture(scope="module")
def made(service: Service, dataset: Path) -> Job:
    """The generate job of a model that twelve of the dataset's cases made."""
    client = service.client
    tuned = client.wait(client.finetune(client.upload(dataset).id, name="leaky", override=SMALL, max_pairs=12).id)
    assert tuned.status == "succeeded", tuned.problem
    job = client.wait(client.generate("leaky", 4).id)
    assert job.status == "succeeded", job.problem
    return job


def test_pairs_with_a_test_case_in_them_are_refused_and_the_case_is_named(
    service: Service, dataset: Path, made: Job, tmp_path: Path
) -> None:
    client = service.client
    imported = client.upload(dataset).id
    known = set(client.model("leaky").cases)
    own = next(case for case in client.dataset(imported).cases if case.image_sha256 in known)

    for name, brighter in (("the same", 0), ("nearly the same", 3)):
        folder = tmp_path / name
        phantoms.write(folder, pairs=4, backgrounds=0, seed=99)
        _plant(dataset, own.image_sha256, folder, brighter)
        job = client.evaluate(imported, synthetic_job=made.id, synthetic=(4,), test_uri=client.upload(folder).id)
        ended = client.wait(job.id)
        assert ended.status == "failed"
        assert ended.problem is not None
        assert ended.problem.type.endswith(":leak")
        assert len(ended.problem.errors) == 1
        if brighter:
            assert "nearly the same picture" in ended.problem.errors[0].detail
        assert own.image_sha256 in ended.problem.errors[0].detail


def test_too_few_test_cases_and_a_dataset_without_the_models_own_are_refused(
    service: Service, dataset: Path, made: Job, tmp_path: Path
) -> None:
    client = service.client
    phantoms.write(tmp_path / "few", pairs=3, backgrounds=0, seed=99)
    phantoms.write(tmp_path / "others", pairs=6, backgrounds=0, seed=98)
    imported, few, others = (client.upload(folder).id for folder in (dataset, tmp_path / "few", tmp_path / "others"))
    for dataset_uri, test_uri, words in (
        (imported, few, "3 case(s) would be left to test on; at least 6 are needed"),
        (others, few, "12 of the model's 12 cases are not in this dataset"),
    ):
        ended = client.wait(client.evaluate(dataset_uri, synthetic_job=made.id, synthetic=(4,), test_uri=test_uri).id)
        assert ended.problem is not None
        assert ended.problem.type.endswith(":invalid-dataset")
        assert words in ended.problem.detail


def test_a_lesion_free_image_that_shows_a_test_case_is_refused(service: Service, dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(dataset, folder)
    image = sorted((folder / "images").iterdir())[0]
    pixels = np.asarray(Image.open(image)).astype(int) + 3
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "backgrounds" / "zz.png")
    ended = service.client.wait(service.client.evaluate(service.client.upload(folder).id, folds=2).id)
    assert ended.problem is not None
    assert ended.problem.type.endswith(":leak")
    digest = sha256_hex(encode_png(decode_image(image.read_bytes()).pixels))
    assert digest in ended.problem.errors[0].detail
    assert "lesions are painted on it" in ended.problem.errors[0].detail


def _plant(dataset: Path, digest: str, folder: Path, brighter: int) -> None:
    """The dataset's case of that digest among those of ``folder``."""
    images = (dataset / "images").iterdir()
    image = next(one for one in images if sha256_hex(encode_png(decode_image(one.read_bytes()).pixels)) == digest)
    pixels = np.asarray(Image.open(image)).astype(int) + brighter
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"zz{image.suffix}")
    mask = next((dataset / "masks").glob(f"{image.stem}*"))
    shutil.copy(mask, folder / "masks" / f"zz{mask.suffix}")


def test_the_dataset_named_twice_tests_on_its_other_cases(service: Service, dataset: Path, made: Job) -> None:
    """And on none of the model's own, nor of their patients: it is one dataset."""
    client = service.client
    imported = client.upload(dataset).id
    job = client.evaluate(imported, synthetic_job=made.id, synthetic=(4,), test_uri=imported, seeds=2)
    service.until(job.id, lambda job: job.stage not in (None, "import", "split"))
    client.cancel(job.id)
    assert client.wait(job.id).status == "cancelled"
