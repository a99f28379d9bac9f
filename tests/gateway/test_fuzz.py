"""The gateway against its own OpenAPI: schemathesis invents requests, good ones and bad, and follows links between
operations. ``make fuzz EXAMPLES=500`` does the same for longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gateways import Gateway
from stored import put_dataset, put_generated, put_model

EXAMPLES = int(os.environ.get("EXAMPLES", "8"))
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance",
)  # fmt: skip
ENDLESS = r"/events$"
"""What goes on until a job has ended; its form is tested elsewhere."""


@pytest.mark.slow
@pytest.mark.timeout(600 + 20 * EXAMPLES)
def test_whatever_is_asked_the_answer_is_as_documented(gateway: Gateway, tmp_path: Path) -> None:
    made = put_generated(gateway.store, gateway.tenant)
    dataset = put_dataset(gateway.store, gateway.tenant, level=50)
    put_model(gateway.store, gateway.tenant, dataset, "skin")
    known = {"job_id": made.spec.id, "dataset_id": dataset.id, "model": "skin", "wait": 0, "derived": False}
    config = tmp_path / "schemathesis.toml"
    config.write_text("[parameters]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in known.items()))
    command = [
        Path(sys.executable).parent / "schemathesis", "--config-file", config, "run", f"{gateway.url}/openapi.json",
        "--max-examples", str(EXAMPLES), "--checks", ",".join(CHECKS), "--exclude-path-regex", ENDLESS,
        "--request-timeout", "60", "--seed", "1", "--no-color",
    ]  # fmt: skip
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    print(told.stdout[-3000:])
    assert told.returncode == 0, told.stdout[-6000:]


def _toml(value: str | int | bool) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
