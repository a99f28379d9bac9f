"""A gateway as its own process, and the store and Redis behind it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import httpx
import pytest
from meddiff.embedded.servers import RedisServer, S3Server
from meddiff.planning.leases import Leases
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore
from pydantic import SecretStr

T = TypeVar("T")
MAX_UPLOAD_BYTES = 3 * 2**20


@dataclass(frozen=True)
class Gateway:
    """A running gateway. ``file_root`` is a folder that it may read ``file://`` URIs from."""

    settings: Settings
    url: str
    http: httpx.Client
    store: ObjectStore
    leases: Leases
    process: subprocess.Popen[bytes]

    @property
    def tenant(self) -> str:
        return self.settings.tenant

    @property
    def file_root(self) -> Path:
        return self.settings.file_roots[self.tenant][0]


@pytest.fixture(scope="module")
def gateway(s3: S3Server, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for a module's tests, with a bucket of its own."""
    folder = tmp_path_factory.mktemp("gateway")
    root = folder / "allowed"
    root.mkdir()
    settings = Settings(
        redis_url=redis_server.url,
        s3_endpoint=s3.endpoint,
        s3_access_key=SecretStr(s3.access_key),
        s3_secret_key=SecretStr(s3.secret_key),
        s3_bucket=f"gateway-{uuid4().hex}",
        file_roots={"local": (root,)},
        require_keys=False,
        max_upload_bytes=MAX_UPLOAD_BYTES,
        sweep_seconds=0.3,
    )
    with started(settings, folder) as running:
        running.store.ensure_bucket()
        yield running


@contextmanager
def started(settings: Settings, folder: Path, command: Sequence[str] | None = None) -> Iterator[Gateway]:
    """A gateway on a fresh port, from its first answer on; its log is ``folder/gateway.log``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, **variables(settings), "MEDDIFF_PORT": str(port)}
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            command or [sys.executable, "-m", "meddiff_services.gateway"], env=environment, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=url, timeout=30) as http:
            until_it_answers(process, http, folder / "gateway.log")
            store, leases = (
                ObjectStore.from_settings(settings),
                Leases.connect(settings.redis_url, settings.lease_seconds),
            )
            yield Gateway(settings, url, http, store, leases, process)
    finally:
        process.terminate()
        process.wait(20)


def variables(settings: Settings) -> dict[str, str]:
    """The environment that gives a process these settings."""
    found: dict[str, str] = {}
    for name, value in settings:
        if isinstance(value, SecretStr):
            found[f"MEDDIFF_{name.upper()}"] = value.get_secret_value()
        elif isinstance(value, tuple | dict):
            found[f"MEDDIFF_{name.upper()}"] = json.dumps(value, default=str)
        elif value is not None:
            found[f"MEDDIFF_{name.upper()}"] = str(value)
    return found


def until(condition: Callable[[], T], seconds: float = 20.0) -> T:
    """What ``condition`` gives once it holds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
    return found


def until_it_answers(process: subprocess.Popen[bytes], http: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if http.get("/healthz").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"the gateway did not start:\n{log.read_text(errors='replace')[-4000:]}")
