"""A job's progress on a terminal as a bar, elsewhere as a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from meddiff.client import Client
from meddiff.contracts.jobs import Job

_SECONDS_BETWEEN_LINES = 5.0


def watch(client: Client, job_id: str, console: Console, on_update: Callable[[Job], None] | None = None) -> Job:
    """Shows the job until it has ended, and returns it; ``on_update`` is called as ``Client.wait`` does."""
    show = _bar if console.is_terminal else _lines
    return show(client, job_id, console, on_update or (lambda job: None))


def describe(job: Job) -> str:
    """Where the job stands, in a line."""
    parts = [job.stage or job.status if job.status == "running" else job.status]
    if job.progress is not None:
        parts.append(f"{job.progress.done}/{job.progress.total} {job.progress.unit}")
    if job.eta_seconds is not None:
        parts.append(f"about {_duration(job.eta_seconds)} left")
    if job.queue_position is not None:
        parts.append(f"place {job.queue_position} in the queue")
    return ", ".join(parts)


def _bar(client: Client, job_id: str, console: Console, on_update: Callable[[Job], None]) -> Job:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rest]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        line = bar.add_task("", total=None, rest="")

        def update(job: Job) -> None:
            done, total = (job.progress.done, job.progress.total) if job.progress is not None else (0, None)
            rest = job.progress.unit if job.progress is not None else ""
            if job.eta_seconds is not None:
                rest += f", about {_duration(job.eta_seconds)} left"
            bar.update(line, description=describe(job).partition(",")[0], completed=done, total=total, rest=rest)
            on_update(job)

        return client.wait(job_id, update)


def _lines(client: Client, job_id: str, console: Console, on_update: Callable[[Job], None]) -> Job:
    last_stage: str | None = None
    last_line = ""
    last_time = 0.0

    def update(job: Job) -> None:
        nonlocal last_stage, last_line, last_time
        line = describe(job)
        due = job.stage != last_stage or time.monotonic() - last_time >= _SECONDS_BETWEEN_LINES
        if due and line != last_line:
            last_stage, last_line, last_time = job.stage, line, time.monotonic()
            console.print(f"  {line}", highlight=False, markup=False)
        on_update(job)

    return client.wait(job_id, update)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
