"""What a trainer refuses, and what it does not make visible."""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
import torch
from diffusers import UNet2DConditionModel
from meddiff import phantoms
from meddiff.contracts.ids import model_id_of
from meddiff.contracts.jobs import End, FinetuneSpec
from meddiff.contracts.models import ModelCard
from meddiff.contracts.recipes import CPU, override
from meddiff.contracts.requests import FinetuneRequest
from meddiff.contracts.tasks import STORE_FAULT, Marker, Stage, Task, TaskFault
from meddiff.planning.dispatch import submit
from meddiff.planning.leases import Leases
from meddiff.science import foundation
from meddiff.settings import Settings
from meddiff.store.keys import JobKeys, ModelKeys, model_name
from meddiff.store.objects import ObjectStore, StoreUnavailable
from meddiff_services import worker as workers
from meddiff_services.trainer import tasks
from meddiff_services.worker import Result, Worker
from redis import RedisError

sys.path.append(str(Path(__file__).parents[1] / "gateway"))
from stored import put_dataset, put_model

JOB = "0197f000-0000-7000-8000-000000000001"
KEYS = JobKeys("local", JOB)
QUICK = {
    "finetuning": {"steps": 1, "segment_steps": 1, "variants": 1, "batch_size": 1, "preview_pairs": 0},
    "mask_generation": {"min_masks": 13},
    "work": {"training_threads": 1},
}


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    phantoms.write(tmp_path / "phantoms", pairs=12, backgrounds=0)
    return settings.model_copy(update={"file_roots": {"local": (tmp_path,)}, "model_root": tmp_path})


def submitted(store: ObjectStore, folder: Path, source: str = "builtin") -> None:
    request = FinetuneRequest(dataset_uri=folder.as_uri(), name="naevi")
    recipe = override(CPU, QUICK | {"foundation": {"source": source}})
    spec = FinetuneSpec(
        tenant="local",
        id=JOB,
        created_at=datetime.now(UTC),
        request=request,
        recipe=recipe,
        model_id=model_id_of(JOB),
    )
    submit(store, spec)


def trained(settings: Settings, store: ObjectStore, folder: Path) -> None:
    """All but published."""
    submitted(store, folder)
    assert run(settings, "quality_scorer", "import", "calibrate") == ["done", "done"]
    assert run(settings, "trainer", "cache", "inpainter") == ["done", "done"]


def run(settings: Settings, service: str, *stages: Stage) -> list[Result]:
    worker = Worker(settings, f"meddiff_services.{service}.tasks", "test", lambda task: None)
    return [worker.run(Task(tenant="local", job_id=JOB, stage=stage)) for stage in stages]


