"""Tenants, keys and roles: who may ask what, who sees whose, and the record of what was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from gateways import Gateway, started
from meddiff import access
from meddiff.contracts.access import ApiKey, Role
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.jobs import End
from meddiff.planning.observe import read_spec
from meddiff.store.keys import JobKeys
from stored import archive, put_dataset, put_generated, put_model

ZIP = {"Content-Type": "application/zip"}
Caller = Callable[[str, Role], httpx.Client]


@pytest.fixture(scope="module")
def guarded(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that requires keys, over the store of the other."""
    settings = gateway.settings.model_copy(update={"require_keys": True})
    with started(settings, tmp_path_factory.mktemp("guarded")) as running:
        yield running


@pytest.fixture
def caller(guarded: Gateway) -> Iterator[Caller]:
    """Makes a connection that carries a fresh key of a tenant and a role."""
    opened: list[httpx.Client] = []

    def connect(tenant: str, role: Role) -> httpx.Client:
        token = access.create_key(guarded.store, tenant, role).token
        headers = {"Authorization": f"Bearer {token}"}
        opened.append(httpx.Client(base_url=guarded.url, timeout=30, headers=headers))
        return opened[-1]

    yield connect
    for client in opened:
        client.close()


def slug(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["type"]).rpartition(":")[2]


def test_events_end_where_the_key_is_revoked(guarded: Gateway, caller: Caller) -> None:
    asks = caller("leavers", "operator")
    dataset = put_dataset(guarded.store, "leavers")
    job = asks.post("/finetune", json={"dataset_uri": dataset.id}).json()["id"]
    with asks.stream("GET", f"/jobs/{job}/events") as response:
        lines = response.iter_lines()
        assert any(line.startswith("event: job") for line in lines)
        token = asks.headers["Authorization"].removeprefix("Bearer ")
        key = access.find_key(guarded.store, token)
        assert key is not None
        access.revoke_key(guarded.store, key.id)
        assert [line for line in lines if line.startswith("event: job")] == []


