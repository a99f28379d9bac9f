"""What an experiment may change of a fit: a foundation that is adapted first, and where the fine-tune ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from meddiff import phantoms
from meddiff.contracts.recipes import CPU, override

from benchmarks import checkpoints, utility
from benchmarks.checkpoints import Checkpoint
from benchmarks.in_process import fit
from benchmarks.sources import Case, cases_by_digest

RECIPE = override(
    CPU,
    {
        "finetuning": {"steps": 3, "segment_steps": 2, "variants": 1, "batch_size": 1, "warmup_steps": 0},
        "mask_generation": {"steps": 2, "batch_size": 2},
        "inpainting": {"solver_steps": 2},
        "work": {"training_threads": 1, "inference_threads": 1},
    },
)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("phantoms")
    phantoms.write(folder, pairs=6, backgrounds=0)
    return list(cases_by_digest(folder).values())


def unet(fitted: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for name, tensor in sorted(fitted.items()) if name.startswith("unet.")])


def test_an_adapted_foundation_gives_another_inpainter_and_the_same_mask_generator(cases: list[Case]) -> None:
    plain, adapted = fit(cases[:3], [], RECIPE, 1), fit(cases[:3], [], RECIPE, 1, adapt_to=cases[3:])
    assert not torch.equal(unet(plain), unet(adapted))
    assert all(torch.equal(plain[name], adapted[name]) for name in plain if name.startswith("masks."))


def test_a_fit_that_ends_at_its_last_step_is_the_whole_one(cases: list[Case]) -> None:
    whole, last, earlier = (unet(fit(cases[:3], [], RECIPE, 1, stop=stop)) for stop in (None, 3, 2))
    assert torch.equal(whole, last)
    assert not torch.equal(whole, earlier)


def test_checkpoints_are_the_ends_of_segments_and_the_one_chosen_is_kept(cases: list[Case], tmp_path: Path) -> None:
    path = tmp_path / "fitted.safetensors"
    fitted = utility.fitted_model(cases, [], RECIPE, 1, path, held_aside=True)
    kept = json.loads(path.with_suffix(".checkpoints.json").read_text())
    found = [Checkpoint(**one) for one in kept["checkpoints"]]
    assert [one.step for one in found] == [2, 3]
    assert kept["chosen"] == checkpoints.best(found)
    assert torch.equal(unet(fitted), unet(fit(cases, [], RECIPE, 1, stop=kept["chosen"])))
