"""The embedded stack: Redis, S3 and the five services as background processes of this machine, all on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
from pydantic import SecretStr

from meddiff.contracts.base import Contract
from meddiff.contracts.tasks import QUEUE_OF, Queue
from meddiff.embedded.servers import sockets_removed, start_redis, start_s3
from meddiff.planning.leases import Leases
from meddiff.settings import Settings

LOOPBACK = "127.0.0.1"
TENANT = "local"
"""Whose everything is: on loopback requests need no key."""
PREFERRED_PORT = 8080
WORKERS = ("trainer", "mask_sampler", "inpainter", "quality_scorer")

_READY_SECONDS = 180.0  # On two cores the workers' imports take most of a minute.
_SERVICE_PATIENCE = 30.0
_SERVER_PATIENCE = 60.0


class StackError(Exception):
    """The stack did not come up; the message ends with the last lines of the log at fault."""


class Member(Contract):
    """One process of the stack. ``started`` tells it from a later process of the same id (``_started``)."""

    name: str
    pid: int
    started: str | float  # Seconds since the epoch in what an older version has left.
    log: Path

    def process(self) -> psutil.Process | None:
        """The process, while it lives."""
        try:
            process = psutil.Process(self.pid)
            same = (
                self.started in (_started(process), process.create_time()) and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return None
        return process if same else None

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _started(process: psutil.Process) -> str:
    """When a process began: by the kernel's own count since its boot where there is one (proc_pid_stat(5), field 22),
    for the time of day moves when the clock is set. Raises ``psutil.NoSuchProcess``."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{process.pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except OSError:
        return str(process.create_time())


class Stack(Contract):
    """A stack that was started: where its gateway answers, and its processes in the order they were started."""

    address: str
    members: tuple[Member, ...] = ()

    @property
    def settings(self) -> Settings:
        """Where its store and Redis are, and the way in. Raises ``StackError`` where its gateway has ended."""
        gateway = next((member.process() for member in self.members if member.name == "gateway"), None)
        if gateway is None:
            raise StackError("the stack's gateway has ended")
        environment = gateway.environ()
        return Settings(
            redis_url=environment["MEDDIFF_REDIS_URL"],
            s3_endpoint=environment["MEDDIFF_S3_ENDPOINT"],
            s3_access_key=SecretStr(environment["MEDDIFF_S3_ACCESS_KEY"]),
            s3_secret_key=SecretStr(environment["MEDDIFF_S3_SECRET_KEY"]),
        )

    @property
    def dead(self) -> tuple[Member, ...]:
        """Members that have ended without being asked to."""
        return tuple(member for member in self.members if member.process() is None)


def read(folder: Path) -> Stack | None:
    """The stack that was started in ``folder`` and not yet taken down, if there is one."""
    state = _state(folder)
    return Stack.model_validate_json(state.read_bytes()) if state.exists() else None


def up(
    folder: Path, *, inpainters: int = 2, data: Path | None = None, file_roots: Sequence[Path] = (), port: int = 0
) -> Stack:
    """Starts the stack in ``folder`` (state, logs, scratch; the objects too, where ``data`` names no other folder) and
    returns once its gateway is ready and its workers serve their queues. ``port`` 0 is 8080 where that is free, else
    any free one.

    Raises ``StackError``, with everything it started ended again, where a part does not come up, and
    ``FileExistsError`` where the folder's stack is up already.
    """
    if read(folder) is not None:
        raise FileExistsError(f"a stack was started in {folder} already")
    folder.mkdir(parents=True, exist_ok=True)
    stack = Stack(address=f"http://{LOOPBACK}:{port or _free_port()}")
    try:
        with _uninterrupted():
            redis = start_redis(folder / "redis")
            stack = _record(folder, stack, "redis", redis.process.pid, folder / "redis" / "redis.log")
        with _uninterrupted():
            s3 = start_s3(data or folder / "data")
            stack = _record(folder, stack, "s3", s3.process.pid, (data or folder / "data") / "s3.log")
        _temporary(folder).mkdir(exist_ok=True)
        environment = os.environ | {
            "TMPDIR": str(_temporary(folder).resolve()),
            "MEDDIFF_REDIS_URL": redis.url,
            "MEDDIFF_S3_ENDPOINT": s3.endpoint,
            "MEDDIFF_S3_ACCESS_KEY": s3.access_key,
            "MEDDIFF_S3_SECRET_KEY": s3.secret_key,
            "MEDDIFF_HOST": LOOPBACK,
            "MEDDIFF_PORT": stack.address.rpartition(":")[2],
            "MEDDIFF_REQUIRE_KEYS": "false",
            "MEDDIFF_TENANT": TENANT,
            "MEDDIFF_FILE_ROOTS": json.dumps({TENANT: [str(root.resolve()) for root in file_roots]}),
            "MEDDIFF_SCRATCH": str((folder / "scratch").resolve()),
        }
        stack = _start_service(folder, stack, "gateway", "gateway", environment)
        for worker in WORKERS:
            for number in range(1, (inpainters if worker == "inpainter" else 1) + 1):
                name = f"{worker}-{number}" if worker == "inpainter" else worker
                stack = _start_service(folder, stack, name, worker, environment)
        _wait_until_ready(stack, redis.url, inpainters)
    except BaseException as error:
        down(folder)
        if isinstance(error, (RuntimeError, OSError)):
            raise StackError(str(error)) from error
        raise
    return stack


