"""What a caller may ask for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationInfo, field_validator

from meddiff.contracts.base import Contract, DatasetId, Name
from meddiff.contracts.recipes import CPU, RECIPES, Recipe, override

Seed = Annotated[int, Field(ge=0, lt=2**63)]
DatasetUri = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
Metadata = dict[
    Annotated[str, StringConstraints(min_length=1, max_length=64)], Annotated[str, StringConstraints(max_length=512)]
]


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
    under an allowed root, or a dataset id."""

    dataset_uri: DatasetUri
    name: Name | None = None
    recipe: RecipeChoice = DEFAULT_RECIPE
    max_pairs: Annotated[int, Field(ge=2, le=10_000)] | None = None
    split_seed: Seed = 0
    metadata: Metadata = {}


class GenerateRequest(Contract):
    """``POST /generate``: ``count`` *accepted* pairs of ``model`` (id or name). ``masks`` and ``backgrounds`` are ids
    of datasets to take shapes and backgrounds from instead of the model's own. ``recipe`` overrides values of the
    model's recipe (its ``inpainting``, ``quality``, ``erosion`` and ``work`` parts)."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    count: Annotated[int, Field(ge=1, le=100_000)]
    seed: Seed = 0
    start_index: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    masks: DatasetId | None = None
    backgrounds: DatasetId | None = None
    recipe: dict[str, Any] = {}
    metadata: Metadata = {}
