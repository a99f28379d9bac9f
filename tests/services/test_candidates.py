"""What lies below a candidate's lesion."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from meddiff.contracts.dataset import Case
from meddiff.contracts.ids import uuid7
from meddiff.contracts.manifest import Window
from meddiff.importing.pixels import encode_png
from meddiff.store.keys import ModelKeys
from meddiff.store.objects import ObjectStore
from meddiff_services.candidates import Candidate, ground_of
from meddiff_services.cases import OtherJob


def test_a_repaired_ground_is_the_models_copy_and_has_no_lesion(store: ObjectStore) -> None:
    case = Case(id="00003", role="pair", width=24, height=16, channels=3, image_sha256="a" * 64, mask_sha256="b" * 64)
    candidate = Candidate(
        index=0,
        seed=1,
        dataset_id=f"ds_{'1' * 32}",
        background=case,
        repaired=True,
        donor=case,
        window=Window(top=0, left=0, side=16),
    )
    repaired = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    job = OtherJob(store, "local", SimpleNamespace(model_id=str(uuid7())))
    store.put(ModelKeys("local", job.spec.model_id).background(case.id), encode_png(repaired), "image/png")
    ground = ground_of(job, candidate)
    assert (ground.image == repaired).all()
    assert ground.mask.shape == (16, 24)
    assert not ground.mask.any()
