"""What a worker keeps on its own disk: nothing of a job that has ended or a model that is deleted, and few
checkpoints."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from meddiff.contracts.ids import uuid7
from meddiff.contracts.jobs import End
from meddiff.store.keys import JobKeys, ModelKeys
from meddiff.store.objects import ObjectStore
from meddiff_services import worker

sys.path.append(str(Path(__file__).parents[1] / "gateway"))
from stored import put_dataset, put_model


def test_the_disk_holds_jobs_that_go_on_and_the_newest_models_that_exist(store: ObjectStore, tmp_path: Path) -> None:
    going_on, over = uuid7(), uuid7()
    store.put_json(JobKeys("local", over).end, End(status="cancelled", finished_at=datetime.now(UTC)))
    dataset = put_dataset(store, "local")
    models = [put_model(store, "local", dataset).id for _ in range(worker.KEPT_MODELS + 2)]
    store.delete([ModelKeys("local", models[-1]).card])
    for place, path in enumerate(
        [*(f"jobs/local/{job}" for job in (going_on, over)), *(f"models/local/{m}" for m in models)]
    ):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "latents").write_bytes(b"x")
        os.utime(tmp_path / path, (place, place))
    steps = [tmp_path / f"jobs/local/{going_on}/inpainter.{n:08d}.safetensors" for n in range(4)]
    for place, path in enumerate(steps):
        path.write_bytes(b"x")
        os.utime(path, (place, place))
    worker.tidy(tmp_path, store)
    assert [path for path in steps if path.exists()] == steps[-worker.KEPT_CHECKPOINTS :]
    assert (tmp_path / f"jobs/local/{going_on}/latents").exists()
    assert {folder.name for folder in tmp_path.glob("jobs/*/*")} == {going_on}
    assert {folder.name for folder in tmp_path.glob("models/*/*")} == set(models[2:-1])
