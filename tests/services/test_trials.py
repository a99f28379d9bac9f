"""What an evaluation's trials read from the store."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from meddiff.store.keys import DatasetKeys
from meddiff.store.objects import ObjectStore
from meddiff_services.cases import Stored
from meddiff_services.trials import cases_by_digest

sys.path.append(str(Path(__file__).parents[1] / "gateway"))
from stored import put_dataset


def work(store: ObjectStore, **output: str | None) -> Any:
    """A task in hand whose job's import had that output, and that has to stop once ``stopped`` is set."""
    found = SimpleNamespace(
        store=store, tenant="local", marker=lambda *_: SimpleNamespace(output=output), stopped=False
    )

    def raise_if_stopped() -> None:
        if found.stopped:
            raise InterruptedError

    found.raise_if_stopped = raise_if_stopped
    return found


def test_a_picture_in_both_datasets_is_tested_with_the_test_datasets_mask(store: ObjectStore) -> None:
    trained = put_dataset(store, "local")
    tested = trained.model_copy(update={"id": f"ds_{'7' * 32}"})
    store.put_json(DatasetKeys("local", tested.id).dataset, tested)
    others = put_dataset(store, "local", level=120)
    both = cases_by_digest(work(store, dataset_id=trained.id, test_dataset_id=tested.id))
    assert {dataset_id for dataset_id, _ in both.values()} == {tested.id}
    apart = cases_by_digest(work(store, dataset_id=trained.id, test_dataset_id=others.id))
    assert sorted(dataset_id for dataset_id, _ in apart.values()) == sorted(2 * [trained.id, others.id])


def test_what_is_stored_is_read_when_it_is_asked_for_and_not_once_the_task_has_to_stop(store: ObjectStore) -> None:
    read: list[int] = []
    here = work(store)
    stored: Stored[int] = Stored(here, [lambda n=n: read.append(n) or n for n in range(3)])  # type: ignore[misc]
    assert len(stored) == 3
    assert read == []
    assert list(stored) == [0, 1, 2]
    assert stored[1] == 1
    assert read == [0, 1, 2, 1]
    here.stopped = True
    with pytest.raises(InterruptedError):
        _ = stored[0]
