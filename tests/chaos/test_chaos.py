"""A few runs of ``make chaos``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "science")]

from rig import Rig
from runs import Chaos, write_models

RUNS = 4


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_under_fire_every_job_ends_as_on_a_quiet_day(tmp_path: Path) -> None:
    write_models(tmp_path / "models")
    rig = Rig(tmp_path, tmp_path / "models", seed=0, more={})
    try:
        chaos = Chaos(rig)
        wrong = [fault for seed in range(RUNS) for fault in chaos.run(seed).wrong]
    finally:
        rig.close()
    assert wrong == []
