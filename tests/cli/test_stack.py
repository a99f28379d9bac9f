"""The embedded stack: up, what it reports, and that down leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import httpx
import psutil
import pytest
from meddiff.cli import app
from meddiff.embedded import stack
from meddiff.embedded.stack import Member, Stack, StackError
from typer.testing import CliRunner


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def with_children(started: Stack) -> list[psutil.Process]:
    processes = [process for member in started.members if (process := member.process()) is not None]
    return processes + [child for process in processes for child in process.children(recursive=True)]


@pytest.mark.slow
def test_up_and_down_leave_nothing_behind(tmp_path: Path) -> None:
    folder = ["--folder", str(tmp_path)]
    assert run("up", *folder, "--inpainters", "2", "--file-root", str(tmp_path))[0] == 0
    started = stack.read(tmp_path)
    assert started is not None
    try:
        names = [member.name for member in started.members]
        expected = ["gateway", "trainer", "mask_sampler", "inpainter-1", "inpainter-2", "quality_scorer"]
        assert names == ["redis", "s3", *expected]
        assert httpx.get(f"{started.address}/readyz").is_success
        assert run("up", *folder) == (0, f"already up: {started.address}\n")
        processes = with_children(started)

        victim = next(member for member in started.members if member.name == "mask_sampler")
        os.kill(victim.pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(victim.pid)], timeout=10)
        code, output = run("up", *folder)
        assert (code, "mask_sampler has ended" in output) == (1, True)
    finally:
        code, output = run("down", *folder)
    assert code == 0
    assert "gateway" in output
    assert [process for process in processes if process.is_running()] == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{started.address}/healthz")
    assert run("down", *folder) == (0, "nothing was up\n")


@pytest.mark.slow
def test_a_stack_that_does_not_come_up_is_ended_again(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StackError, match="gateway has ended"):
            stack.up(tmp_path, port=taken.getsockname()[1])
    assert stack.read(tmp_path) is None
    mine = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    assert not [command for command in mine if str(tmp_path) in " ".join(command)]


def test_a_stack_is_not_started_twice(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text(Stack(address="http://127.0.0.1:9").model_dump_json())
    with pytest.raises(FileExistsError):
        stack.up(tmp_path)


def test_a_later_process_of_the_same_id_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {n}" for n in range(50)))
    mine = Member(name="gateway", pid=os.getpid(), started=stack._started(psutil.Process()), log=log)
    assert mine.process() == psutil.Process()
    assert mine.log_tail(2) == "line 48\nline 49"
    former = mine.model_copy(update={"started": f"{mine.started}0"})
    assert former.process() is None
    (tmp_path / "stack.json").write_text(Stack(address="http://127.0.0.1:9", members=(former,)).model_dump_json())
    assert stack.down(tmp_path) == ()
    assert stack.read(tmp_path) is None
