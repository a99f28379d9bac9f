"""The Python client against a real gateway."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from gateways import Gateway
from meddiff.client import DELIVERED, Client, ServiceError
from meddiff.contracts.jobs import End, Job
from meddiff.contracts.recipes import RECIPES
from meddiff.store.keys import JobKeys
from stored import Generated, archive, png, put_dataset, put_generated, put_model


@pytest.fixture
def client(gateway: Gateway) -> Client:
    return Client(gateway.url)


@pytest.fixture
def made(gateway: Gateway) -> Generated:
    return put_generated(gateway.store, gateway.tenant)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset as a folder of this machine."""
    (tmp_path / "dataset.zip").write_bytes(archive())
    zipfile.ZipFile(tmp_path / "dataset.zip").extractall(tmp_path / "dataset")
    return tmp_path / "dataset"


def test_jobs_are_started_read_and_listed(client: Client, gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    card = put_model(gateway.store, gateway.tenant, dataset, "listed")
    tuned = client.finetune(dataset.id, override={"finetuning": {"steps": 7}}, max_pairs=2, metadata={"ward": "3"})
    assert (tuned.kind, tuned.recipe.finetuning.steps, tuned.metadata) == ("finetune", 7, {"ward": "3"})
    generated = client.generate("listed", 3, seed=5, override={"work": {"attempts": 2}})
    assert (generated.request["seed"], generated.recipe.work.attempts) == (5, 2)
    assert client.job(tuned.id).id == tuned.id
    assert [job.id for job, _ in zip(client.jobs(), range(2), strict=False)] == [generated.id, tuned.id]
    assert {job.kind for job in client.jobs(kind="generate")} == {"generate"}
    assert client.model("listed").id == card.id
    assert card.id in {model.id for model in client.models()}
    assert client.recipes() == RECIPES


def test_what_a_newer_service_adds_is_passed_over_and_a_key_may_end_with_a_line() -> None:
    sent: list[str | None] = []

    class Newer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(self.headers["Authorization"])
            body = b'{"models": [], "next": null, "newer": {"field": 1}}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Newer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}", key="mdft_1234\r\n") as newer:
            assert newer.models() == ()
        server.shutdown()
    assert sent == ["Bearer mdft_1234"]


def test_a_list_goes_over_all_pages(client: Client, gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    started = {client.finetune(dataset.id).id for _ in range(25)}
    assert started <= {job.id for job in client.jobs(kind="finetune")}


def test_faults_are_raised_with_the_problem(client: Client) -> None:
    with pytest.raises(ServiceError) as caught:
        client.finetune("", max_pairs=1)
    assert {fault.pointer for fault in caught.value.problem.errors} == {"/dataset_uri", "/max_pairs"}
    with pytest.raises(ServiceError) as caught:
        client.job("../models")
    assert caught.value.problem.status == 404


def test_wait_tells_of_changes_until_the_end(client: Client, gateway: Gateway) -> None:
    job = client.finetune(put_dataset(gateway.store, gateway.tenant).id)
    seen: list[Job] = []

    def on_update(update: Job) -> None:
        seen.append(update)
        if len(seen) == 1:
            end = End(status="failed", finished_at=datetime.now(UTC))
            gateway.store.create_json(JobKeys(gateway.tenant, job.id).end, end)

    ended = client.wait(job.id, on_update)
    assert ended.status == "failed"
    assert (seen[0].status, seen[-1]) == ("queued", ended)


def test_cancel(client: Client, gateway: Gateway) -> None:
    job = client.cancel(client.finetune(put_dataset(gateway.store, gateway.tenant).id).id)
    assert job.status in ("cancelling", "cancelled")


def test_pull_fetches_and_checks_everything(client: Client, made: Generated, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = client.pull(made.spec.id, tmp_path, lambda done, total: seen.append((done, total)))
    assert manifest == made.manifest
    assert seen == [(n, 8) for n in range(1, 9)]
    assert (tmp_path / "contact_sheet.png").read_bytes() == made.pictures["contact_sheet"]
    for pair in manifest.pairs:
        for what in DELIVERED:
            data = (tmp_path / "pairs" / f"{pair.index:08d}.{what}.png").read_bytes()
            assert hashlib.sha256(data).hexdigest() == getattr(pair, what).sha256
    assert not list(tmp_path.rglob("*.part"))


def test_an_interrupted_pull_goes_on(client: Client, made: Generated, gateway: Gateway, tmp_path: Path) -> None:
    client.pull(made.spec.id, tmp_path)
    right, wrong = tmp_path / "pairs" / "00000000.image.png", tmp_path / "pairs" / "00000000.guide.png"
    wrong.write_bytes(b"cut off")
    gateway.store.delete([JobKeys(gateway.tenant, made.spec.id).candidate(0, "image")])
    before = right.stat().st_mtime_ns
    client.pull(made.spec.id, tmp_path)
    assert right.stat().st_mtime_ns == before
    assert wrong.read_bytes() == made.pictures["0/guide"]


def test_pull_refuses_a_picture_that_is_not_the_manifests(
    client: Client, made: Generated, gateway: Gateway, tmp_path: Path
) -> None:
    gateway.store.put(JobKeys(gateway.tenant, made.spec.id).candidate(2, "label"), png(1))
    with pytest.raises(ValueError, match="pair 2: the label"):
        client.pull(made.spec.id, tmp_path)
    assert not (tmp_path / "pairs" / "00000002.label.png").exists()


def test_previews(client: Client, gateway: Gateway) -> None:
    job = client.finetune(put_dataset(gateway.store, gateway.tenant).id)
    assert client.previews(job.id) == ()
    gateway.store.put(JobKeys(gateway.tenant, job.id).preview(3, "inpainter"), png(3))
    (preview,) = client.previews(job.id)
    assert client.preview(job.id, preview.name) == png(3)


def test_a_local_folder_is_validated_and_uploaded(client: Client, folder: Path) -> None:
    report = client.validate(folder)
    assert (report.valid, report.pairs) == (True, 3)
    uploaded = client.upload(folder)
    assert uploaded.id == report.dataset_id == client.upload(folder.with_suffix(".zip")).id
    assert uploaded in client.datasets()
    assert len(client.dataset(uploaded.id).cases) == 3
    assert client.validate(uploaded.id).valid


def test_an_upload_that_is_too_large_is_a_problem(client: Client, gateway: Gateway, tmp_path: Path) -> None:
    path = tmp_path / "large.zip"
    path.write_bytes(b"0" * (3 * gateway.settings.max_upload_bytes))
    with pytest.raises(ServiceError) as caught:
        client.upload(path)
    assert caught.value.problem.status == 413


def test_a_service_that_is_not_there() -> None:
    with Client("http://127.0.0.1:9") as nowhere, pytest.raises(httpx.ConnectError):
        nowhere.models()


def test_what_goes_to_this_machine_passes_no_proxy(
    client: Client, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Client(gateway.url) as fresh:
        assert fresh.recipes() == client.recipes()


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_before_a_service_that_is_away_is_asked_again(status: int) -> None:
    answers = iter([status, status, 200])

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"models": [], "next": null}'
            self.send_response(next(answers))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as behind:
            assert behind.models() == ()
        server.shutdown()


def test_what_an_earlier_try_has_removed_is_removed() -> None:
    answers = iter([504, 404])

    class Proxy(BaseHTTPRequestHandler):
        def do_DELETE(self) -> None:
            self.send_response(next(answers))
            self.send_header("Content-Length", "0")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as behind:
            behind.delete_model("md_0")
        server.shutdown()
    assert next(answers, None) is None


def test_many_downloads_at_once_share_a_client(client: Client, made: Generated, tmp_path: Path) -> None:
    threads = [threading.Thread(target=client.pull, args=(made.spec.id, tmp_path / str(n))) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.rglob("*.image.png"))) == 6


def test_datasets_and_models_are_removed(client: Client, gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant, level=150)
    card = put_model(gateway.store, gateway.tenant, dataset)
    with pytest.raises(ServiceError) as caught:
        client.delete_dataset(dataset.id)
    assert [fault.pointer for fault in caught.value.problem.errors] == [f"/models/{card.id}"]
    client.delete_model(card.id)
    client.delete_dataset(dataset.id)
    assert dataset.id not in {one.id for one in client.datasets()}
