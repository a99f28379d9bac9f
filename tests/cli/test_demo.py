"""The demo where it does not go well: it says why, and leaves no process behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from stored import archive

pytestmark = pytest.mark.slow


def demo(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "meddiff.cli", "demo", "--out", str(folder / "out"), "--count", "2", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left_behind(folder: Path) -> list[list[str]]:
    """Commands of running processes that name ``folder``, on their command line or in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join([*process.cmdline(), *process.environ().values()]):
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


def test_a_dataset_with_faults_ends_it_with_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "dataset.zip").write_bytes(archive(mask_size=(9, 9)))
    zipfile.ZipFile(tmp_path / "dataset.zip").extractall(tmp_path / "dataset")
    running = demo(tmp_path, "--dataset", str(tmp_path / "dataset"))
    output, _ = running.communicate(timeout=240)
    assert running.returncode == 1
    for n in range(3):
        assert f"masks/{n}.png" in output
    assert "stack down" in output
    assert "Traceback" not in output
    assert left_behind(tmp_path) == []


def test_sigterm_takes_the_stack_down(tmp_path: Path) -> None:
    running = demo(tmp_path)
    state = tmp_path / "out" / "stack" / "stack.json"
    deadline = time.monotonic() + 120
    while not state.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind(tmp_path)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=240)
    assert running.returncode != 0
    assert "stack down" in output
    assert left_behind(tmp_path) == []
    assert not state.exists()
