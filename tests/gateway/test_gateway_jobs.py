"""Jobs over HTTP: accepted, listed, read, cancelled; and every fault of a request at once."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways import Gateway, started, until
from meddiff.contracts.ids import created_at, uuid7
from meddiff.contracts.jobs import End, EvaluateSpec, FinetuneSpec, GenerateSpec
from meddiff.contracts.recipes import PAPER
from meddiff.planning.observe import read_spec
from meddiff.store.keys import DatasetKeys, JobKeys, ModelKeys, active
from stored import put_dataset, put_generated, put_model

MISSING_JOB = "019400aa-0000-7000-8000-000000000000"


def accept_finetune(gateway: Gateway, **changes: object) -> httpx.Response:
    dataset = put_dataset(gateway.store, gateway.tenant)
    return gateway.http.post("/finetune", json={"dataset_uri": dataset.id, **changes})


def pointers(response: httpx.Response) -> set[str]:
    assert response.headers["content-type"] == "application/problem+json"
    return {fault["pointer"] for fault in response.json()["errors"]}


def test_finetune_is_accepted_with_everything_resolved(gateway: Gateway) -> None:
    response = accept_finetune(gateway, name="skin", recipe={"override": {"finetuning": {"steps": 5}}})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert int(response.headers["retry-after"]) > 0
    assert job["recipe"]["finetuning"]["steps"] == 5
    assert job["recipe"]["mask_generation"]["steps"] > 5
    spec = read_spec(gateway.store, gateway.tenant, job["id"])
    assert isinstance(spec, FinetuneSpec)
    assert spec.request.name == "skin"
    assert gateway.store.exists(active(gateway.tenant, job["id"]))


def test_generate_resolves_the_name_of_its_model(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    name = f"skin-{uuid.uuid4().hex[:8]}"
    card = put_model(gateway.store, gateway.tenant, dataset, name)
    response = gateway.http.post(
        "/generate", json={"model": name, "count": 3, "recipe": {"inpainting": {"strength": 0.5}}}
    )
    assert response.status_code == 202
    spec = read_spec(gateway.store, gateway.tenant, response.json()["id"])
    assert isinstance(spec, GenerateSpec)
    assert (spec.model_id, spec.dataset_id) == (card.id, dataset.id)
    assert spec.recipe.inpainting.strength == 0.5
    assert spec.recipe.finetuning == card.recipe.finetuning


def test_what_a_model_cannot_do_is_refused(gateway: Gateway) -> None:
    card = put_model(gateway.store, gateway.tenant, put_dataset(gateway.store, gateway.tenant))
    healthy = put_dataset(gateway.store, gateway.tenant, level=60)
    cases = tuple(case.model_copy(update={"role": "background", "mask_sha256": None}) for case in healthy.cases)
    key = DatasetKeys(gateway.tenant, healthy.id).dataset
    gateway.store.put_json(key, healthy.model_copy(update={"cases": cases}))
    changes = {"quality": {"encoder": "dinov2", "max_shape_iou": 0.5}, "inpainting": {"background": "repair"}}
    body = {"model": card.id, "count": 1, "masks": healthy.id, "recipe": changes}
    response = gateway.http.post("/generate", json=body)
    assert response.status_code == 422
    assert pointers(response) == {"/masks", "/recipe/quality/encoder", "/recipe/inpainting/background"}


@pytest.mark.parametrize(
    ("recipe", "override", "pointer"),
    [
        ("gpu", {"quality": {"encoder": "efficientnet-lite0"}}, "/recipe/override/quality/encoder_source"),
        ("cpu", {"quality": {"encoder": "dinov2"}}, "/recipe/override/quality/encoder_source"),
        ("paper", {"inpainting": {"background": "cover"}}, "/recipe/override/inpainting/background"),
        ("cpu", {"finetuning": {"repair_share": 0.6}}, "/recipe/override/finetuning/repair_share"),
        ("cpu", {"work": {"training_threads": 257}}, "/recipe/override/work/training_threads"),
        ("cpu", {"mask_generation": {"widths": [16, 2048]}}, "/recipe/override/mask_generation/widths"),
        ("paper", {"inpainting": {"guide_margin": 0.1}}, "/recipe/override/inpainting/guide_margin"),
    ],
)
def test_values_that_do_not_go_together_are_refused(
    gateway: Gateway, recipe: str, override: dict[str, Any], pointer: str
) -> None:
    response = accept_finetune(gateway, recipe={"name": recipe, "override": override})
    assert response.status_code == 422
    assert pointers(response) == {pointer}
    dataset = put_dataset(gateway.store, gateway.tenant).id
    body = {"dataset_uri": dataset, "folds": 2, "recipe": {"name": recipe, "override": override}}
    assert pointers(gateway.http.post("/evaluate", json=body)) == {pointer}


def test_a_model_that_paints_lesions_alone_covers_none(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    card = put_model(gateway.store, gateway.tenant, dataset)
    gateway.store.put_json(ModelKeys(gateway.tenant, card.id).card, card.model_copy(update={"recipe": PAPER}))
    changes = {"inpainting": {"background": "cover"}}
    body = {"model": card.id, "count": 1, "backgrounds": dataset.id, "recipe": changes}
    response = gateway.http.post("/generate", json=body)
    assert response.status_code == 422
    assert pointers(response) == {"/backgrounds", "/recipe/inpainting/background"}


def test_an_accepted_finetune_sends_its_import(gateway: Gateway) -> None:
    before = gateway.leases.backlog("datasets")
    assert accept_finetune(gateway).status_code == 202
    assert gateway.leases.backlog("datasets") >= max(1, before)


def test_all_faults_of_a_finetune_come_at_once(gateway: Gateway) -> None:
    body = {
        "dataset_uri": "",
        "max_pairs": 1,
        "colour": "red",
        "recipe": {"override": {"finetuning": {"steps": 0}, "work": {"shard_size": 999}, "wings": 2}},
    }
    response = gateway.http.post("/finetune", json=body)
    assert response.status_code == 422
    assert pointers(response) == {
        "/dataset_uri",
        "/max_pairs",
        "/colour",
        "/recipe/override/finetuning/steps",
        "/recipe/override/work/shard_size",
        "/recipe/override/wings",
    }


def test_all_faults_of_a_generate_come_at_once(gateway: Gateway) -> None:
    body = {
        "model": "nobody",
        "count": 1,
        "masks": f"ds_{'0' * 32}",
        "backgrounds": f"ds_{'1' * 32}",
        "recipe": {"finetuning": {"steps": 5}, "quality": {"far_quantile": 2}},
    }
    response = gateway.http.post("/generate", json=body)
    assert response.status_code == 422
    assert pointers(response) == {
        "/model",
        "/masks",
        "/backgrounds",
        "/recipe/finetuning",
        "/recipe/quality/far_quantile",
    }


def test_a_body_that_is_no_json_is_a_problem(gateway: Gateway) -> None:
    response = gateway.http.post("/finetune", content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert pointers(response) == {""}


@pytest.mark.parametrize(
    ("uri", "status"),
    [
        ("file:///etc", 403),
        ("s3://someone-elses-bucket/pairs", 403),
        ("s3://gateway-own/t/other/datasets", 403),
        ("ftp://example.org/pairs", 422),
        (f"ds_{'0' * 32}", 422),
    ],
)
def test_a_source_that_may_not_be_read_is_refused_at_once(gateway: Gateway, uri: str, status: int) -> None:
    response = gateway.http.post("/finetune", json={"dataset_uri": uri})
    assert response.status_code == status
    assert pointers(response) == {"/dataset_uri"}
    assert "etc" not in {path.name for path in gateway.file_root.iterdir()}


def test_a_folder_under_the_operators_root_is_accepted(gateway: Gateway) -> None:
    folder: Path = gateway.file_root / "pairs"
    folder.mkdir(exist_ok=True)
    assert gateway.http.post("/finetune", json={"dataset_uri": folder.as_uri()}).status_code == 202


def test_the_same_idempotency_key_gives_the_first_job(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    body = {"dataset_uri": dataset.id}
    first, second = (gateway.http.post("/finetune", json=body, headers=headers) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    other = gateway.http.post("/finetune", json={**body, "split_seed": 1}, headers=headers)
    assert other.status_code == 422
    assert pointers(other) == {"?Idempotency-Key"}


def test_many_at_once_with_one_key_start_one_job(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    answers: list[httpx.Response] = []

    def post() -> None:
        answers.append(
            httpx.post(f"{gateway.url}/finetune", json={"dataset_uri": dataset.id}, headers=headers, timeout=30)
        )

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_refused_request_uses_up_no_key(gateway: Gateway) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    assert gateway.http.post("/generate", json={"model": "nobody", "count": 1}, headers=headers).status_code == 422
    card = put_model(gateway.store, gateway.tenant, put_dataset(gateway.store, gateway.tenant))
    assert gateway.http.post("/generate", json={"model": card.id, "count": 1}, headers=headers).status_code == 202


def test_a_running_job_says_when_to_ask_again_and_an_ended_one_does_not(gateway: Gateway) -> None:
    running = gateway.http.get(accept_finetune(gateway).headers["location"])
    assert running.json()["status"] in ("queued", "validating")
    assert "retry-after" in running.headers
    ended = gateway.http.get(f"/jobs/{put_generated(gateway.store, gateway.tenant).spec.id}")
    assert ended.json()["status"] == "succeeded"
    assert ended.json()["result"] == {"accepted": 2}
    assert ended.json()["links"]["manifest"].endswith("/manifest")
    assert "retry-after" not in ended.headers


def test_waiting_ends_with_a_change_and_not_before(gateway: Gateway) -> None:
    job_id = accept_finetune(gateway).json()["id"]

    def unchanged() -> str | None:
        """The job's tag, once its place in the queue has come to rest."""
        tag = gateway.http.get(f"/jobs/{job_id}").headers["etag"]
        answer = gateway.http.get(f"/jobs/{job_id}?wait=0.6", headers={"If-None-Match": tag})
        return tag if (answer.status_code, answer.headers["etag"]) == (304, tag) else None

    tag = until(unchanged)
    answers: list[httpx.Response] = []

    def wait() -> None:
        answers.append(httpx.get(f"{gateway.url}/jobs/{job_id}?wait=30", headers={"If-None-Match": tag}, timeout=60))

    begun = time.monotonic()
    waiting = threading.Thread(target=wait)
    waiting.start()
    end = End(status="cancelled", finished_at=datetime.now(UTC))
    assert gateway.store.create_json(JobKeys(gateway.tenant, job_id).end, end)
    waiting.join()
    assert answers[0].json()["status"] == "cancelled"
    assert time.monotonic() - begun < 15