def test_a_foundation_that_sees_no_mask_is_refused_before_it_trains(
    settings: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    plain = foundation.load("builtin", torch.float32, torch.device("cpu"))
    plain.unet = UNet2DConditionModel.from_config(plain.unet.config | {"in_channels": 4})
    foundation.save(plain, tmp_path / "plain")
    submitted(store, tmp_path / "phantoms", str(tmp_path / "plain"))
    assert run(settings, "quality_scorer", "import") == ["done"]
    assert run(settings, "trainer", "cache") == ["failed"]
    problem = store.get_json(KEYS.end, End).problem
    assert problem is not None
    assert [fault.pointer for fault in problem.errors] == ["/recipe/override/foundation/source"]
    assert not store.exists(KEYS.cache)


def test_a_fine_tune_cancelled_at_its_end_takes_no_name(
    settings: Settings, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(settings, store, tmp_path / "phantoms")

    def cancelled(_: object) -> dict[str, float]:
        store.put(KEYS.cancel, b"{}")
        return {}

    monkeypatch.setattr(tasks, "_training_summary", cancelled)
    assert run(settings, "trainer", "publish") == ["stopped"]
    assert not store.exists(ModelKeys("local", model_id_of(JOB)).card)
    assert not store.exists(model_name("local", "naevi"))


def test_a_name_stays_with_the_model_of_the_later_request(
    settings: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    trained(settings, store, tmp_path / "phantoms")
    dataset = put_dataset(store, "local")
    later, earlier = put_model(store, "local", dataset, "naevi"), put_model(store, "local", dataset)
    earlier = earlier.model_copy(update={"job_id": "0196f000-0000-7000-8000-000000000000"})
    store.put_json(ModelKeys("local", earlier.id).card, earlier)
    for holder, expected in (
        (later.id, later.id),
        (earlier.id, model_id_of(JOB)),
        ("md_" + "0" * 32, model_id_of(JOB)),
    ):
        store.put(model_name("local", "naevi"), json.dumps({"model_id": holder}).encode())
        store.delete([KEYS.done("publish", 0), KEYS.end])
        assert run(settings, "trainer", "publish") == ["done"]
        assert json.loads(store.get(model_name("local", "naevi")))["model_id"] == expected
    card = store.get_json(ModelKeys("local", model_id_of(JOB)).card, ModelCard)
    assert {"torch", "numpy", "device"} <= set(card.fingerprint)


def test_a_segment_whose_end_was_not_told_is_not_trained_again(
    settings: Settings, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(settings, store, tmp_path / "phantoms")
    told = store.get_json(KEYS.done("inpainter", 0), Marker).output
    store.delete([KEYS.done("inpainter", 0)])
    monkeypatch.setattr(tasks.metrics.TRAINING_STEPS, "labels", lambda part: pytest.fail(f"{part} trains"))
    assert run(settings, "trainer", "inpainter") == ["done"]
    assert store.get_json(KEYS.done("inpainter", 0), Marker).output == told


def test_what_the_store_does_not_give_is_asked_for_again_later_and_the_fault_is_the_stores(
    settings: Settings, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(settings, store, tmp_path / "phantoms")

    def withheld(*_: object) -> None:
        raise StoreUnavailable("SlowDownRead")

    monkeypatch.setattr(tasks, "load_dataset", withheld)
    assert run(settings, "trainer", "publish") == ["fault"]
    (fault,) = store.list(KEYS.faults("publish", 0))
    assert store.get_json(fault, TaskFault).error == STORE_FAULT
    leases = Leases.connect(settings.redis_url, 60)
    assert leases.reserve([Task(tenant="local", job_id=JOB, stage="publish")]) == (None, False)


def test_a_task_that_stops_is_paid_for_too(
    settings: Settings, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store, tmp_path / "phantoms")
    paid: list[float] = []

    def stops(work: workers.Work) -> workers.Outcome:
        raise workers.Stopped

    monkeypatch.setattr(Leases, "correct", lambda self, queue, tenant, seconds: paid.append(seconds))
    worker = Worker(settings, "meddiff_services.trainer.tasks", "test", lambda task: None)
    monkeypatch.setitem(tasks.STAGES, "cache", stops)
    assert worker.run(Task(tenant="local", job_id=JOB, stage="cache")) == "stopped"
    assert len(paid) == 1


def test_a_lease_is_renewed_as_soon_as_redis_is_back() -> None:
    answers: list[bool | RedisError] = [RedisError("away"), True, True]
    pauses: list[float] = []

    class Flaky:
        seconds = 60.0

        def take(self, task: Task, token: str) -> bool:
            answer = answers.pop(0)
            if isinstance(answer, RedisError):
                raise answer
            return answer

    class Left:
        def wait(self, pause: float) -> bool:
            pauses.append(pause)
            return not answers

    lease = workers._Lease(cast(Leases, Flaky()), Task(tenant="local", job_id=JOB, stage="cache"), "me")
    lease._left = cast(threading.Event, Left())
    lease._renew()
    assert pauses == [20, workers.REDIS_SECONDS, 20, 20]
    assert not lease.lost


def test_a_store_that_is_away_for_a_while_ends_no_training(
    settings: Settings, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(store, tmp_path / "phantoms")
    assert run(settings, "quality_scorer", "import") == ["done"]
    assert run(settings, "trainer", "cache") == ["done"]
    asked: list[object] = []

    def away(of: ObjectStore, prefix: str) -> tuple[str, ...]:
        asked.append(prefix)
        if prefix == f"{KEYS.root}/":
            raise StoreUnavailable("gone")
        return children(of, prefix)

    children = ObjectStore.children
    monkeypatch.setattr(workers, "STOP_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(workers, "advance", lambda *_, **__: None)
    monkeypatch.setattr(ObjectStore, "children", away)
    assert run(settings, "trainer", "inpainter") == ["done"]
    assert f"{KEYS.root}/" in asked


def test_a_record_that_cannot_be_read_tells_nothing_of_what_it_holds(
    settings: Settings, store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put(KEYS.spec, b'{"kind": "finetune", "of_tomorrow": "Jane Doe"}')
    assert run(settings, "trainer", "cache") == ["unavailable"]
    told = capsys.readouterr()
    assert "left to be sent again" in told.out + told.err
    assert "Jane" not in told.out + told.err
