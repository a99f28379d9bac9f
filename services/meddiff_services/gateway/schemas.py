"""``/schemas``: JSON Schema of what the service writes.

``python -m meddiff_services.gateway.schemas docs`` writes it to files, and the table of all settings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from meddiff.contracts.evaluation import Report
from meddiff.contracts.manifest import Manifest
from meddiff.settings import Settings
from pydantic import SecretStr

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


def settings_table() -> str:
    """Every setting as a line of a table in Markdown."""
    lines = [
        "# Settings",
        "",
        "Of every service, from the environment, or from a file of that name in lower case in `/run/secrets`, where",
        "secrets belong. Lists and maps are JSON.",
        "",
        "| variable | default | what |",
        "|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        default = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
        shown = f"`{default}`" if default not in ("", None, (), {}) else ""
        lines.append(f"| `MEDDIFF_{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(lines) + "\n"


def write(folder: Path) -> None:
    """``manifest.schema.json``, ``report.schema.json`` and ``settings.md`` in ``folder``."""
    (folder / "settings.md").write_text(settings_table())
    (folder / "report.schema.json").write_text(json.dumps(report_schema(), indent=2) + "\n")
    (folder / "manifest.schema.json").write_text(json.dumps(manifest_schema(), indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
