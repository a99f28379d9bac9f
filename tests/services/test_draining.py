"""A trainer that is asked to leave within a segment, or whose time for it is nearly over, leaves a checkpoint; whoever
goes on ends with the same bits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from meddiff import phantoms
from meddiff.contracts.ids import model_id_of
from meddiff.contracts.jobs import FinetuneSpec
from meddiff.contracts.recipes import CPU, override
from meddiff.contracts.requests import FinetuneRequest
from meddiff.contracts.tasks import Marker, Task
from meddiff.importing import import_dataset, open_source
from meddiff.planning.dispatch import submit
from meddiff.settings import Settings
from meddiff.store.keys import JobKeys
from meddiff.store.objects import ObjectStore
from meddiff_services import worker as workers
from meddiff_services.trainer import tasks as tasks_of_trainer
from meddiff_services.worker import Worker

STEPS = 60
TINY = {"steps": STEPS, "segment_steps": STEPS, "sampling_steps": 2, "resolution": 16, "widths": (32,), "batch_size": 4}
JOBS = [f"0197f000-0000-7000-8000-00000000000{n}" for n in (1, 2)]


@pytest.fixture(autouse=True)
def staying() -> Iterator[None]:
    yield
    workers._leaving[0] = 0


def submitted(store: ObjectStore, settings: Settings, folder: Path, job_id: str) -> JobKeys:
    """A fine-tune whose dataset is imported, its mask generator trained in one segment."""
    with open_source(folder.as_uri(), settings, store, "local") as source:
        dataset = import_dataset(source, store, "local", lambda done, total: None, 2**30)
    spec = FinetuneSpec(
        tenant="local",
        id=job_id,
        created_at=datetime.now(UTC),
        request=FinetuneRequest(dataset_uri=dataset.id),
        recipe=override(CPU, {"mask_generation": TINY, "work": {"training_threads": 1}}),
        model_id=model_id_of(job_id),
    )
    submit(store, spec)
    keys = JobKeys("local", job_id)
    output = {
        "dataset_id": dataset.id, "pairs": 12, "backgrounds": 0, "prompt": None, "layout": dataset.layout,
        "cases": [case.image_sha256 for case in dataset.pairs],
    }  # fmt: skip
    imported = Marker(stage="import", shard=0, units=12, seconds=1.0, worker="test", output=output)
    store.put_json(keys.done("import", 0), imported)
    return keys


def checkpoints(store: ObjectStore, keys: JobKeys) -> list[int]:
    return [int(step) for step in store.children(keys.checkpoints("mask_generator"))]


def once_it_trains(worker: Worker, job_id: str, what: Callable[[], None]) -> None:
    """Does ``what`` after the first steps."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(live.done >= 3 for live in worker.leases.live("local", job_id)):
        time.sleep(0.02)
    what()


@pytest.mark.parametrize("why", ["asked to leave", "time is over"])
def test_a_segment_left_halfway_goes_on_where_it_was(
    settings: Settings, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    folder = tmp_path / "phantoms"
    phantoms.write(folder, pairs=12, backgrounds=0)
    settings = settings.model_copy(update={"file_roots": {"local": (tmp_path,)}})
    calm, left = (submitted(store, settings, folder, job_id) for job_id in JOBS)
    worker = Worker(settings, "meddiff_services.trainer.tasks", "test", lambda task: None)
    tasks = [Task(tenant="local", job_id=job_id, stage="mask_generator") for job_id in JOBS]
    assert worker.run(tasks[0]) == "done"

    def leave() -> None:
        if why == "asked to leave":
            workers._leaving[0] = 1
        else:
            monkeypatch.setattr(tasks_of_trainer, "TIME_TAKEN", 0.0)

    leaving = threading.Thread(target=once_it_trains, args=(worker, JOBS[1], leave))
    leaving.start()
    assert worker.run(tasks[1]) == "stopped"
    leaving.join()
    (halfway,) = checkpoints(store, left)
    assert 3 <= halfway < STEPS
    assert not store.exists(left.done("mask_generator", 0))

    workers._leaving[0] = 0
    monkeypatch.undo()
    elsewhere = settings.model_copy(update={"scratch": tmp_path / "another machine"})
    successor = Worker(elsewhere, "meddiff_services.trainer.tasks", "test", lambda task: None)
    assert successor.run(tasks[1]) == "done"
    name = "state.safetensors"
    weights = [store.get(keys.checkpoint("mask_generator", STEPS, name)) for keys in (calm, left)]
    assert weights[0] == weights[1]
    markers = [store.get_json(keys.done("mask_generator", 0), Marker) for keys in (calm, left)]
    assert markers[0].output == markers[1].output
    lines = [store.get(keys.training_log("mask_generator", 0)).splitlines() for keys in (calm, left)]
    assert len(lines[0]) == len(lines[1]) == STEPS


def test_who_was_cancelled_leaves_no_checkpoint(settings: Settings, store: ObjectStore, tmp_path: Path) -> None:
    folder = tmp_path / "phantoms"
    phantoms.write(folder, pairs=12, backgrounds=0)
    settings = settings.model_copy(update={"file_roots": {"local": (tmp_path,)}})
    keys = submitted(store, settings, folder, JOBS[0])
    worker = Worker(settings, "meddiff_services.trainer.tasks", "test", lambda task: None)
    task = Task(tenant="local", job_id=JOBS[0], stage="mask_generator")
    waiting = threading.Thread(target=once_it_trains, args=(worker, JOBS[0], lambda: store.put(keys.cancel, b"{}")))
    waiting.start()
    assert worker.run(task) == "stopped"
    waiting.join()
    assert checkpoints(store, keys) == []
