"""The services as real processes behind proxies to a real Redis and a real S3 server, and a supervisor that starts what
has ended again, as Kubernetes or systemd would."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import redis
from meddiff.embedded.servers import RedisServer, S3Server, sockets_removed, start_redis, start_s3
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore
from meddiff.store.retry import RetryPolicy
from proxy import Proxy
from pydantic import SecretStr

SERVICES = {
    "gateway-1": "gateway", "gateway-2": "gateway", "trainer": "trainer", "mask_sampler": "mask_sampler",
    "inpainter-1": "inpainter", "inpainter-2": "inpainter", "quality_scorer": "quality_scorer",
}  # fmt: skip
QUEUES = ("datasets", "training", "masks", "inpainting", "quality")


class Rig:
    """``more``: settings of every service, by the name of their variable."""

    def __init__(self, folder: Path, models: Path, seed: int, more: dict[str, str]) -> None:
        self.folder = folder
        self.restarts: Counter[str] = Counter()
        self.redis: RedisServer = start_redis(folder / "redis")
        self.s3: S3Server = start_s3(folder / "data")
        self.to_redis = Proxy(lambda: _port(self.redis.url), seed)
        self.to_s3 = Proxy(lambda: _port(self.s3.endpoint), seed + 1)
        self._past = Proxy(lambda: _port(self.s3.endpoint), seed + 2)
        self._ports = {name: _free_port() for name in SERVICES if name.startswith("gateway")}
        (folder / "logs").mkdir()
        (folder / "tmp").mkdir()
        self._environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder / "tmp"),
            "MEDDIFF_REDIS_URL": f"redis://127.0.0.1:{self.to_redis.port}/0",
            "MEDDIFF_S3_ENDPOINT": f"127.0.0.1:{self.to_s3.port}",
            "MEDDIFF_S3_ACCESS_KEY": self.s3.access_key,
            "MEDDIFF_S3_SECRET_KEY": self.s3.secret_key,
            "MEDDIFF_REQUIRE_KEYS": "false",
            "MEDDIFF_MODEL_ROOT": str(models),
            "MEDDIFF_SCRATCH": str(folder / "scratch"),
            "MEDDIFF_SWEEP_SECONDS": "0.5",
            "MEDDIFF_LEASE_SECONDS": "6",
            **more,
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._closing = threading.Event()
        for name in SERVICES:
            self._start(name)
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    # ------------------------------------------------------------------------------------------------------ the parts

    @property
    def store(self) -> ObjectStore:
        """The bucket itself, past the faults; where the store is killed, once it is back."""
        settings = Settings(
            s3_endpoint=f"127.0.0.1:{self._past.port}",
            s3_access_key=SecretStr(self.s3.access_key),
            s3_secret_key=SecretStr(self.s3.secret_key),
        )
        return ObjectStore.from_settings(settings, RetryPolicy(deadline=90.0))

    def client(self) -> redis.Redis:
        """Redis itself, past the proxy."""
        return redis.Redis.from_url(self.redis.url)

    def process(self, name: str) -> psutil.Process | None:
        try:
            return psutil.Process(self._processes[name].pid)
        except psutil.NoSuchProcess:
            return None

    def ask(self, method: str, path: str, **options: object) -> httpx.Response | None:
        """The answer of whichever gateway gives one; None where neither does, or it is for later."""
        for port in self._ports.values():
            with suppress(httpx.TransportError):
                response = httpx.request(method, f"http://127.0.0.1:{port}{path}", timeout=30, **options)  # type: ignore[arg-type]
                if response.status_code not in (429, 503):
                    return response
        return None

    def _start(self, name: str) -> None:
        more = {"MEDDIFF_PORT": str(self._ports[name])} if name in self._ports else {}
        with (self.folder / "logs" / f"{name}.log").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"meddiff_services.{SERVICES[name]}"],
                env=self._environment | more | {"MEDDIFF_SCRATCH": str(self.folder / "scratch" / name)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _supervise(self) -> None:
        while not self._closing.wait(0.3):
            for name, process in list(self._processes.items()):
                if process.poll() is not None:
                    _kill_session(process.pid)
                    self.restarts[name] += 1
                    self._start(name)

    # --------------------------------------------------------------------------------------------------------- faults

    def kill(self, name: str) -> None:
        """``kill -9`` of a service with its children."""
        _kill_session(self._processes[name].pid)

    def terminate(self, name: str) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._processes[name].pid, signal.SIGTERM)

    def stand_still(self, name: str, seconds: float) -> None:
        """``SIGSTOP``, and ``SIGCONT`` after so long."""
        found = self._family(name)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        time.sleep(seconds)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def disk_full(self, name: str, seconds: float) -> None:
        """No process of a service may write a byte to any file, as where its disk is full."""
        found = self._family(name)
        for process in found:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        time.sleep(seconds)
        for process in found:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)

    def redis_anew(self) -> None:
        """Redis is killed and starts empty."""
        self.redis.process.kill()
        self.redis.process.wait()
        self.redis = start_redis(self.folder / "redis")

    def redis_read_only(self, seconds: float) -> None:
        with self.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", "1")
            time.sleep(seconds)
            client.execute_command("REPLICAOF", "NO", "ONE")

    def redis_out_of_memory(self, seconds: float) -> None:
        with self.client() as client:
            client.config_set("maxmemory", "1")
            time.sleep(seconds)
            client.config_set("maxmemory", "0")

    def messages_twice(self, seconds: float) -> None:
        """Each message that waits in a queue is put there again."""
        until = time.monotonic() + seconds
        seen: set[bytes] = set()
        with self.client() as client:
            while time.monotonic() < until:
                for queue in QUEUES:
                    for message in client.lrange(queue, 0, -1):
                        if message not in seen:
                            seen.add(message)
                            client.rpush(queue, message)
                time.sleep(0.02)

    def s3_anew(self, seconds: float) -> None:
        """The store is killed and comes back with what it acknowledged."""
        with sockets_removed([self.s3.process.pid]):
            self.s3.process.kill()
            self.s3.process.wait()
        time.sleep(seconds)
        self.s3 = start_s3(self.folder / "data")

    def close(self) -> None:
        self._closing.set()
        self._supervisor.join()
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                _kill_session(process.pid)
                process.wait()
            _kill_session(process.pid)
        self.to_redis.close()
        self.to_s3.close()
        self._past.close()
        self.redis.stop()
        self.s3.stop()

    def _family(self, name: str) -> list[psutil.Process]:
        process = self.process(name)
        if process is None:
            return []
        with suppress(psutil.NoSuchProcess):
            return [process, *process.children(recursive=True)]
        return []

    def log_lines(self, name: str, event: str) -> list[dict[str, object]]:
        """What a service logged under ``event``."""
        found = []
        for line in (self.folder / "logs" / f"{name}.log").read_text(errors="replace").splitlines():
            with suppress(ValueError):
                told = json.loads(line)
                if isinstance(told, dict) and told.get("event") == event:
                    found.append(told)
        return found


def _kill_session(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2].partition("/")[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