def test_jobs_that_wait_are_listed_by_pages_newest_first(gateway: Gateway) -> None:
    waiting = [accept_finetune(gateway).json()["id"] for _ in range(3)]
    found: list[str] = []
    cursor = None
    while len(found) < 3:
        page = gateway.http.get(
            "/jobs", params={"status": "queued", "limit": 2, **({"cursor": cursor} if cursor else {})}
        )
        found += [job["id"] for job in page.json()["jobs"]]
        cursor = page.json()["next"]
    assert found[:3] == waiting[::-1]


def test_a_list_is_paged_newest_first_and_filtered(gateway: Gateway) -> None:
    ids = [accept_finetune(gateway).json()["id"] for _ in range(3)]
    done = put_generated(gateway.store, gateway.tenant).spec.id
    first = gateway.http.get("/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["jobs"]] == [done, ids[2]]
    second = gateway.http.get("/jobs", params={"limit": 2, "cursor": first["next"]}).json()
    assert [job["id"] for job in second["jobs"]] == [ids[1], ids[0]]
    only = gateway.http.get("/jobs", params={"kind": "generate", "status": "succeeded", "limit": 1}).json()
    assert [job["id"] for job in only["jobs"]] == [done]
    finetunes = gateway.http.get("/jobs", params={"kind": "finetune", "limit": 100}).json()["jobs"]
    assert {job["kind"] for job in finetunes} == {"finetune"}


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "kind=bake", "status=odd", "cursor=%C3%A4", "cursor=AAAA"])
def test_a_bad_list_query_is_named(gateway: Gateway, query: str) -> None:
    response = gateway.http.get(f"/jobs?{query}")
    assert response.status_code == 422
    assert pointers(response) == {"?" + query.partition("=")[0]}