PLACES = [
    ("GET", "/jobs"), ("GET", "/jobs/x"), ("GET", "/jobs/x/manifest"), ("GET", "/jobs/x/events"), ("GET", "/datasets"),
    ("GET", "/models"), ("GET", "/audit"), ("POST", "/finetune"), ("POST", "/generate"), ("POST", "/evaluate"),
    ("POST", "/datasets"), ("POST", "/datasets/validate"), ("POST", "/jobs/x/cancel"), ("DELETE", "/datasets/x"),
    ("DELETE", "/models/x"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PLACES)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer mdft_guess"}, {"Authorization": "Basic bWRmdA=="}])
def test_without_a_key_nothing_is_answered(guarded: Gateway, method: str, path: str, headers: dict[str, str]) -> None:
    response = guarded.http.request(method, path, headers=headers)
    assert (response.status_code, slug(response)) == (401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"


def test_what_names_no_patient_needs_no_key(guarded: Gateway) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/recipes", "/schemas/manifest.json"):
        assert guarded.http.get(path).status_code == 200


def test_every_route_of_a_tenant_is_in_the_table_above_or_begins_like_one(guarded: Gateway) -> None:
    free = {"/healthz", "/readyz", "/metrics", "/recipes", "/schemas/manifest.json", "/schemas/report.json"}
    document = guarded.http.get("/openapi.json").json()
    keyed = {
        (method.upper(), path)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if operation.get("security")
    }
    every = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert {path for _, path in every - keyed} == free


def test_a_role_may_what_those_before_it_may(caller: Caller) -> None:
    reader, operator, admin = (caller("radiology", role) for role in ("reader", "operator", "admin"))
    assert [one.get("/jobs").status_code for one in (reader, operator, admin)] == [200, 200, 200]
    assert [one.post("/datasets", content=archive(), headers=ZIP).status_code for one in (reader, operator, admin)] == [
        403,
        201,
        201,
    ]
    dataset_id = admin.get("/datasets").json()["datasets"][0]["id"]
    assert [one.delete(f"/datasets/{dataset_id}").status_code for one in (reader, operator, admin)] == [403, 403, 204]
    assert [one.get("/audit").status_code for one in (reader, operator, admin)] == [403, 403, 200]


def test_a_tenant_finds_nothing_of_another(caller: Caller, guarded: Gateway) -> None:
    made = put_generated(guarded.store, "cardiology")
    dataset = put_dataset(guarded.store, "cardiology", level=90)
    card = put_model(guarded.store, "cardiology", dataset, "heart")
    theirs, mine = caller("cardiology", "admin"), caller("radiology", "admin")
    job = made.spec.id
    for path in (
        f"/jobs/{job}", f"/jobs/{job}/manifest", f"/jobs/{job}/pairs/0/image", f"/jobs/{job}/pairs/0/background",
        f"/jobs/{job}/contact_sheet", f"/jobs/{job}/events", f"/models/{card.id}", "/models/heart",
        f"/datasets/{dataset.id}",
    ):  # fmt: skip
        assert theirs.get(path).status_code == 200, path
        assert (mine.get(path).status_code, slug(mine.get(path))) == (404, "not-found"), path
    for path in (f"/datasets/{dataset.id}", f"/models/{card.id}", "/models/heart"):
        assert mine.delete(path).status_code == 404
    assert mine.post(f"/jobs/{job}/cancel").status_code == 404
    for path, body in (
        ("/generate", {"model": card.id, "count": 1}),
        ("/generate", {"model": "heart", "count": 1}),
        ("/finetune", {"dataset_uri": dataset.id}),
        ("/evaluate", {"dataset_uri": dataset.id, "synthetic_job": job}),
    ):
        assert mine.post(path, json=body).status_code == 422, path
    lists = {"jobs": "jobs", "models": "models", "datasets": "datasets"}
    assert all(mine.get(f"/{path}").json()[field] == [] for path, field in lists.items())


def test_an_idempotency_key_is_its_tenants_own(caller: Caller, guarded: Gateway) -> None:
    jobs = []
    for tenant in ("radiology", "cardiology"):
        dataset = put_dataset(guarded.store, tenant, level=30)
        headers = {"Idempotency-Key": "the same"}
        answer = caller(tenant, "operator").post("/finetune", json={"dataset_uri": dataset.id}, headers=headers)
        assert answer.status_code == 202, answer.json()
        jobs.append(answer.json()["id"])
    assert jobs[0] != jobs[1]


def test_a_job_tells_whose_key_asked_for_it(caller: Caller, guarded: Gateway) -> None:
    dataset = put_dataset(guarded.store, "radiology", level=40)
    client = caller("radiology", "operator")
    token = client.headers["authorization"].removeprefix("Bearer ")
    job = client.post("/finetune", json={"dataset_uri": dataset.id}).json()
    assert job["requested_by"] == sha256_hex(token.encode())[:16]
    assert read_spec(guarded.store, "radiology", job["id"]).requested_by == job["requested_by"]


def test_a_revoked_key_is_refused(caller: Caller, guarded: Gateway) -> None:
    made = access.create_key(guarded.store, "radiology", "admin", "laptop")
    access.revoke_key(guarded.store, made.key.id)
    response = guarded.http.get("/jobs", headers={"Authorization": f"Bearer {made.token}"})
    assert (response.status_code, slug(response)) == (401, "unauthenticated")
    assert made.key.id in [key.id for key in access.list_keys(guarded.store) if key.revoked_at is not None]


def test_the_store_holds_no_token(guarded: Gateway) -> None:
    made = access.create_key(guarded.store, "radiology", "admin", "laptop")
    for key in guarded.store.list("keys/"):
        assert made.token not in key
        assert made.token.encode() not in guarded.store.get(key)
        assert isinstance(guarded.store.get_json(key, ApiKey), ApiKey)


def test_every_change_asked_for_is_on_record_whether_allowed_or_not(caller: Caller, guarded: Gateway) -> None:
    reader, admin = caller("pathology", "reader"), caller("pathology", "admin")
    reader.post("/generate", json={"model": "none", "count": 1})
    admin.delete("/models/none")
    admin.get("/jobs")
    records = admin.get("/audit").json()["records"]
    assert [(one["method"], one["path"], one["role"], one["allowed"]) for one in records] == [
        ("DELETE", "/models/none", "admin", True),
        ("POST", "/generate", "reader", False),
    ]
    first = admin.get("/audit", params={"limit": 1}).json()
    second = admin.get("/audit", params={"limit": 1, "cursor": first["next"]}).json()
    assert [*first["records"], *second["records"]] == records
    assert second["next"] is None
    assert caller("radiology", "admin").get("/audit").json()["records"] != records


@pytest.mark.parametrize("cursor", ["x", "eA==", "\u00e9"])
@pytest.mark.parametrize("path", ["/audit", "/jobs"])
def test_what_is_no_cursor_is_a_fault(gateway: Gateway, path: str, cursor: str) -> None:
    response = gateway.http.get(path, params={"cursor": cursor})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "?cursor")


def test_logs_name_the_key_and_never_the_token(guarded: Gateway, tmp_path: Path) -> None:
    with started(guarded.settings, tmp_path) as other:
        made = access.create_key(guarded.store, "radiology", "reader")
        other.http.get("/jobs", headers={"Authorization": f"Bearer {made.token}"})
    log = (tmp_path / "gateway.log").read_text()
    assert f'"key": "{made.key.id}"' in log
    assert '"tenant": "radiology"' in log
    assert made.token not in log


def test_an_ended_job_without_results_is_gone(gateway: Gateway) -> None:
    made = put_generated(gateway.store, gateway.tenant)
    keys = JobKeys(gateway.tenant, made.spec.id)
    gateway.store.delete([keys.manifest])
    response = gateway.http.get(f"/jobs/{made.spec.id}/manifest")
    assert (response.status_code, slug(response)) == (410, "gone")
    gateway.store.delete([keys.end])
    gateway.store.put_json(keys.end, End(status="failed", finished_at=datetime.now(UTC)))
    assert slug(gateway.http.get(f"/jobs/{made.spec.id}/manifest")) == "not-ready"
