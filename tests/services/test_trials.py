"""What an evaluation's trials read from the store."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from meddiff.contracts.evaluation import Arm, Split
from meddiff.contracts.ids import uuid7
from meddiff.contracts.jobs import EvaluateSpec
from meddiff.contracts.problems import ProblemError
from meddiff.contracts.recipes import CPU
from meddiff.contracts.requests import EvaluateRequest
from meddiff.store.keys import DatasetKeys
from meddiff.store.objects import ObjectStore
from meddiff_services.cases import Stored
from meddiff_services.quality_scorer.splitting import _judge as judge_splits
from meddiff_services.trials import cases_by_digest, material

sys.path.append(str(Path(__file__).parents[1] / "gateway"))
from stored import put_dataset


def work(store: ObjectStore, **output: Any) -> Any:
    """A task in hand whose job's import had that output, and that has to stop once ``stopped`` is set."""
    found = SimpleNamespace(
        store=store, tenant="local", marker=lambda *_: SimpleNamespace(output=output), stopped=False
    )

    def raise_if_stopped() -> None:
        if found.stopped:
            raise InterruptedError

    found.raise_if_stopped = raise_if_stopped
    return found


def test_a_picture_in_both_datasets_trains_with_its_own_mask_and_is_tested_with_the_test_datasets(
    store: ObjectStore,
) -> None:
    trained = put_dataset(store, "local")
    tested = trained.model_copy(update={"id": f"ds_{'7' * 32}"})
    store.put_json(DatasetKeys("local", tested.id).dataset, tested)
    others = put_dataset(store, "local", level=120)
    first, second = (case.image_sha256 for case in trained.pairs)
    cut = [Split(train=(first,), test=(second,)).model_dump(mode="json")]
    both = cases_by_digest(work(store, splits=cut, dataset_id=trained.id, test_dataset_id=tested.id))
    assert (both[first][0], both[second][0]) == (trained.id, tested.id)
    apart = cases_by_digest(work(store, splits=cut, dataset_id=trained.id, test_dataset_id=others.id))
    assert sorted(dataset_id for dataset_id, _ in apart.values()) == sorted(2 * [trained.id, others.id])


def test_the_groups_of_training_cases_are_those_of_the_split(store: ObjectStore) -> None:
    dataset = put_dataset(store, "local")
    digests = tuple(case.image_sha256 for case in dataset.pairs)
    cut = {"splits": [Split(train=digests, test=digests).model_dump(mode="json")]}
    known = {"dataset_id": dataset.id, "test_dataset_id": None}
    groups = [[7] * len(digests)]
    assert material(work(store, **known, **cut, real_groups=groups), 0, Arm(name="real")).groups == groups[0]
    assert material(work(store, **known, **cut), 0, Arm(name="real")).groups == ()


def test_cases_of_a_few_patients_test_nothing() -> None:
    names = [f"{n:064x}" for n in range(20)]
    spec = EvaluateSpec(
        tenant="local",
        id=uuid7(),
        created_at=datetime.now(UTC),
        request=EvaluateRequest(dataset_uri=f"ds_{'0' * 32}"),
        recipe=CPU,
    )

    def tested_on(patients: int) -> Split:
        return Split(train=tuple(names[:10]), test=tuple(names[10:]), groups=tuple(n % patients for n in range(10)))

    judge_splits(spec, [tested_on(6)])
    with pytest.raises(ProblemError, match="5 patient"):
        judge_splits(spec, [tested_on(5)])


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
