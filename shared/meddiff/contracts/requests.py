"""What a caller may ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticSerializationError, to_json

from meddiff.contracts.base import Contract, DatasetId, JobId, Name, Sha256
from meddiff.contracts.evaluation import ComparedArm, Mixing
from meddiff.contracts.recipes import CPU, RECIPES, Recipe, override

Seed = Annotated[int, Field(ge=0, lt=2**63)]
DatasetUri = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
Metadata = dict[
    Annotated[str, StringConstraints(min_length=1, max_length=64)], Annotated[str, StringConstraints(max_length=512)]
]


Priority = Literal["high", "normal", "low"]
"""Among the jobs of one tenant; a low one waits for others, though not for more than a day."""


class RecipeChoice(Contract):
    """A named recipe and what to change in it."""

    name: str = "cpu"
    override: dict[str, Any] = {}

    def resolve(self) -> Recipe:
        """The recipe with every value. Raises ``ValidationError`` for an absurd one."""
        return override(RECIPES[self.name], self.override)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in RECIPES:
            raise ValueError(f"no recipe of that name; there are {', '.join(sorted(RECIPES))}")
        return name

    @field_validator("override")
    @classmethod
    def _valid(cls, changes: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Pydantic adds the faults of the overridden recipe to those of the request, each under its own pointer."""
        if "name" in info.data:
            override(RECIPES[info.data["name"]], changes)
        return changes


DEFAULT_RECIPE = RecipeChoice(name=CPU.name)


class DatasetReference(Contract):
    """``POST /datasets`` and ``POST /datasets/validate`` of a dataset that lies somewhere already."""

    dataset_uri: DatasetUri


class FinetuneRequest(Contract):
    """``POST /finetune``. ``dataset_uri``: ``s3://bucket/prefix``, ``s3://bucket/archive.zip``, ``file:///folder``
    under an allowed root, or a dataset id. ``cases``: digests of the images to learn from, in place of a draw of
    ``max_pairs``."""

    dataset_uri: DatasetUri
    cases: Annotated[tuple[Sha256, ...], Field(min_length=2, max_length=10_000)] | None = None
    name: Name | None = None
    recipe: RecipeChoice = DEFAULT_RECIPE
    max_pairs: Annotated[int, Field(ge=2, le=10_000)] | None = None
    split_seed: Seed = 0
    priority: Priority = "normal"
    metadata: Metadata = {}


class GenerateRequest(Contract):
    """``POST /generate``: ``count`` *accepted* pairs of ``model`` (id or name). ``masks`` and ``backgrounds`` are ids
    of datasets to take shapes and backgrounds from instead of the model's own. ``recipe`` overrides values of the
    model's recipe (its ``inpainting``, ``erosion`` and ``work`` parts, and ``quality.max_shape_iou``)."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    count: Annotated[int, Field(ge=1, le=100_000)]
    seed: Seed = 0
    start_index: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    masks: DatasetId | None = None
    backgrounds: DatasetId | None = None
    recipe: dict[str, Any] = {}
    priority: Priority = "normal"
    metadata: Metadata = {}

    @field_validator("recipe")
    @classmethod
    def _json(cls, changes: dict[str, Any]) -> dict[str, Any]:
        """What it changes is judged with the model's recipe; here, that it can be written down."""
        try:
            to_json([[[[changes]]]])  # As deep as it will lie in the job's record, and deeper.
        except PydanticSerializationError:
            raise ValueError("nested too deeply, or text that is not Unicode") from None
        return changes


DRAWS = 3
"""Of the training cases where nothing else is asked for: one alone shows nothing of how draws differ."""


class EvaluateRequest(Contract):
    """``POST /evaluate``: what synthetic pairs are worth, on real cases that had no part in making them.

    The pairs are those of ``synthetic_job``, or made by ``model``: then the model's own cases train, and the other
    cases of the dataset, or those of ``test_uri``, test. Without either a generator is fitted anew for each split: for
    each of ``folds`` parts of the dataset that test in turn, or else for each of ``draws`` (3) draws of ``train`` cases
    (by default the recipe's ``max_pairs``). ``synthetic``: numbers of pairs to compare, each with every ``mixing``
    (copy-pasted ones with the first); ``seeds``: segmenters of each arm and split.
    """

    dataset_uri: DatasetUri
    test_uri: DatasetUri | None = None
    model: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    synthetic_job: JobId | None = None
    folds: Annotated[int, Field(ge=2, le=20)] | None = None
    draws: Annotated[int, Field(ge=1, le=20)] | None = None
    train: Annotated[int, Field(ge=4, le=10_000)] | None = None
    arms: Annotated[tuple[ComparedArm, ...], Field(min_length=1)] = ("synthetic", "copy-paste", "oracle")
    synthetic: Annotated[tuple[Annotated[int, Field(ge=1, le=10_000)], ...], Field(min_length=1, max_length=4)] = (90,)
    mixing: Annotated[tuple[Mixing, ...], Field(min_length=1)] = ("falling",)
    seeds: Annotated[int, Field(ge=1, le=20)] = 4
    seed: Seed = 0
    recipe: RecipeChoice = DEFAULT_RECIPE
    priority: Priority = "normal"
    metadata: Metadata = {}

    @property
    def fits_generators(self) -> bool:
        """Whether the job makes its own generators, by child jobs."""
        return self.model is None and self.synthetic_job is None

    @property
    def splits(self) -> int:
        """How often the cases are divided into those that train and those that test."""
        return self.folds or ((self.draws or DRAWS) if self.fits_generators else 1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        made = [name for name in ("model", "synthetic_job", "folds") if getattr(self, name) is not None]
        faults = []
        if len(made) > 1:
            faults.append(f"give one of model, synthetic_job and folds, not {' and '.join(made)}")
        if made and (self.draws is not None or self.train is not None):
            faults.append(f"draws and train are for generators fitted to draws; with {made[0]} the cases are given")
        if self.test_uri is not None and self.fits_generators:
            faults.append("test_uri goes with model or synthetic_job; else the dataset's own cases test")
        if made and self.arms == ("oracle",):
            faults.append("an oracle needs more real cases than train: ask for draws")
        for name in ("arms", "synthetic", "mixing"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                faults.append(f"{name} names something twice")
        if faults:
            raise ValueError("; ".join(faults))
        return self
