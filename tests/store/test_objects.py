"""What the object store promises, against a real S3 server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest
from meddiff.contracts.problems import Fault
from meddiff.embedded.servers import S3Server
from meddiff.settings import Settings
from meddiff.store.objects import NotFound, ObjectStore, StoreRefused, StoreUnavailable
from meddiff.store.retry import RetryPolicy
from minio.error import S3Error
from pydantic import SecretStr

QUICK = RetryPolicy(first=0.01, deadline=0.5)


def test_get_returns_what_put_stored(store: ObjectStore) -> None:
    store.put("t/a/one.bin", b"\x00\xff" * 5)
    store.put("t/a/empty", b"")
    assert store.get("t/a/one.bin") == b"\x00\xff" * 5
    assert store.get("t/a/empty") == b""
    assert store.size("t/a/one.bin") == 10
    assert abs(store.modified("t/a/one.bin").timestamp() - time.time()) < 60


def test_put_replaces(store: ObjectStore) -> None:
    store.put("k", b"first")
    store.put("k", b"second")
    assert store.get("k") == b"second"


def test_json_round_trip_is_canonical(store: ObjectStore) -> None:
    fault = Fault(pointer="/count", detail="must be positive")
    store.put_json("fault.json", fault)
    assert store.get_json("fault.json", Fault) == fault
    assert store.get("fault.json") == b'{"detail":"must be positive","pointer":"/count"}'


@pytest.mark.parametrize("call", [ObjectStore.get, ObjectStore.size, ObjectStore.modified])
def test_a_missing_object_is_not_found(store: ObjectStore, call: Callable[[ObjectStore, str], object]) -> None:
    assert not store.exists("nothing/here")
    with pytest.raises(NotFound):
        call(store, "nothing/here")


def test_a_missing_file_is_not_found_and_leaves_none(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        store.download_file("nothing", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_create_has_one_winner_whose_bytes_stay(store: ObjectStore) -> None:
    for round_ in range(2):
        start = threading.Barrier(6)
        key = f"end/{round_}.json"

        def attempt(n: int, key: str = key, start: threading.Barrier = start) -> bool:
            start.wait()
            return store.create(key, b'{"n":%d}' % n)

        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(attempt, range(6)))
        assert won.count(True) == 1
        assert store.get(key) == b'{"n":%d}' % won.index(True)
        assert not store.create(key, b"late")


def test_a_lost_answer_does_not_lose_the_win(store: ObjectStore, settings: Settings, s3: S3Server) -> None:
    """A proxy swallows the answer to the first PUT: the retry meets 412 and still knows that the object is its own."""
    with _swallowing_first_answer(s3.endpoint) as endpoint:
        flaky = ObjectStore.from_settings(settings.model_copy(update={"s3_endpoint": endpoint}), QUICK)
        assert flaky.create("end.json", b"mine")
    assert store.get("end.json") == b"mine"


def test_list_is_in_order_and_starts_after(store: ObjectStore) -> None:
    keys = [f"done/masks/{n:08d}.json" for n in range(1203)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"{}"), reversed(keys)))
    store.put("done/quality/00000000.json", b"{}")
    assert list(store.list("done/masks/")) == keys
    assert list(store.list("done/masks/", start_after=keys[1100])) == keys[1101:]
    assert list(store.list("done/masks/", start_after=keys[-1])) == []
    assert list(store.list("nothing/")) == []
    assert len(list(store.list("done/"))) == 1204


def test_children_are_names_one_level_down(store: ObjectStore) -> None:
    for key in ("j/spec.json", "j/done/a/0.json", "j/done/b/0.json", "j/end.json", "jj/other"):
        store.put(key, b"{}")
    assert store.children("j/") == ("done", "end.json", "spec.json")
    assert store.children("j/done/") == ("a", "b")
    assert store.children("none/") == ()


def test_children_of_a_large_folder(store: ObjectStore) -> None:
    names = tuple(f"{n:05d}" for n in range(1101))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(f"jobs/{name}/spec.json", b"{}"), names))
    assert store.children("jobs/") == names


def test_delete_is_idempotent_and_spares_the_rest(store: ObjectStore) -> None:
    for key in ("d/1", "d/2", "d/sub/3", "dd/4"):
        store.put(key, b"x")
    store.delete(["d/1", "d/never"])
    assert list(store.list("d/")) == ["d/2", "d/sub/3"]
    store.delete_prefix("d/")
    store.delete_prefix("d/")
    assert list(store.list("d")) == ["dd/4"]
    store.delete([])


def test_parts_of_an_upload_that_was_cut_off_go_with_their_prefix(store: ObjectStore) -> None:
    client = store._client
    for key in ("t/one/latents", "t/two/latents"):
        client._create_multipart_upload(store.bucket, key, {})
    store.delete_prefix("t/one/")

    def left() -> list[str | None]:
        return [upload.object_name for upload in client._list_multipart_uploads(store.bucket).uploads]

    assert left() == ["t/two/latents"]
    store.abort_uploads("", datetime.now(UTC) - timedelta(days=1))
    assert left() == ["t/two/latents"], "it may go on"
    store.abort_uploads("", datetime.now(UTC) + timedelta(hours=1))
    assert left() == []


def test_a_store_that_keeps_parts_of_uploads_deletes_all_the_same(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise S3Error(Mock(status=403), "AccessDenied", "", "", "", "")

    monkeypatch.setattr(store._client, "_list_multipart_uploads", refused)
    store.put("t/one/case", b"x")
    store.delete_prefix("t/one/")
    assert list(store.list("t/one/")) == []


def test_files_in_several_parts(store: ObjectStore, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096 * 130  # 130 MiB, more than two parts
    (tmp_path / "out").write_bytes(data)
    store.upload_file("big", tmp_path / "out")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.download_file("big", tmp_path / "back"), range(4)))
    assert (tmp_path / "back").read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "out"]


def test_a_presigned_link_reads_without_credentials(store: ObjectStore) -> None:
    store.put("pic.png", b"png", "image/png")
    answer = httpx.get(store.presigned_get("pic.png"))
    assert answer.content == b"png"
    assert answer.headers["content-type"] == "image/png"
    assert httpx.get(store.presigned_get("none.png")).status_code == 404


def test_presigned_links_name_the_public_endpoint(settings: Settings) -> None:
    public = settings.model_copy(update={"s3_public_endpoint": "s3.example.org"})
    assert ObjectStore.from_settings(public).presigned_get("a/b").startswith("http://s3.example.org/")
    outside = settings.model_copy(update={"s3_public_endpoint": "https://s3.example.org"})
    assert ObjectStore.from_settings(outside).presigned_get("a/b").startswith("https://s3.example.org/")


def test_another_bucket(store: ObjectStore) -> None:
    other = store.of_bucket("sources")
    other.ensure_bucket()
    other.put("k", b"theirs")
    assert not store.exists("k")
    assert other.get("k") == b"theirs"


def test_ensure_bucket_may_be_called_by_all_at_once(settings: Settings) -> None:
    stores = [ObjectStore.from_settings(settings) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ObjectStore.ensure_bucket, stores))
    stores[0].ping()


def test_an_unreachable_store_is_unavailable_after_the_deadline(settings: Settings) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{unheard.getsockname()[1]}"
        store = ObjectStore.from_settings(settings.model_copy(update={"s3_endpoint": endpoint}), QUICK)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.get("k")
        assert 0.4 < time.monotonic() - began < 3
        with pytest.raises(StoreUnavailable):
            store.ping()
        with pytest.raises(StoreUnavailable):
            store.create("k", b"")


def test_wrong_credentials_and_a_missing_bucket_are_refused_at_once(store: ObjectStore, settings: Settings) -> None:
    wrong = ObjectStore.from_settings(settings.model_copy(update={"s3_secret_key": SecretStr("wrong")}))
    missing = ObjectStore.from_settings(settings.model_copy(update={"s3_bucket": "no-such-bucket"}))
    began = time.monotonic()
    for broken in (wrong, missing):
        with pytest.raises(StoreRefused):
            broken.ping()
    with pytest.raises(StoreRefused):
        wrong.put("k", b"")
    with pytest.raises(StoreRefused):
        wrong.create("k", b"")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("status", "code", "patient"),
    [(503, "XMinioServerNotInitialized", True), (503, "SlowDownRead", True), (403, "AccessDenied", False)],
)
def test_a_store_that_is_not_ready_is_waited_for(settings: Settings, status: int, code: str, patient: bool) -> None:
    asked: list[str] = []

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            ready = len(asked) > 2
            body = b"there" if ready else f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
            self.send_response(200 if ready else status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/xml")
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = settings.model_copy(update={"s3_endpoint": f"127.0.0.1:{server.server_port}"})
        store = ObjectStore(there, RetryPolicy(first=0.01, deadline=5.0))
        if patient:
            assert store.get("key") == b"there"
        else:
            with pytest.raises(StoreRefused):
                store.get("key")
        server.shutdown()
    assert len(asked) == (3 if patient else 1)


def test_retries_stop_at_the_first_permanent_error() -> None:
    calls: list[int] = []

    def attempt() -> None:
        calls.append(len(calls))
        raise ConnectionError if len(calls) < 3 else KeyError

    with pytest.raises(KeyError):
        QUICK(attempt, lambda error: isinstance(error, ConnectionError))
    assert calls == [0, 1, 2]


class _swallowing_first_answer:
    """A TCP proxy to ``endpoint`` that closes its first connection instead of passing on the answer."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._first = True

    def __enter__(self) -> str:
        threading.Thread(target=self._serve, daemon=True).start()
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        for client in self._connections():
            with client, socket.create_connection(self._target) as server:
                threading.Thread(target=_pass_on, args=(client, server), daemon=True).start()
                swallowed, self._first = self._first, False
                if swallowed:
                    server.recv(65536)
                    client.shutdown(socket.SHUT_RDWR)
                else:
                    _pass_on(server, client)

    def _connections(self) -> Iterator[socket.socket]:
        while True:
            try:
                yield self._listener.accept()[0]
            except OSError:
                return


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        return
