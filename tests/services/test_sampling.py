"""What shapes are drawn from, and what they lie on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from meddiff.contracts.dataset import Case, Dataset
from meddiff.contracts.recipes import CPU, PAPER, Recipe
from meddiff.importing.datasets import dataset_id_of
from meddiff.importing.pixels import encode_mask
from meddiff.store.keys import DatasetKeys
from meddiff.store.objects import ObjectStore
from meddiff_services.mask_sampler import tasks

sys.path.append(str(Path(__file__).parents[1] / "planning"))
from jobspecs import generate


def put(store: ObjectStore, pairs: int, backgrounds: int) -> Dataset:
    """A dataset whose masks are a bar each, another for every pair."""
    cases = tuple(
        Case(
            id=f"{n:05d}", role="pair" if n < pairs else "background", width=32, height=32, channels=1,
            image_sha256=f"{n:064x}", mask_sha256="a" * 64 if n < pairs else None,
        )
        for n in range(pairs + backgrounds)
    )  # fmt: skip
    dataset = Dataset(id=dataset_id_of(cases), layout="pairs", cases=cases)
    keys = DatasetKeys("local", dataset.id)
    for n, case in enumerate(dataset.pairs):
        mask = np.zeros((32, 32), np.bool_)
        mask[:, n] = True
        store.put(keys.mask(case.id), encode_mask(mask))
    store.put_json(keys.dataset, dataset)
    return dataset


def work(store: ObjectStore, dataset: Dataset, recipe: Recipe, shard: int = 0, **request: Any) -> Any:
    spec = generate(64, recipe=recipe)
    spec = spec.model_copy(
        update={"dataset_id": dataset.id, "request": spec.request.model_copy(update=request), "recipe": recipe}
    )
    return SimpleNamespace(store=store, tenant="local", spec=spec, shard=shard)


@pytest.mark.parametrize(
    ("recipe", "backgrounds", "expected"),
    [(CPU, 1, {"background": 1, "pair": 6}), (CPU, tasks.COVERING, {"background": 5}), (PAPER, 1, {"background": 1})],
)
def test_a_few_lesion_free_images_are_not_all_there_is(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, backgrounds: int, expected: dict[str, int]
) -> None:
    """Else one patient's image lies under every pair. Where lesions are repaired away no copies are made of the pairs
    once there is one lesion-free image."""
    dataset = put(store, 6, backgrounds)
    monkeypatch.setattr(tasks, "training_cases", lambda work, dataset_id: dataset.pairs)
    own = {case.image_sha256: np.ones(tasks.COARSE, np.bool_) for case in dataset.pairs}
    grounds = tasks._grounds(work(store, dataset, recipe), own)
    assert {role: sum(one.case.role == role for one in grounds) for role in expected} == expected
    assert len(grounds) == sum(expected.values())
    given = tasks._grounds(work(store, dataset, recipe, backgrounds=dataset.id), own)
    assert {one.case.role for one in given} == {"background"}


def test_given_masks_are_taken_in_turn(store: ObjectStore) -> None:
    dataset = put(store, 12, 0)
    drawn = [
        shape.tobytes()
        for shard in range(3)
        for shape in tasks._shapes(work(store, dataset, CPU, shard, masks=dataset.id), [], list(range(8)))
    ]
    assert len(set(drawn[:12])) == 12
    assert drawn[12:] == drawn[:12]
