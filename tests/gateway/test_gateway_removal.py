"""``DELETE``: what holds a dataset or a model is named; what was made from it goes with it where that is asked for."""

from __future__ import annotations

from datetime import UTC, datetime

import httpx
from gateways import Gateway
from meddiff.contracts.ids import model_id_of, uuid7
from meddiff.contracts.jobs import End, FinetuneSpec
from meddiff.contracts.recipes import CPU
from meddiff.contracts.requests import FinetuneRequest
from meddiff.planning.dispatch import submit
from meddiff.store.keys import DatasetKeys, JobKeys, ModelKeys, model_name
from stored import Generated, put_dataset, put_generated, put_model


def left(gateway: Gateway, root: str) -> list[str]:
    return sorted(key.removeprefix(f"{root}/") for key in gateway.store.list(f"{root}/"))


def holders(response: httpx.Response) -> set[str]:
    assert (response.status_code, response.json()["type"]) == (409, "urn:meddiff:problem:conflict")
    return {fault["pointer"] for fault in response.json()["errors"]}


def ended(gateway: Gateway, job_id: str) -> None:
    gateway.store.put_json(JobKeys(gateway.tenant, job_id).end, End(status="succeeded", finished_at=datetime.now(UTC)))


def only(gateway: Gateway) -> Generated:
    """A generate job's results, its model and dataset, and nothing else of the tenant."""
    gateway.store.delete_prefix(f"t/{gateway.tenant}/")
    return put_generated(gateway.store, gateway.tenant)


def test_a_dataset_that_nothing_holds_goes(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant, level=200)
    assert gateway.http.delete(f"/datasets/{dataset.id}").status_code == 204
    assert left(gateway, DatasetKeys(gateway.tenant, dataset.id).root) == []
    assert gateway.http.delete(f"/datasets/{dataset.id}").status_code == 404


def test_what_was_made_from_a_dataset_holds_it_or_goes_with_it(gateway: Gateway) -> None:
    made = only(gateway)
    job, model, dataset = made.spec.id, made.spec.model_id, made.spec.dataset_id
    assert holders(gateway.http.delete(f"/datasets/{dataset}")) == {f"/models/{model}", f"/jobs/{job}"}
    assert gateway.http.get(f"/jobs/{job}/pairs/0/image").status_code == 200
    assert gateway.http.delete(f"/datasets/{dataset}", params={"derived": True}).status_code == 204
    assert left(gateway, DatasetKeys(gateway.tenant, dataset).root) == []
    assert left(gateway, ModelKeys(gateway.tenant, model).root) == []
    assert left(gateway, JobKeys(gateway.tenant, job).root) == ["end.json", "spec.json"]
    assert gateway.http.get(f"/jobs/{job}").json()["status"] == "succeeded"
    assert gateway.http.get(f"/jobs/{job}/pairs/0/image").status_code == 410


def test_parts_of_a_model_that_was_never_published_go_with_their_dataset(gateway: Gateway) -> None:
    made = only(gateway)
    job_id = uuid7()
    spec = FinetuneSpec(
        tenant=gateway.tenant,
        id=job_id,
        created_at=datetime.now(UTC),
        request=FinetuneRequest(dataset_uri=made.spec.dataset_id),
        recipe=CPU,
        model_id=model_id_of(job_id),
    )
    submit(gateway.store, spec)
    ended(gateway, job_id)
    part = f"{ModelKeys(gateway.tenant, spec.model_id).root}/backgrounds/00000.png"
    gateway.store.put(part, b"a patient's picture, its lesion repaired")
    answer = gateway.http.delete(f"/datasets/{made.spec.dataset_id}", params={"derived": True})
    assert answer.status_code == 204, answer.text
    assert not gateway.store.exists(part)


def test_a_job_whose_results_are_gone_holds_nothing(gateway: Gateway) -> None:
    made = only(gateway)
    assert gateway.http.delete(f"/models/{made.spec.model_id}", params={"derived": True}).status_code == 204
    assert gateway.http.delete(f"/datasets/{made.spec.dataset_id}").status_code == 204


