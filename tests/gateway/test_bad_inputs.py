"""Bad inputs, as a table: each gets a problem that names the culprit, and nothing is left behind."""

from __future__ import annotations

import io
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gateways import Gateway, started
from meddiff import access
from PIL import Image
from stored import put_dataset, put_generated, put_model

sys.path.append(str(Path(__file__).parents[1] / "datasets"))
from dataset_files import encoded, mask, noise, pairs, patch, photo

ZIP = {"Content-Type": "application/zip"}
ELSEWHERE = "cardiology"


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in files.items():
            target.writestr(name, data)
    return buffer.getvalue()


def with_file(name: str, data: bytes | None) -> bytes:
    """Three good pairs, one file of which is another, or missing."""
    files: dict[str, Any] = pairs() | {name: data}
    return archive({path: content for path, content in files.items() if content is not None})


def grey_edges() -> bytes:
    """A mask whose JPEG has values between black and white."""
    drawn = np.zeros((32, 48), np.uint8)
    drawn[8:20, 10:30] = np.linspace(0, 255, 20).astype(np.uint8)
    return encoded(Image.fromarray(drawn), "JPEG", quality=30)


def bomb_png() -> bytes:
    """A PNG of a few bytes that says it is 60000 x 60000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def symlink() -> bytes:
    buffer = io.BytesIO(archive(pairs()))
    with zipfile.ZipFile(buffer, "a") as target:
        link = zipfile.ZipInfo("images/9.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        target.writestr(link, "/etc/passwd")
    return buffer.getvalue()


def zip_bomb() -> bytes:
    return archive(pairs() | {"images/9.png": bytes(300 * 2**20)})


DATASETS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "a mask of another size": (with_file("masks/1.png", mask((40, 40))), "masks/1.png"),
    "a missing mask": (with_file("masks/1.png", None), "images/1.png"),
    "a mask without an image": (with_file("masks/9.png", mask()), "masks/9.png"),
    "an empty mask": (with_file("masks/1.png", encoded(patch(value=0))), "masks/1.png"),
    "an all-white mask": (with_file("masks/1.png", encoded(Image.new("L", (48, 32), 255))), "masks/1.png"),
    "a JPEG mask with grey edges": (with_file("masks/1.png", grey_edges()), "masks/1.png"),
    "a CMYK image": (with_file("images/1.png", encoded(noise().convert("CMYK"), "JPEG")), "images/1.png"),
    "a 16-bit image without a window": (
        with_file("images/1.png", encoded(Image.fromarray(np.full((32, 48), 3000, np.uint16)))),
        "images/1.png",
    ),
    "an image with an alpha channel": (
        with_file("images/1.png", encoded(Image.new("RGBA", (48, 32), (9, 9, 9, 90)))),
        "images/1.png",
    ),
    "a truncated PNG": (with_file("images/1.png", photo()[:200]), "images/1.png"),
    "no image at all": (with_file("images/1.png", b"not a picture"), "images/1.png"),
    "a decompression bomb": (with_file("images/1.png", bomb_png()), "images/1.png"),
    "a path that leaves the archive": (archive(pairs() | {"../images/9.png": photo()}), "../images/9.png"),
    "an absolute path": (archive(pairs() | {"/etc/9.png": photo()}), "/etc/9.png"),
    "a symbolic link": (symlink, "images/9.png"),
    "a zip bomb": (zip_bomb, "/"),
    "one pair": (archive(pairs(1)), "/"),
    "no pair": (archive({"notes.txt": b"x"}), "/"),
    "an empty archive": (archive({}), "/"),
    "no archive": (b"PK but not one", ""),
    "a window that is none": (archive(pairs() | {"window.json": b'{"low": 9}'}), "window.json"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_bad_dataset_is_refused_and_the_file_named(gateway: Gateway, name: str) -> None:
    made, culprit = DATASETS[name]
    data = made() if callable(made) else made
    before = sorted(gateway.store.list(f"t/{gateway.tenant}/"))
    response = gateway.http.post("/datasets", content=data, headers=ZIP)
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json"), response.text
    problem = response.json()
    assert problem["type"] == "urn:meddiff:problem:invalid-dataset"
    if culprit:
        assert culprit in {fault["pointer"] for fault in problem["errors"]}, problem
    assert sorted(gateway.store.list(f"t/{gateway.tenant}/")) == before


def test_all_faults_of_a_dataset_come_in_one_answer(gateway: Gateway) -> None:
    files = pairs(5) | {
        "masks/0.png": mask((40, 40)), "masks/1.png": encoded(patch(value=0)), "images/2.png": b"x",
        "masks/9.png": mask(),
    }  # fmt: skip
    del files["masks/3.png"]
    problem = gateway.http.post("/datasets", content=archive(files), headers=ZIP).json()
    named = {fault["pointer"] for fault in problem["errors"]}
    assert named == {"masks/0.png", "masks/1.png", "images/2.png", "masks/9.png", "images/3.png"}


@dataclass(frozen=True)
class Bad:
    """A request and the pointer that its problem is to name; ``{…}`` in a body stands for what was put in the store."""

    path: str
    body: dict[str, Any]
    culprit: str
    status: int = 422
    headers: dict[str, str] = field(default_factory=dict)


DEEP: dict[str, Any] = reduce(lambda deep, _: {"a": deep}, range(300), {})
REQUESTS = {
    "an unknown URI scheme": Bad("/finetune", {"dataset_uri": "ftp://hospital/x"}, "/dataset_uri"),
    "a folder outside the root": Bad("/finetune", {"dataset_uri": "file:///etc"}, "/dataset_uri", 403),
    "the service's own bucket": Bad("/finetune", {"dataset_uri": "s3://{bucket}/t"}, "/dataset_uri", 403),
    "a bucket that is not named": Bad("/finetune", {"dataset_uri": "s3://elsewhere/x"}, "/dataset_uri", 403),
    "a dataset that is not there": Bad("/finetune", {"dataset_uri": "ds_" + "7" * 32}, "/dataset_uri"),
    "another tenant's dataset": Bad("/finetune", {"dataset_uri": "{other_dataset}"}, "/dataset_uri"),
    "one pair asked for": Bad("/finetune", {"dataset_uri": "{dataset}", "max_pairs": 1}, "/max_pairs"),
    "a name with a slash": Bad("/finetune", {"dataset_uri": "{dataset}", "name": "a/b"}, "/name"),
    "a name that climbs": Bad("/finetune", {"dataset_uri": "{dataset}", "name": ".."}, "/name"),
    "an unknown recipe": Bad("/finetune", {"dataset_uri": "{dataset}", "recipe": {"name": "best"}}, "/recipe/name"),
    "an absurd recipe": Bad(
        "/finetune",
        {"dataset_uri": "{dataset}", "recipe": {"override": {"finetuning": {"steps": -5}}}},
        "/recipe/override/finetuning/steps",
    ),
    "an unknown field": Bad("/finetune", {"dataset_uri": "{dataset}", "colour": 1}, "/colour"),
    "an unknown priority": Bad("/finetune", {"dataset_uri": "{dataset}", "priority": "now"}, "/priority"),
    "a case named twice": Bad("/finetune", {"dataset_uri": "{dataset}", "cases": ["a" * 64, "a" * 64]}, "/cases/1"),
    "a cases list of no digests": Bad("/finetune", {"dataset_uri": "{dataset}", "cases": ["x", "y"]}, "/cases/0"),
    "count 0": Bad("/generate", {"model": "{model}", "count": 0}, "/count"),
    "count -1": Bad("/generate", {"model": "{model}", "count": -1}, "/count"),
    "count 10^9": Bad("/generate", {"model": "{model}", "count": 10**9}, "/count"),
    "more pairs than a job makes": Bad("/generate", {"model": "{model}", "count": 20_001}, "/count"),
    "threads of a thousand cores": Bad(
        "/generate",
        {"model": "{model}", "count": 1, "recipe": {"work": {"inference_threads": 1000}}},
        "/recipe/work/inference_threads",
    ),
    "a count that is a word": Bad("/generate", {"model": "{model}", "count": "many"}, "/count"),
    "no count": Bad("/generate", {"model": "{model}"}, "/count"),
    "an unknown model": Bad("/generate", {"model": "nobody", "count": 1}, "/model"),
    "another tenant's model": Bad("/generate", {"model": "{other_model}", "count": 1}, "/model"),
    "a negative seed": Bad("/generate", {"model": "{model}", "count": 1, "seed": -1}, "/seed"),
    "masks that are not there": Bad("/generate", {"model": "{model}", "count": 1, "masks": "ds_" + "7" * 32}, "/masks"),
    "a recipe that the model cannot take": Bad(
        "/generate", {"model": "{model}", "count": 1, "recipe": {"finetuning": {"steps": 1}}}, "/recipe/finetuning"
    ),
    "a recipe that is far too deep": Bad("/generate", {"model": "{model}", "count": 1, "recipe": DEEP}, "/recipe"),
    "an evaluation of one training": Bad(
        "/evaluate", {"dataset_uri": "{dataset}", "synthetic_job": "{job}", "seeds": 1}, "/seeds"
    ),
    "another tenant's job": Bad(
        "/evaluate", {"dataset_uri": "{dataset}", "synthetic_job": "{other_job}"}, "/synthetic_job"
    ),
    "folds and a model at once": Bad("/evaluate", {"dataset_uri": "{dataset}", "folds": 3, "model": "{model}"}, ""),
    "one fold": Bad("/evaluate", {"dataset_uri": "{dataset}", "folds": 1}, "/folds"),
    "an unknown arm": Bad("/evaluate", {"dataset_uri": "{dataset}", "folds": 3, "arms": ["magic"]}, "/arms/0"),
    "metadata that is no text": Bad("/finetune", {"dataset_uri": "{dataset}", "metadata": {"a": {}}}, "/metadata/a"),
    "an empty idempotency key": Bad(
        "/finetune", {"dataset_uri": "{dataset}"}, "?idempotency-key", headers={"Idempotency-Key": ""}
    ),
    "too long an idempotency key": Bad(
        "/finetune", {"dataset_uri": "{dataset}"}, "?idempotency-key", headers={"Idempotency-Key": "x" * 300}
    ),
}


@pytest.fixture(scope="module")
def stored(gateway: Gateway) -> dict[str, str]:
    """What the table's bodies name."""
    dataset = put_dataset(gateway.store, gateway.tenant)
    other = put_dataset(gateway.store, ELSEWHERE, level=70)
    return {
        "bucket": gateway.settings.s3_bucket,
        "dataset": dataset.id,
        "model": put_model(gateway.store, gateway.tenant, dataset).id,
        "job": put_generated(gateway.store, gateway.tenant).spec.id,
        "other_dataset": other.id,
        "other_model": put_model(gateway.store, ELSEWHERE, other).id,
        "other_job": put_generated(gateway.store, ELSEWHERE).spec.id,
    }


