"""What ``deploy/smoke.sh`` asks of the running stack, through its published ports alone.

smoke.py ready|work|check|rolling|watched --state FILE --address URL --key KEY --prometheus URL
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from meddiff import phantoms
from meddiff.client import Client
from meddiff.contracts.jobs import Job

COUNT = 32
QUICK = {
    "finetuning": {"steps": 8, "segment_steps": 4, "variants": 1, "preview_pairs": 2},
    "mask_generation": {"steps": 16, "segment_steps": 8, "sampling_steps": 4},
    "quality": {"far_quantile": 0.0},
    "work": {"attempts": 8.0},
}
READY_WITHIN = 300.0
NAMES = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}|\d{4}-\d\d-\d\dT[0-9:.]+Z")


def until(ready: Callable[[], bool], what: str) -> None:
    """Returns once ``ready``; ends the script where that takes too long."""
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline:
        try:
            if ready():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    sys.exit(f"{what}: not within {READY_WITHIN:.0f} s")


def answered(prometheus: str, query: str) -> list[dict[str, Any]]:
    """The series that a query gives."""
    found = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}, timeout=10).json()
    if found["status"] != "success":
        sys.exit(f"{query}: {found.get('error')}")
    return list(found["data"]["result"])


def is_ready(address: str, prometheus: str) -> bool:
    """The gateway accepts jobs, and each queue has a worker."""
    query = "count(max by (queue) (meddiff_workers) > 0)"
    with_workers = answered(prometheus, query)
    return httpx.get(f"{address}/readyz").is_success and bool(with_workers) and with_workers[0]["value"][1] == "5"


def ended_well(client: Client, job: Job) -> Job:
    job = client.wait(job.id)
    if job.status != "succeeded":
        sys.exit(f"{job.kind} ended {job.status}: {job.problem}")
    return job


def manifest(client: Client, job_id: str) -> Any:
    """The manifest, each of its pictures fetched and compared with its digest."""
    with tempfile.TemporaryDirectory() as folder:
        return client.pull(job_id, Path(folder)).model_dump(mode="json")


def masked(found: Any) -> str:
    """A manifest without ids and times."""
    return NAMES.sub("", json.dumps(found, sort_keys=True))


def work(client: Client) -> dict[str, Any]:
    """A fine-tune and a generate job, from an upload to the manifest."""
    with tempfile.TemporaryDirectory() as folder:
        phantoms.write(Path(folder), pairs=16, backgrounds=2)
        dataset = client.upload(Path(folder))
    begun = time.monotonic()
    tuned = ended_well(client, client.finetune(dataset.id, name="smoke", override=QUICK))
    between = time.monotonic()
    made = ended_well(client, client.generate("smoke", COUNT, seed=7))
    found = manifest(client, made.id)
    told = f"fine-tune {between - begun:.0f} s, {COUNT} pairs {time.monotonic() - between:.0f} s"
    print(f"{told}; {len(found['pairs'])} pairs, every digest right")
    return {"finetune": tuned.id, "generate": made.id, "manifest": masked(found)}


def check(client: Client, state: dict[str, Any]) -> None:
    """What ``work`` left is there."""
    jobs = [client.job(state[kind]).status for kind in ("finetune", "generate")]
    if jobs != ["succeeded", "succeeded"] or masked(manifest(client, state["generate"])) != state["manifest"]:
        sys.exit(f"after down and up: jobs {jobs}, or another manifest")
    print("jobs, manifest and every pair are still there")


def rolling(client: Client, state: dict[str, Any]) -> None:
    """The same generate job while every service is restarted, which ``smoke.sh`` does beside this."""
    job = client.generate("smoke", COUNT, seed=7)
    print(f"job {job.id}", flush=True)
    ended_well(client, job)
    if masked(manifest(client, job.id)) != state["manifest"]:
        sys.exit("the manifest differs from that of the undisturbed job")
    print("the same manifest as undisturbed")


def watched(prometheus: str) -> None:
    """Every metric that an alert asks for has a series, and every query of the dashboard gives data."""
    here = Path(__file__).parent
    rules = (here / "prometheus/alerts.yml").read_text()
    board = json.loads((here / "grafana/dashboards/meddiff.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    names = sorted(set(re.findall(r"\bmeddiff_\w+", rules)))
    if empty := [query for query in (*names, *queries) if not answered(prometheus, query)]:
        sys.exit(f"no data for {empty}")
    loaded = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    rules_of = [rule for group in loaded for rule in group["rules"]]
    firing = [rule["name"] for rule in rules_of if rule["state"] == "firing"]
    told = f"{len(names)} metrics of {len(rules_of)} alerts have series, all {len(queries)} queries give data"
    print(f"{told}; firing: {firing or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=["ready", "work", "check", "rolling", "watched"])
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--key", default="")
    parser.add_argument("--prometheus", default="")
    asked = parser.parse_args()
    if asked.step == "watched":
        return watched(asked.prometheus)
    if asked.prometheus:
        until(lambda: is_ready(asked.address, asked.prometheus), "the gateway and a worker of each queue")
    with Client(asked.address, key=asked.key) as client:
        if asked.step == "work":
            asked.state.write_text(json.dumps(work(client)))
        elif asked.step != "ready":
            {"check": check, "rolling": rolling}[asked.step](client, json.loads(asked.state.read_text()))
    return None


if __name__ == "__main__":
    main()