def test_a_job_that_goes_on_holds_what_it_works_on(gateway: Gateway) -> None:
    made = only(gateway)
    dataset = made.spec.dataset_id
    tuning = gateway.http.post("/finetune", json={"dataset_uri": dataset}).json()["id"]
    painting = gateway.http.post("/generate", json={"model": made.spec.model_id, "count": 1}).json()["id"]
    everything = {"derived": True}
    on_dataset = gateway.http.delete(f"/datasets/{dataset}", params=everything)
    assert holders(on_dataset) == {f"/jobs/{tuning}", f"/jobs/{painting}"}
    assert holders(gateway.http.delete(f"/models/{made.spec.model_id}", params=everything)) == {f"/jobs/{painting}"}
    assert gateway.http.get(f"/jobs/{made.spec.id}/manifest").status_code == 200
    ended(gateway, tuning)
    ended(gateway, painting)
    assert gateway.http.delete(f"/datasets/{dataset}", params=everything).status_code == 204


def test_a_dataset_brought_from_elsewhere_is_known_by_the_import(gateway: Gateway) -> None:
    gateway.store.delete_prefix(f"t/{gateway.tenant}/")
    dataset = put_dataset(gateway.store, gateway.tenant)
    masks = put_dataset(gateway.store, gateway.tenant, level=120)
    card = put_model(gateway.store, gateway.tenant, dataset)
    body = {"model": card.id, "count": 1, "masks": masks.id}
    job = gateway.http.post("/generate", json=body).json()["id"]
    assert holders(gateway.http.delete(f"/datasets/{masks.id}")) == {f"/jobs/{job}"}


def test_an_evaluation_holds_what_lies_behind_its_pairs(gateway: Gateway) -> None:
    """Its report shows pairs painted on another dataset's pictures; while it runs, they are what it works on."""
    made = only(gateway)
    grounds = put_dataset(gateway.store, gateway.tenant, level=120)
    request = made.spec.request.model_copy(update={"backgrounds": grounds.id})
    painted = made.spec.model_copy(update={"id": uuid7(), "request": request})
    keys = JobKeys(gateway.tenant, painted.id)
    submit(gateway.store, painted)
    gateway.store.put_json(keys.manifest, made.manifest)
    ended(gateway, painted.id)
    body = {"dataset_uri": made.spec.dataset_id, "synthetic_job": painted.id}
    evaluation = gateway.http.post("/evaluate", json=body).json()["id"]
    everything = {"derived": True}
    assert holders(gateway.http.delete(f"/datasets/{grounds.id}", params=everything)) == {f"/jobs/{evaluation}"}
    ended(gateway, evaluation)
    gateway.store.put(JobKeys(gateway.tenant, evaluation).report("html"), b"x")
    assert gateway.http.delete(f"/datasets/{grounds.id}", params=everything).status_code == 204
    assert gateway.http.get(f"/jobs/{evaluation}/report").status_code == 410


def test_a_model_goes_with_its_name_unless_another_bears_it(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    older = put_model(gateway.store, gateway.tenant, dataset, "twice")
    newer = put_model(gateway.store, gateway.tenant, dataset, "twice")
    assert gateway.http.delete(f"/models/{older.id}").status_code == 204
    assert gateway.http.get("/models/twice").json()["id"] == newer.id
    assert gateway.http.delete("/models/twice").status_code == 204
    assert gateway.http.get("/models/twice").status_code == 404
    assert not gateway.store.exists(model_name(gateway.tenant, "twice"))


def test_datasets_and_models_are_listed_by_pages(gateway: Gateway) -> None:
    gateway.store.delete_prefix(f"t/{gateway.tenant}/")
    datasets = [put_dataset(gateway.store, gateway.tenant, level) for level in (10, 20, 30, 40, 50)]
    cards = [put_model(gateway.store, gateway.tenant, dataset) for dataset in datasets]
    for path, wanted in (("datasets", sorted(one.id for one in datasets)), ("models", [one.id for one in cards[::-1]])):
        found, cursor = [], None
        while True:
            page = gateway.http.get(f"/{path}", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
            found += [one["id"] for one in page[path]]
            cursor = page["next"]
            if cursor is None:
                break
        assert found == wanted