def filled(value: Any, stored: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: filled(inner, stored) for name, inner in value.items()}
    return value.format(**stored) if isinstance(value, str) else value


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_refused_and_queues_nothing(gateway: Gateway, stored: dict[str, str], name: str) -> None:
    bad = REQUESTS[name]
    before = sorted(gateway.store.list(f"t/{gateway.tenant}/jobs/")), sorted(gateway.store.list("idempotency/"))
    queued = gateway.leases.backlog("datasets")
    headers = {"Idempotency-Key": f"bad {name}", **bad.headers}
    response = gateway.http.post(bad.path, json=filled(bad.body, stored), headers=headers)
    assert response.status_code == bad.status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert bad.culprit in {fault["pointer"] for fault in response.json()["errors"]}, response.text
    assert (
        sorted(gateway.store.list(f"t/{gateway.tenant}/jobs/")),
        sorted(gateway.store.list("idempotency/")),
    ) == before
    assert gateway.leases.backlog("datasets") == queued


def test_an_idempotency_key_stands_for_one_request(gateway: Gateway, stored: dict[str, str]) -> None:
    headers = {"Idempotency-Key": "one request"}
    body = {"dataset_uri": stored["dataset"]}
    assert gateway.http.post("/finetune", json=body, headers=headers).status_code == 202
    again = gateway.http.post("/finetune", json={**body, "max_pairs": 9}, headers=headers)
    assert (again.status_code, again.json()["errors"][0]["pointer"]) == (422, "?Idempotency-Key")


