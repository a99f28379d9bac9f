"""``/schemas``: JSON Schema of what the service writes.

``python -m meddiff_services.gateway.schemas docs`` writes it to files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from meddiff.contracts.evaluation import Report
from meddiff.contracts.manifest import Manifest

router = APIRouter(tags=["schemas"])


def manifest_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a manifest as it is served."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Manifest.model_json_schema(mode="serialization")


def report_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of an evaluation's report as it is served."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Report.model_json_schema(mode="serialization")


@router.get("/schemas/report.json")
def get_report_schema() -> dict[str, Any]:
    """JSON Schema of the report."""
    return report_schema()


@router.get("/schemas/manifest.json")
def get_manifest_schema() -> dict[str, Any]:
    """JSON Schema of the manifest."""
    return manifest_schema()


def write(folder: Path) -> None:
    """``manifest.schema.json`` and ``report.schema.json`` in ``folder``."""
    (folder / "report.schema.json").write_text(json.dumps(report_schema(), indent=2) + "\n")
    (folder / "manifest.schema.json").write_text(json.dumps(manifest_schema(), indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