def test_cancel_leaves_a_request_and_ends_the_job(gateway: Gateway) -> None:
    job_id = accept_finetune(gateway).json()["id"]
    response = gateway.http.post(f"/jobs/{job_id}/cancel")
    assert response.status_code == 202
    assert response.json()["status"] in ("cancelling", "cancelled")
    job = gateway.http.get(f"/jobs/{job_id}?wait=30", timeout=60).json()
    assert job["status"] == "cancelled"


def test_cancelling_an_ended_job_changes_nothing(gateway: Gateway) -> None:
    spec = put_generated(gateway.store, gateway.tenant).spec
    assert gateway.http.post(f"/jobs/{spec.id}/cancel").json()["status"] == "succeeded"
    assert not gateway.store.exists(JobKeys(spec.tenant, spec.id).cancel)


@pytest.mark.parametrize("job_id", [MISSING_JOB, "nonsense", "..%2F..%2Fsecrets"])
@pytest.mark.parametrize("path", ["", "/manifest", "/previews", "/contact_sheet", "/pairs/0/image"])
def test_a_job_that_never_was_is_not_found(gateway: Gateway, job_id: str, path: str) -> None:
    response = gateway.http.get(f"/jobs/{job_id}{path}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


def test_ids_sort_by_time_and_say_when_they_were_made() -> None:
    before = datetime.now(UTC)
    ids = [uuid7() for _ in range(200)]
    assert {uuid.UUID(one).version for one in ids} == {7}
    assert len(set(ids)) == len(ids)
    assert abs((created_at(ids[0]) - before).total_seconds()) < 1
    early = uuid7()
    time.sleep(0.001)
    assert early < uuid7()


def test_an_evaluation_of_given_pairs_takes_its_recipe_from_their_model(gateway: Gateway) -> None:
    made = put_generated(gateway.store, gateway.tenant)
    changes = {"recipe": {"override": {"evaluation": {"steps": 7}}}}
    body = {"dataset_uri": made.spec.dataset_id, "synthetic_job": made.spec.id, **changes}
    response = gateway.http.post("/evaluate", json=body)
    assert response.status_code == 202, response.json()
    job = response.json()
    assert job["links"]["report"] == f"/jobs/{job['id']}/report"
    spec = read_spec(gateway.store, gateway.tenant, job["id"])
    assert isinstance(spec, EvaluateSpec)
    assert (spec.model_id, spec.synthetic_job) == (made.spec.model_id, made.spec.id)
    assert spec.recipe.evaluation.steps == 7
    report = gateway.http.get(f"/jobs/{job['id']}/report")
    assert (report.status_code, report.json()["type"]) == (409, "urn:meddiff:problem:not-ready")


def test_every_fault_of_an_evaluation_is_named_at_once(gateway: Gateway) -> None:
    body = {
        "dataset_uri": "ds_" + "7" * 32,
        "test_uri": "ds_" + "8" * 32,
        "synthetic_job": MISSING_JOB,
        "recipe": {"override": {"inpainting": {"strength": 0.5}}},
    }
    response = gateway.http.post("/evaluate", json=body)
    assert response.status_code == 422
    wrong = {"/dataset_uri", "/test_uri", "/synthetic_job", "/recipe/override/inpainting"}
    assert pointers(response) == wrong
    both = gateway.http.post("/evaluate", json={"dataset_uri": "ds_" + "7" * 32, "folds": 3, "model": "skin"})
    assert both.status_code == 422


def test_a_fine_tune_is_no_source_of_pairs(gateway: Gateway) -> None:
    tuned = accept_finetune(gateway).json()
    body = {"dataset_uri": tuned["request"]["dataset_uri"], "synthetic_job": tuned["id"]}
    response = gateway.http.post("/evaluate", json=body)
    assert pointers(response) == {"/synthetic_job"}
    assert "no generate job" in response.json()["errors"][0]["detail"]


def test_jobs_are_filtered_by_their_metadata(gateway: Gateway) -> None:
    ward = uuid.uuid4().hex
    wanted = accept_finetune(gateway, metadata={"ward": ward, "study": "a:b"}).json()["id"]
    accept_finetune(gateway, metadata={"ward": ward, "study": "c"})
    accept_finetune(gateway, metadata={"study": "a:b"})
    found = gateway.http.get("/jobs", params={"metadata": [f"ward:{ward}", "study:a:b"]}).json()["jobs"]
    assert [job["id"] for job in found] == [wanted]
    assert gateway.http.get("/jobs", params={"metadata": "ward"}).status_code == 422


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ids and jobs of a stream of server-sent events."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
        elif "data" in fields:
            yield fields["id"], json.loads(fields["data"])
            fields = {}


def test_events_tell_of_every_change_until_the_end_and_nothing_twice(gateway: Gateway) -> None:
    job_id = accept_finetune(gateway).json()["id"]
    with gateway.http.stream("GET", f"/jobs/{job_id}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        told = events(response)
        first, job = next(told)
        assert (job["id"], job["status"]) == (job_id, "queued")
        gateway.http.post(f"/jobs/{job_id}/cancel")
        second, job = next(told)
        assert job["status"] in ("cancelling", "cancelled")
        ids = [first, second, *(name for name, _ in told)]
    assert len(set(ids)) == len(ids)
    assert gateway.http.get(f"/jobs/{job_id}").json()["status"] == "cancelled"
    again = gateway.http.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": first})
    assert [job["status"] for _, job in events(again)] == ["cancelled"]
    again = gateway.http.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": ids[-1]})
    assert list(events(again)) == []
    assert gateway.http.get(f"/jobs/{MISSING_JOB}/events").status_code == 404


@pytest.mark.parametrize(
    ("tenant", "bound"), [("small", {"max_tenant_jobs": 3}), ("smaller", {"tenant_jobs": {"smaller": 3}})]
)
def test_no_more_jobs_are_accepted_than_may_be_unfinished(
    gateway: Gateway, tmp_path: Path, tenant: str, bound: dict[str, Any]
) -> None:
    settings = gateway.settings.model_copy(update={**bound, "tenant": tenant, "sweep_seconds": 600})
    dataset = put_dataset(gateway.store, tenant)
    body = {"dataset_uri": dataset.id}
    with started(settings, tmp_path) as other:
        accepted = [other.http.post("/finetune", json=body, headers={"Idempotency-Key": f"{n}"}) for n in range(4)]
        assert [one.status_code for one in accepted] == [202, 202, 202, 429]
        assert accepted[3].json()["type"] == "urn:meddiff:problem:too-many-jobs"
        assert int(accepted[3].headers["retry-after"]) > 0
        again = other.http.post("/finetune", json=body, headers={"Idempotency-Key": "0"})
        assert again.json()["id"] == accepted[0].json()["id"]
        other.http.post(f"/jobs/{accepted[0].json()['id']}/cancel")
        until(lambda: other.http.post("/finetune", json=body, headers={"Idempotency-Key": "3"}).status_code == 202)