@pytest.fixture(scope="module")
def guarded(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = gateway.settings.model_copy(update={"require_keys": True})
    with started(settings, tmp_path_factory.mktemp("guarded")) as running:
        yield running


@pytest.mark.parametrize(
    ("name", "status", "slug"),
    [
        ("missing", 401, "unauthenticated"),
        ("wrong", 401, "unauthenticated"),
        ("revoked", 401, "unauthenticated"),
        ("a reader's", 403, "forbidden"),
    ],
)
def test_a_bad_key_is_refused(guarded: Gateway, name: str, status: int, slug: str) -> None:
    made = access.create_key(guarded.store, "radiology", "reader")
    if name == "revoked":
        access.revoke_key(guarded.store, made.key.id)
    token = {"missing": None, "wrong": made.token + "x"}.get(name, made.token)
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    response = httpx.post(f"{guarded.url}/finetune", json={"dataset_uri": "ds_" + "1" * 32}, headers=headers)
    assert (response.status_code, response.json()["type"]) == (status, f"urn:meddiff:problem:{slug}")


def test_a_store_that_is_not_reached_is_a_503(gateway: Gateway, tmp_path: Path) -> None:
    settings = gateway.settings.model_copy(update={"s3_endpoint": "127.0.0.1:1"})
    with started(settings, tmp_path) as other:
        response = other.http.post("/finetune", json={"dataset_uri": "ds_" + "1" * 32})
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")


def test_the_table_has_at_least_forty() -> None:
    assert len(DATASETS) + len(REQUESTS) >= 40
