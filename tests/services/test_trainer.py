"""What a trainer refuses, and what it does not make visible."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from meddiff import phantoms
from meddiff.contracts.ids import model_id_of
from meddiff.contracts.jobs import End, FinetuneSpec
from meddiff.contracts.recipes import CPU, override
from meddiff.contracts.requests import FinetuneRequest
from meddiff.contracts.tasks import Stage, Task
from meddiff.planning.dispatch import submit
from meddiff.science import foundation
from meddiff.settings import Settings
from meddiff.store.keys import JobKeys, ModelKeys, model_name
from meddiff.store.objects import ObjectStore
from meddiff_services.trainer import tasks
from meddiff_services.worker import Result, Worker

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
    submitted(store, tmp_path / "phantoms")
    assert run(settings, "quality_scorer", "import", "calibrate") == ["done", "done"]
    assert run(settings, "trainer", "cache", "inpainter") == ["done", "done"]

    def cancelled(_: object) -> dict[str, float]:
        store.put(KEYS.cancel, b"{}")
        return {}

    monkeypatch.setattr(tasks, "_training_summary", cancelled)
    assert run(settings, "trainer", "publish") == ["stopped"]
    assert not store.exists(ModelKeys("local", model_id_of(JOB)).card)
    assert not store.exists(model_name("local", "naevi"))