def down(folder: Path) -> tuple[Member, ...]:
    """Ends every process of the folder's stack: the services first, then the servers they need; what does not leave on
    SIGTERM is killed with all its children. Returns the members that were still running."""
    stack = read(folder)
    if stack is None:
        return ()
    running = tuple(member for member in stack.members if member.process() is not None)
    servers = [member for member in running if member.name in ("redis", "s3")]
    _end([member for member in running if member not in servers], _SERVICE_PATIENCE)
    _end(servers, _SERVER_PATIENCE)
    for member in stack.members:
        with suppress(ChildProcessError):  # Not a child of this process, or waited for already.
            os.waitpid(member.pid, os.WNOHANG)
    shutil.rmtree(_temporary(folder), ignore_errors=True)
    _state(folder).unlink()
    return running


def _state(folder: Path) -> Path:
    return folder / "stack.json"


def _temporary(folder: Path) -> Path:
    """The services' own place for temporary files: a killed process leaves some."""
    return folder / "tmp"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block is left, so that no process is started and not written down."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {n: signal.signal(n, lambda number, _: waiting.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])


def _start_service(folder: Path, stack: Stack, name: str, module: str, environment: dict[str, str]) -> Stack:
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with _uninterrupted(), log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", f"meddiff_services.{module}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return _record(folder, stack, name, process.pid, log)


def _record(folder: Path, stack: Stack, name: str, pid: int, log: Path) -> Stack:
    """The stack with one more member, written down at once so that ``down`` finds it whatever happens next."""
    member = Member(name=name, pid=pid, started=_started(psutil.Process(pid)), log=log.resolve())
    stack = stack.model_copy(update={"members": (*stack.members, member)})
    fresh = _state(folder).with_suffix(".part")
    fresh.write_text(stack.model_dump_json(indent=2))
    fresh.replace(_state(folder))
    return stack


def _wait_until_ready(stack: Stack, redis_url: str, inpainters: int) -> None:
    leases = Leases.connect(redis_url, seconds=1)
    wanted: dict[Queue, int] = dict.fromkeys(QUEUE_OF.values(), 1) | {"inpainting": inpainters}
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        for member in stack.dead:
            raise RuntimeError(f"{member.name} has ended:\n{member.log_tail()}")
        serving = leases.workers()
        if all(serving.get(queue, 0) >= workers for queue, workers in wanted.items()) and _answers(stack):
            return
        time.sleep(0.1)
    tails = "\n".join(f"--- {member.log}\n{member.log_tail(5)}" for member in stack.members)
    raise RuntimeError(f"the stack is not ready after {_READY_SECONDS:.0f} s:\n{tails}")


def _answers(stack: Stack) -> bool:
    try:
        return httpx.get(f"{stack.address}/readyz", trust_env=False).is_success
    except httpx.TransportError:
        return False


def _end(members: Sequence[Member], patience: float) -> None:
    """SIGTERM to each, SIGKILL to the sessions of those that stay; returns when all are gone."""
    found = [process for member in members if (process := member.process()) is not None]
    families = list(found)
    for process in found:
        with suppress(psutil.NoSuchProcess):
            families += process.children(recursive=True)
    with sockets_removed([process.pid for process in families]):
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(families, patience)
        for process in families:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(families)


def _free_port() -> int:
    """``PREFERRED_PORT`` where nobody listens on it, else one that the system picks."""
    for port in (PREFERRED_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RuntimeError("no free port on loopback")
