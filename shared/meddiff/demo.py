"""The demo: the main job from an empty machine to a contact sheet, over the real services, on a stack of its own."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from meddiff.client import Client
from meddiff.contracts.jobs import Job
from meddiff.contracts.manifest import Manifest
from meddiff.embedded import stack
from meddiff.watching import watch

MAX_PAIRS = 30
MODEL_NAME = "demo"


REMOVED = ("stack", "pairs", "phantoms")
RESULTS = ("manifest.json", "contact_sheet.png", "preview.png")
MARK = ".demo"
"""A file that says that what a demo removes is a demo's."""


class JobFailedError(Exception):
    """A job of the demo ended otherwise than it should; the message lists the problem's faults."""


def run(dataset: Path | None, count: int, folder: Path, console: Console) -> bool:
    """Fine-tunes on at most 30 pairs of ``dataset`` (of phantoms where that is ``None``) and makes ``count``
    synthetic pairs; leaves ``preview.png``, ``manifest.json``, ``pairs/`` and ``contact_sheet.png`` in ``folder``.

    The stack, in ``folder/stack``, is taken down however it ends, and of it the logs remain. Returns whether all went
    well; where not, the reason and the end of each log have been printed. What an earlier demo left in ``folder`` is
    removed first. Raises ``ValueError``, and removes nothing, where that is the dataset, or not a demo's.
    """
    _refuse_to_remove(dataset, folder)
    _clear(folder)
    steps: list[tuple[str, float]] = []
    with _interruptible():
        try:
            return _run(dataset, count, folder, console, steps)
        except (JobFailedError, stack.StackError) as error:
            _print_logs(folder, console)
            console.print(str(error), markup=False, highlight=False)
            return False
        except BaseException:
            _print_logs(folder, console)
            raise
        finally:
            with _uninterruptible(), _timed(steps, "stack down", console):
                stack.down(folder / "stack")
                for name in ("data", "scratch", "redis"):
                    shutil.rmtree(folder / "stack" / name, ignore_errors=True)
            console.print(_time_table(steps))


def _run(dataset: Path | None, count: int, folder: Path, console: Console, steps: list[tuple[str, float]]) -> bool:
    if dataset is None:
        from meddiff import phantoms

        dataset = folder / "phantoms"
        with _timed(steps, "phantoms drawn", console):
            phantoms.write(dataset)
    begun = time.monotonic()
    with _timed(steps, "stack up", console):
        started = stack.up(folder / "stack", file_roots=[dataset])
    with Client(started.address) as client:
        preview = FirstPreview(client, folder / "preview.png", begun, console)
        with _timed(steps, "fine-tune", console):
            job = client.finetune(dataset.resolve().as_uri(), name=MODEL_NAME, max_pairs=MAX_PAIRS)
            _succeeded(watch(client, job.id, console, preview))
        with _timed(steps, f"generate {count} pairs", console):
            job = watch(client, client.generate(MODEL_NAME, count).id, console)
        if job.status == "incomplete":
            console.print(_problem_text(job), markup=False, highlight=False)
        else:
            _succeeded(job)
        with _timed(steps, "pull", console):
            manifest = client.pull(job.id, folder)
    _print_made(manifest, folder, console)
    return job.status == "succeeded"


class FirstPreview:
    """Saves the first preview of the job it is told of, once."""

    def __init__(self, client: Client, path: Path, begun: float, console: Console) -> None:
        self._client, self._path, self._begun, self._console = client, path, begun, console

    def __call__(self, job: Job) -> None:
        if self._path.exists():
            return
        for preview in self._client.previews(job.id)[:1]:
            self._path.write_bytes(self._client.preview(job.id, preview.name))
            seconds = time.monotonic() - self._begun
            self._console.print(f"  first preview after {seconds:.0f} s of the stack: {self._path}", highlight=False)


def _succeeded(job: Job) -> None:
    if job.status != "succeeded":
        raise JobFailedError(_problem_text(job))


def _problem_text(job: Job) -> str:
    lines = [f"{job.kind} {job.id}: {job.status}"]
    if job.problem is not None:
        lines += [job.problem.detail, *(f"  {fault.pointer}: {fault.detail}" for fault in job.problem.errors)]
    return "\n".join(lines)


def _refuse_to_remove(dataset: Path | None, folder: Path) -> None:
    for name in (*REMOVED, *RESULTS):
        one = (folder / name).resolve()
        if dataset is not None and (dataset.resolve().is_relative_to(one) or one.is_relative_to(dataset.resolve())):
            raise ValueError(
                f"a demo removes {folder / name} before it begins, and the dataset lies there: move either"
            )
        if one.exists() and not (folder / MARK).exists():
            raise ValueError(
                f"{folder / name} is no demo's, and a demo would remove it: move it, or name another --out"
            )


def _clear(folder: Path) -> None:
    """Ends what an earlier demo left running and removes what it left behind."""
    stack.down(folder / "stack")
    for name in REMOVED:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: with the stack taken down."""
    with _handled(signal.SIGTERM, signal.default_int_handler):
        yield


@contextmanager
def _uninterruptible() -> Iterator[None]:
    """A second Ctrl-C does not keep the stack from being taken down."""
    with _handled(signal.SIGINT, signal.SIG_IGN), _handled(signal.SIGTERM, signal.SIG_IGN):
        yield


@contextmanager
def _handled(
    number: signal.Signals, handler: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def _timed(steps: list[tuple[str, float]], name: str, console: Console) -> Iterator[None]:
    console.print(name, style="bold", highlight=False)
    begun = time.monotonic()
    try:
        yield
    finally:
        steps.append((name, time.monotonic() - begun))


def _time_table(steps: list[tuple[str, float]]) -> Table:
    table = Table("step", "seconds", box=None)
    for name, seconds in [*steps, ("in all", sum(seconds for _, seconds in steps))]:
        table.add_row(name, f"{seconds:.1f}")
    return table


def _print_made(manifest: Manifest, folder: Path, console: Console) -> None:
    rejected = ", ".join(f"{n} {reason}" for reason, n in manifest.counts.rejected.items()) or "none"
    console.print(
        f"{len(manifest.pairs)} synthetic pairs of {manifest.counts.generated} candidates (rejected: {rejected})\n"
        f"  {folder / 'contact_sheet.png'}\n  {folder / 'manifest.json'}\n  {folder / 'pairs'}",
        highlight=False,
    )


def _print_logs(folder: Path, console: Console) -> None:
    running = stack.read(folder / "stack")
    for member in running.members if running is not None else ():
        console.print(f"--- the end of {member.log}\n{member.log_tail()}", markup=False, highlight=False)
