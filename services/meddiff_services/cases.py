"""The cases of a job as arrays: what every stage reads first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from meddiff.contracts.dataset import Case
from meddiff.contracts.jobs import GenerateSpec
from meddiff.contracts.models import ModelCard
from meddiff.contracts.recipes import Recipe, with_prompt
from meddiff.importing import chosen_cases, first_of_each_picture, load_case, load_dataset, mask_png
from meddiff.store.keys import ModelKeys
from meddiff.store.objects import ObjectStore

from meddiff_services.pictures import Mask, Pixels, decode_mask
from meddiff_services.worker import Work


class Job(Protocol):
    """A job whose objects are read: the one in hand, or one it builds on."""

    @property
    def store(self) -> ObjectStore: ...

    @property
    def tenant(self) -> str: ...

    @property
    def spec(self) -> Any: ...


@dataclass(frozen=True)
class OtherJob:
    """A job that the one in hand builds on."""

    store: ObjectStore
    tenant: str
    spec: Any


@dataclass(frozen=True)
class Loaded:
    """A case and its pixels: image (H, W, C) uint8, mask (H, W), all false for a lesion-free image."""

    dataset_id: str
    case: Case
    image: Pixels
    mask: Mask


def load(work: Job, dataset_id: str, case: Case) -> Loaded:
    """One case from the store."""
    image, mask = load_case(work.store, work.tenant, dataset_id, case)
    return Loaded(dataset_id, case, image, mask if mask is not None else np.zeros(image.shape[:2], np.bool_))


T = TypeVar("T")


@dataclass(frozen=True)
class Stored(Sequence[T]):
    """What is read from the store whenever it is asked for: thousands of large pictures fill no memory."""

    work: Work
    read: Sequence[Callable[[], T]]

    def __len__(self) -> int:
        return len(self.read)

    def __getitem__(self, place: Any) -> Any:
        self.work.raise_if_stopped()
        return self.read[place]()


@dataclass(frozen=True)
class Masks(Sequence[Mask]):
    """Masks (H, W) kept as PNG, some KB each however large the picture, and decoded whenever asked for."""

    pngs: Sequence[bytes]

    @classmethod
    def of(cls, work: Work, dataset_id: str, cases: Sequence[Case]) -> Masks:
        """Of cases that have one."""
        return cls([mask_png(work.store, work.tenant, dataset_id, case) for case in cases])

    def __len__(self) -> int:
        return len(self.pngs)

    def __getitem__(self, place: Any) -> Any:
        return decode_mask(self.pngs[place])


def imported(work: Work) -> str:
    """Id of the dataset a fine-tune imported."""
    return str(work.marker("import", 0).output["dataset_id"])


def training_cases(work: Work, dataset_id: str) -> tuple[Case, ...]:
    """The pairs a fine-tune learns from: a function of dataset and request. A generate job finds them in its model's
    card."""
    dataset = load_dataset(work.store, work.tenant, dataset_id)
    spec = work.spec
    if isinstance(spec, GenerateSpec):
        by_digest = first_of_each_picture(dataset)
        return tuple(by_digest[digest] for digest in model_card(work).cases)
    return chosen_cases(dataset, spec.request, spec.recipe.max_pairs)


def finetuning_recipe(work: Work) -> Recipe:
    """The recipe of a fine-tune, with the prompt that came with the dataset where the request names none."""
    recipe: Recipe = work.spec.recipe
    prompt = work.marker("import", 0).output["prompt"]
    return with_prompt(recipe, work.spec.request.recipe.override, prompt)


def model_card(work: Job) -> ModelCard:
    """Card of the model in use."""
    return work.store.get_json(ModelKeys(work.tenant, work.spec.model_id).card, ModelCard)
