"""What ``fsck`` finds and ``tidy`` removes, and that neither touches what is needed."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from meddiff import housekeeping
from meddiff.contracts.ids import uuid7
from meddiff.contracts.jobs import End, EndStatus, FinetuneSpec
from meddiff.contracts.problems import Fault
from meddiff.contracts.problems import problem as problem_of
from meddiff.contracts.requests import FinetuneRequest
from meddiff.housekeeping import Verified, fsck, orphans, tidy
from meddiff.planning import removal
from meddiff.planning.dispatch import active_jobs, submit
from meddiff.store.keys import DatasetKeys, JobKeys, ModelKeys, active, idempotency, model_name
from meddiff.store.objects import ObjectStore

sys.path.append(str(Path(__file__).parents[1] / "gateway"))
from stored import Generated, put_dataset, put_generated, put_model

LATER = timedelta(hours=2)


@pytest.fixture
def made(store: ObjectStore) -> Generated:
    return put_generated(store, "local")


@pytest.fixture
def trained(store: ObjectStore) -> FinetuneSpec:
    """A fine-tune that has left a checkpoint, a cache, a marker and a part of its model."""
    dataset = put_dataset(store, "local")
    spec = FinetuneSpec(
        tenant="local",
        id=uuid7(),
        created_at=datetime.now(UTC),
        request=FinetuneRequest(dataset_uri=dataset.id),
        recipe=put_model(store, "local", dataset).recipe,
        model_id="md_" + "5" * 32,
    )
    submit(store, spec)
    keys = JobKeys("local", spec.id)
    for key in (keys.cache, keys.checkpoint("inpainter", 4, "state.safetensors"), keys.done("import", 0)):
        store.put(key, b"{}")
    store.put(ModelKeys("local", spec.model_id).file("unet", "config.json"), b"{}")
    return spec


def ended(store: ObjectStore, spec: FinetuneSpec, status: EndStatus, ago: timedelta = timedelta()) -> None:
    end = End(status=status, finished_at=datetime.now(UTC) - ago)
    store.put_json(JobKeys(spec.tenant, spec.id).end, end)


def found(store: ObjectStore, after: timedelta = timedelta()) -> dict[str, set[str]]:
    """Keys by the kind of their finding."""
    kinds: dict[str, set[str]] = {}
    for finding in fsck(store, datetime.now(UTC) + after, Verified()):
        kinds.setdefault(finding.kind, set()).add(finding.key)
    return kinds


def test_of_a_job_that_is_whole_nothing_is_found(store: ObjectStore, made: Generated) -> None:
    verified = Verified()
    assert list(fsck(store, datetime.now(UTC), verified)) == []
    assert (verified.manifests, verified.pictures) == (1, 8)
    before = sorted(store.list(""))
    assert tidy(store, datetime.now(UTC) + LATER) == 0
    assert sorted(store.list("")) == before


def test_records_of_another_version_keep_their_tenant_from_being_tidied_alone(
    store: ObjectStore, made: Generated
) -> None:
    """Of what one holds nothing can be told; other tenants' leftovers go."""
    elsewhere = put_generated(store, "elsewhere")
    surplus = [
        JobKeys(tenant, job.spec.id).candidate(9, "image")
        for tenant, job in (("local", made), ("elsewhere", elsewhere))
    ]
    for key in surplus:
        store.put(key, b"x")
    store.put(
        JobKeys("local", made.spec.id).spec,
        made.spec.model_dump_json().replace('"recipe":{', '"recipe":{"newer":1,').encode(),
    )
    assert tidy(store, datetime.now(UTC)) == 1
    assert [store.exists(key) for key in surplus] == [True, False]
    assert found(store)["unknown"] == {"t/local"}


def test_a_picture_missing_or_altered_is_named(store: ObjectStore, made: Generated) -> None:
    first, second = (pair.image.key for pair in made.manifest.pairs)
    store.delete([first])
    store.put(second, b"other bytes")
    assert found(store) == {"missing": {first}, "altered": {second}}


