"""What is deployed agrees with the code and the documentation."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from meddiff import metrics
from meddiff.contracts.tasks import Queue
from meddiff.planning.leases import Leases
from meddiff.settings import Settings
from meddiff_services.gateway.metrics import Metrics
from prometheus_client import REGISTRY

ROOT = Path(__file__).parents[2]
RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
GPU = {"meddiff_gpu_memory_bytes", "meddiff_gpu_utilization_ratio"}  # Of a process that sees a GPU.
QUEUES = {"meddiff_redis_up", "meddiff_workers", "meddiff_queue_tasks", "meddiff_queue_tasks_left"} | {
    "meddiff_queue_oldest_job_seconds", "meddiff_jobs_unfinished",
}  # fmt: skip


def queries(dashboard: str) -> list[str]:
    panels = json.loads((ROOT / "deploy/grafana" / dashboard).read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def metrics_in(expressions: Iterable[str]) -> set[str]:
    return set(re.findall(r"\bmeddiff_\w+", " ".join(expressions)))


def known(settings: Settings) -> set[str]:
    """Names of every series that a service may tell."""
    registries = (REGISTRY, Metrics(Leases.connect(settings.redis_url, 60)).registry)
    families = [family for registry in registries for family in registry.collect()]
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    assert metrics.STORE_CALLS in REGISTRY._collector_to_names
    return GPU | QUEUES | {family.name + end for family in families for end in suffixes.get(family.type, ("",))}


def test_alerts_and_dashboards_ask_for_what_there_is(settings: Settings) -> None:
    """Every site has the metrics of the alerts and of the first dashboard; the second is for sites with GPUs."""
    asked = metrics_in([*queries("dashboards/meddiff.json"), *(alert["expr"] for alert in ALERTS)])
    assert asked - (known(settings) - GPU) == set()
    assert metrics_in(queries("gpu/meddiff-gpu.json")) == GPU


def test_every_alert_has_a_test_and_a_line_in_the_runbook() -> None:
    tested = (ROOT / "deploy/prometheus/alerts.test.yml").read_text()
    book = (ROOT / "docs/operations.md").read_text()
    for alert in ALERTS:
        name = alert["alert"]
        assert re.search(rf"- name: {name}\n", tested), name
        assert re.search(rf"^### {name}\n\S", book, re.MULTILINE), name
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"


def test_alerts_are_the_same_in_kubernetes() -> None:
    rule = yaml.safe_load((ROOT / "k8s/monitoring/alerts.yaml").read_text())
    assert rule["spec"]["groups"] == RULES["groups"]


def test_every_queue_is_scaled() -> None:
    scaling = (ROOT / "k8s/keda/scaling.yaml").read_text()
    assert [queue for queue in get_args(Queue) if queue not in scaling] == []


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_every_container_is_hardened(name: str) -> None:
    service: dict[str, Any] = COMPOSE["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] != "0:0" or service["network_mode"] == "none"  # Gives the volumes to their users, and ends.
    assert not [
        key for key, value in (service.get("environment") or {}).items() if "PASSWORD" in key and "FILE" not in key
    ]


def test_settings_in_compose_and_kubernetes_exist() -> None:
    names = {f"MEDDIFF_{name.upper()}" for name in Settings.model_fields}
    text = (ROOT / "k8s/base/settings.env").read_text()
    used = {key for service in COMPOSE["services"].values() for key in service.get("environment") or {}}
    used |= {line.partition("=")[0] for line in text.splitlines()}
    assert {name for name in used if name.startswith("MEDDIFF_")} - names == set()


def test_manifests_are_judged_strictly() -> None:
    """``k8s/validate.py`` finds what is wrong in a resource of Kubernetes and in a custom one."""
    judge = runpy.run_path(str(ROOT / "k8s/validate.py"))["faults"]
    redis, *_ = yaml.safe_load_all((ROOT / "k8s/base/redis.yaml").read_text())
    scaled, *_ = yaml.safe_load_all((ROOT / "k8s/keda/scaling.yaml").read_text())
    assert judge(redis) == judge(scaled) == []
    redis["spec"]["replcas"] = 1
    scaled["spec"]["maxReplicaCount"] = "4"
    assert "replcas" in judge(redis)[0]
    assert "'4'" in judge(scaled)[0]
