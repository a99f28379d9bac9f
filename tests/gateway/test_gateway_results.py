"""Manifest, pictures, previews, datasets, models and recipes over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from gateways import Gateway, started
from jsonschema import Draft202012Validator
from meddiff.contracts.recipes import RECIPES
from meddiff.store.keys import JobKeys
from meddiff_services.gateway.schemas import manifest_schema, report_schema, write
from stored import archive, png, put_dataset, put_generated, put_model

ROOT = Path(__file__).parents[2]
ZIP = {"Content-Type": "application/zip"}


def test_manifest_is_valid_against_the_published_schema(gateway: Gateway) -> None:
    made = put_generated(gateway.store, gateway.tenant)
    manifest = gateway.http.get(f"/jobs/{made.spec.id}/manifest").json()
    schema = gateway.http.get("/schemas/manifest.json").json()
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(manifest)
    del manifest["pairs"][0]["guide"]
    assert list(Draft202012Validator(schema).iter_errors(manifest))


def test_schemas_and_settings_in_docs_are_current(tmp_path: Path) -> None:
    write(tmp_path)
    assert (ROOT / "docs" / "settings.md").read_bytes() == (tmp_path / "settings.md").read_bytes()
    for name, schema in (("manifest.schema.json", manifest_schema()), ("report.schema.json", report_schema())):
        assert (ROOT / "docs" / name).read_bytes() == (tmp_path / name).read_bytes()
        assert json.loads((tmp_path / name).read_text()) == schema


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("what", ["image", "label", "shape", "guide", "background"])
def test_every_picture_of_a_pair_is_served(gateway: Gateway, index: int, what: str) -> None:
    made = put_generated(gateway.store, gateway.tenant)
    response = gateway.http.get(f"/jobs/{made.spec.id}/pairs/{index}/{what}")
    assert response.headers["content-type"] == "image/png"
    assert response.content == made.pictures[f"{index}/{what}"]


def test_with_a_public_store_a_picture_is_redirected_to_it(gateway: Gateway, tmp_path: Path) -> None:
    made = put_generated(gateway.store, gateway.tenant)
    settings = gateway.settings.model_copy(update={"s3_public_endpoint": gateway.settings.s3_endpoint})
    with started(settings, tmp_path) as other:
        redirected = other.http.get(f"/jobs/{made.spec.id}/pairs/2/image")
        assert redirected.status_code == 307
        assert httpx.get(redirected.headers["location"]).content == made.pictures["2/image"]


def test_contact_sheet_is_served(gateway: Gateway) -> None:
    made = put_generated(gateway.store, gateway.tenant)
    assert gateway.http.get(f"/jobs/{made.spec.id}/contact_sheet").content == made.pictures["contact_sheet"]


@pytest.mark.parametrize(
    ("path", "status"), [("1/image", 404), ("7/background", 404), ("0/score", 422), ("x/image", 422)]
)
def test_a_picture_the_manifest_does_not_hold_is_a_problem(gateway: Gateway, path: str, status: int) -> None:
    made = put_generated(gateway.store, gateway.tenant)
    response = gateway.http.get(f"/jobs/{made.spec.id}/pairs/{path}")
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


def test_a_job_without_a_manifest_is_not_ready(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    job_id = gateway.http.post("/finetune", json={"dataset_uri": dataset.id}).json()["id"]
    for path in ("manifest", "contact_sheet", "pairs/0/image"):
        response = gateway.http.get(f"/jobs/{job_id}/{path}")
        assert (response.status_code, response.json()["type"]) == (409, "urn:meddiff:problem:not-ready")


def test_previews_are_listed_in_order_and_served(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    job_id = gateway.http.post("/finetune", json={"dataset_uri": dataset.id}).json()["id"]
    assert gateway.http.get(f"/jobs/{job_id}/previews").json() == {"previews": []}
    keys = JobKeys(gateway.tenant, job_id)
    for n, what in ((1, "inpainter"), (0, "shapes"), (0, "inpainter")):
        gateway.store.put(keys.preview(n, what), png(n))
    previews = gateway.http.get(f"/jobs/{job_id}/previews").json()["previews"]
    assert [preview["name"] for preview in previews] == ["000000.inpainter", "000000.shapes", "000001.inpainter"]
    assert gateway.http.get(previews[2]["uri"]).content == png(1)
    assert gateway.http.get(f"/jobs/{job_id}/previews/000009.inpainter").status_code == 404
    assert gateway.http.get(f"/jobs/{job_id}/previews/9").status_code == 422


def test_an_upload_becomes_a_dataset_once(gateway: Gateway) -> None:
    first, second = (gateway.http.post("/datasets", content=archive(), headers=ZIP) for _ in range(2))
    assert first.status_code == 201
    assert first.json() == second.json()
    assert (first.json()["pairs"], first.json()["backgrounds"]) == (3, 0)
    stored = gateway.http.get(first.headers["location"]).json()
    assert [case["role"] for case in stored["cases"]] == ["pair"] * 3
    assert first.json() in gateway.http.get("/datasets").json()["datasets"]


def test_validate_keeps_nothing_and_names_every_fault(gateway: Gateway) -> None:
    good = gateway.http.post("/datasets/validate", content=archive(4), headers=ZIP).json()
    assert (good["valid"], good["pairs"], good["errors"]) == (True, 4, [])
    assert gateway.http.get(f"/datasets/{good['dataset_id']}").status_code == 404
    bad = gateway.http.post("/datasets/validate", content=archive(3, mask_size=(30, 20)), headers=ZIP).json()
    assert (bad["valid"], bad["dataset_id"]) == (False, None)
    assert [fault["pointer"] for fault in bad["errors"]] == [f"masks/{n}.png" for n in range(3)]


def test_an_upload_with_faults_is_refused_with_all_of_them(gateway: Gateway) -> None:
    response = gateway.http.post("/datasets", content=archive(3, mask_size=(30, 20)), headers=ZIP)
    assert (response.status_code, response.json()["type"]) == (422, "urn:meddiff:problem:invalid-dataset")
    assert [fault["pointer"] for fault in response.json()["errors"]] == [f"masks/{n}.png" for n in range(3)]


def test_bytes_that_are_no_archive_are_not_valid(gateway: Gateway) -> None:
    report = gateway.http.post("/datasets/validate", content=b"not a zip", headers=ZIP).json()
    assert report["valid"] is False
    assert report["errors"]


def test_datasets_are_judged_and_imported_by_uri(gateway: Gateway) -> None:
    path = gateway.file_root / "pairs.zip"
    path.write_bytes(archive(5))
    body = {"dataset_uri": path.as_uri()}
    report = gateway.http.post("/datasets/validate", json=body).json()
    assert (report["valid"], report["pairs"]) == (True, 5)
    dataset_id = gateway.http.post("/datasets", json=body).json()["id"]
    assert dataset_id == report["dataset_id"]
    held = gateway.http.post("/datasets/validate", json={"dataset_uri": dataset_id}).json()
    assert (held["valid"], held["dataset_id"]) == (True, dataset_id)
    assert gateway.http.post("/datasets/validate", json={"dataset_uri": "file:///etc"}).status_code == 403
    response = gateway.http.post("/datasets/validate", json={})
    assert response.json()["errors"][0]["pointer"] == "/dataset_uri"
    untyped = gateway.http.post("/datasets", content=archive(), headers={"Content-Type": "text/plain"})
    assert untyped.json()["errors"][0]["pointer"] == "?Content-Type"


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_above_its_bound_is_too_large(gateway: Gateway, declared: bool) -> None:
    zipped = b"0" * (gateway.settings.max_upload_bytes + 1)
    large = b" " * (2**20 + 1)
    for path, body, headers in (("/datasets", zipped, ZIP), ("/finetune", large, {}), ("/finetune", large, ZIP)):
        content = body if declared else (body[n : n + 2**16] for n in range(0, len(body), 2**16))
        response = gateway.http.post(path, content=content, headers={"Content-Type": "application/json", **headers})
        assert (response.status_code, response.json()["type"]) == (413, "urn:meddiff:problem:too-large")


def test_models_are_listed_newest_first_and_found_by_name(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    older = put_model(gateway.store, gateway.tenant, dataset)
    newer = put_model(gateway.store, gateway.tenant, dataset, "newest-skin")
    listed = [card["id"] for card in gateway.http.get("/models").json()["models"]]
    assert listed.index(newer.id) < listed.index(older.id)
    assert gateway.http.get("/models/newest-skin").json()["id"] == newer.id
    assert gateway.http.get(f"/models/{older.id}").json()["id"] == older.id
    for absent in ("nobody", f"md_{'0' * 32}", "..", "a%2Fb"):
        assert gateway.http.get(f"/models/{absent}").status_code == 404


def test_recipes_come_with_every_value(gateway: Gateway) -> None:
    served = gateway.http.get("/recipes").json()
    assert served == {name: recipe.model_dump(mode="json") for name, recipe in RECIPES.items()}