def test_candidates_beyond_the_last_one_needed_are_orphans(store: ObjectStore, made: Generated) -> None:
    surplus = JobKeys("local", made.spec.id).candidate(9, "image")
    store.put(surplus, b"x")
    assert found(store) == {"orphan": {surplus}}
    assert tidy(store, datetime.now(UTC)) == 1
    assert not store.exists(surplus)


def test_pictures_that_come_after_their_job_was_cleared_go(store: ObjectStore, made: Generated) -> None:
    removal.clear_job(store, "local", made.spec.id)
    late = JobKeys("local", made.spec.id).candidate(0, "image")
    store.put(late, b"pixels")
    assert found(store)["orphan"] == {late}
    assert tidy(store, datetime.now(UTC)) == 1
    assert not store.exists(late)


def test_what_a_training_needed_goes_once_it_has_succeeded(store: ObjectStore, trained: FinetuneSpec) -> None:
    keys = JobKeys("local", trained.id)
    assert found(store, LATER) == {}
    ended(store, trained, "succeeded")
    assert found(store) == {"orphan": {keys.cache, keys.checkpoint("inpainter", 4, "state.safetensors")}}
    tidy(store, datetime.now(UTC))
    assert store.exists(keys.done("import", 0))


def test_what_a_failed_job_left_stays_for_a_week(store: ObjectStore, trained: FinetuneSpec) -> None:
    keys, model = JobKeys("local", trained.id), ModelKeys("local", trained.model_id)
    ended(store, trained, "failed")
    assert found(store) == {}
    ended(store, trained, "failed", housekeeping.FAILED_KEPT + timedelta(minutes=1))
    tidy(store, datetime.now(UTC) + LATER)
    left = {key.removeprefix(f"{keys.root}/") for key in store.list(f"{keys.root}/")}
    assert left == {"spec.json", "end.json", "done/import/00000000.json"}
    assert list(store.list(f"{model.root}/")) == []


def test_what_was_never_finished_goes_after_a_while(store: ObjectStore) -> None:
    half = DatasetKeys("local", "ds_" + "3" * 32)
    store.put(half.image("00000"), b"x")
    jobless = JobKeys("local", uuid7())
    store.put(jobless.candidate(0, "image"), b"x")
    pointer = model_name("local", "gone")
    store.put(pointer, b'{"model_id": "md_0"}')
    assert found(store) == {"orphan": {pointer}}
    assert found(store, LATER) == {"orphan": {pointer, half.image("00000"), jobless.candidate(0, "image")}}


def test_a_job_whose_request_was_cut_off_is_planned_after_all(
    store: ObjectStore, made: Generated, trained: FinetuneSpec
) -> None:
    store.delete([active("local", trained.id)])
    tidy(store, datetime.now(UTC))
    assert active_jobs(store) == [("local", trained.id)]


def test_old_idempotency_keys_go(store: ObjectStore) -> None:
    key = idempotency("a" * 64)
    store.put(key, b"{}")
    assert list(orphans(store, datetime.now(UTC))) == []
    assert tidy(store, datetime.now(UTC) + housekeeping.IDEMPOTENCY_KEPT + LATER) == 1


def test_the_faults_of_a_job_that_failed_name_files_for_a_week(store: ObjectStore, trained: FinetuneSpec) -> None:
    key = JobKeys("local", trained.id).end
    fault = Fault(pointer="images/Doe_Jane.png", detail="no mask belongs to this image")
    for ago, told in ((timedelta(), (fault,)), (housekeeping.FAILED_KEPT + timedelta(minutes=1), ())):
        problem = problem_of("invalid-dataset", "1 fault in the dataset", [fault])
        store.put_json(key, End(status="failed", finished_at=datetime.now(UTC) - ago, problem=problem))
        tidy(store, datetime.now(UTC))
        kept = store.get_json(key, End).problem
        assert kept is not None
        assert (kept.errors, kept.detail) == (told, "1 fault in the dataset")


def test_what_the_service_did_not_write_is_told_and_left(store: ObjectStore) -> None:
    store.put("notes/readme.txt", b"x")
    assert found(store) == {"unknown": {"notes"}}
    tidy(store, datetime.now(UTC) + timedelta(days=400))
    assert store.exists("notes/readme.txt")
