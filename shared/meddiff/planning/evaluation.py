"""What an evaluation consists of: its arms, its child jobs, and the runs of its segmenters. Pure, like the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meddiff.contracts.evaluation import REAL, Arm, Split
from meddiff.contracts.ids import child_id, model_id_of
from meddiff.contracts.jobs import EvaluateSpec, FinetuneSpec, GenerateSpec
from meddiff.contracts.recipes import with_prompt
from meddiff.contracts.requests import EvaluateRequest, FinetuneRequest, GenerateRequest
from meddiff.seeds import derive

CURVE = (0.5, 1.5, 2.0)
"""Shares of the training cases that the learning curve is drawn through, beside all of them."""


def arms(request: EvaluateRequest, splits: Sequence[Split]) -> tuple[Arm, ...]:
    """The arms, the first of them real only. More real cases are an arm where every split has as many."""
    spare = min(len(split.extra) / len(split.train) for split in splits)
    shares = [share for share in CURVE if share < 1 or ("oracle" in request.arms and 1 + spare >= share)]
    found = [Arm(name=REAL), *(Arm(name=f"real x{share:g}", share=share) for share in shares)]
    for pairs in request.synthetic:
        if "synthetic" in request.arms:
            found += [
                Arm(name=f"synthetic {pairs} {mixing}", source="synthetic", pairs=pairs, mixing=mixing)
                for mixing in request.mixing
            ]
        if "copy-paste" in request.arms:
            found.append(Arm(name=f"copy-paste {pairs}", source="copy-paste", pairs=pairs, mixing=request.mixing[0]))
    return tuple(found)


@dataclass(frozen=True)
class Run:
    """A training of a segmenter: its split, arm and seed. Where an arm stops is one task for all of its seeds."""

    split: int
    arm: Arm
    seed: int
    stop: int


def runs(spec: EvaluateSpec, splits: Sequence[Split]) -> tuple[Run, ...]:
    """Every run, in the order of the shards of stage ``segmenter``; ``stop`` is the shard of that stage."""
    wanted = arms(spec.request, splits)
    return tuple(
        Run(split, arm, seed, split * len(wanted) + place)
        for split in range(len(splits))
        for place, arm in enumerate(wanted)
        for seed in range(spec.request.seeds)
    )


def finetunes(
    spec: EvaluateSpec, imported: Mapping[str, Any], splits: Sequence[Split]
) -> tuple[FinetuneSpec, ...]:  # fmt: skip
    """The generators to be fitted, one a split; none where the pairs are given or a model is."""
    if not (spec.request.fits_generators and _needs_pairs(spec.request)):
        return ()
    found = []
    for number, split in enumerate(splits):
        job_id = child_id(spec.id, "finetune", number)
        request = FinetuneRequest(
            dataset_uri=imported["dataset_id"],
            cases=split.train,
            recipe=spec.request.recipe,
            split_seed=derive(spec.request.seed, "generator", number),
            priority=spec.request.priority,
            metadata=spec.request.metadata,
        )
        found.append(
            FinetuneSpec(
                tenant=spec.tenant,
                id=job_id,
                created_at=spec.created_at,
                requested_by=spec.requested_by,
                trace_id=spec.trace_id,
                request=request,
                recipe=spec.recipe,
                model_id=model_id_of(job_id),
                parent=spec.id,
            )
        )
    return tuple(found)


def generates(
    spec: EvaluateSpec, imported: Mapping[str, Any], splits: Sequence[Split]
) -> tuple[GenerateSpec, ...]:  # fmt: skip
    """The jobs that make the pairs, one a split; none where the pairs are there already."""
    if spec.synthetic_job is not None or not _needs_pairs(spec.request):
        return ()
    count = max(spec.request.synthetic)
    found = []
    for number in range(len(splits)):
        if spec.model_id is not None:
            model_id, dataset_id = spec.model_id, spec.model_dataset_id
            recipe = spec.recipe
        else:
            model_id, dataset_id = model_id_of(child_id(spec.id, "finetune", number)), imported["dataset_id"]
            recipe = with_prompt(spec.recipe, spec.request.recipe.override, imported["prompt"])
        assert dataset_id is not None
        seed = derive(spec.request.seed, "pairs", number)
        found.append(
            GenerateSpec(
                tenant=spec.tenant,
                id=child_id(spec.id, "generate", number),
                created_at=spec.created_at,
                requested_by=spec.requested_by,
                trace_id=spec.trace_id,
                request=GenerateRequest(
                    model=model_id,
                    count=count,
                    seed=seed,
                    priority=spec.request.priority,
                    metadata=spec.request.metadata,
                ),
                recipe=recipe,
                model_id=model_id,
                dataset_id=dataset_id,
                parent=spec.id,
            )
        )
    return tuple(found)


def _needs_pairs(request: EvaluateRequest) -> bool:
    return bool({"synthetic", "copy-paste"} & set(request.arms))


def pairs_job(spec: EvaluateSpec, split: int) -> str:
    """Id of the generate job whose pairs a split's arms train on."""
    return spec.synthetic_job or child_id(spec.id, "generate", split)
