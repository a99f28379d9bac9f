"""Every overlay as ``kubectl kustomize`` builds it, against the schemas of Kubernetes (strictly) and of k8s/schemas.

python k8s/validate.py            needs kubectl, 1.27 or newer
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

HERE = Path(__file__).parent
VERSION = "1.35"
OVERLAYS = ("cpu", "gpu", "podman")
CUSTOM = {schema["title"]: schema for schema in map(json.loads, (p.read_text() for p in HERE.glob("schemas/*.json")))}


def faults(resource: dict[str, Any]) -> list[str]:
    """What is wrong with a resource, by its schema."""
    if resource["kind"] in CUSTOM:
        return [error.message for error in Draft202012Validator(CUSTOM[resource["kind"]]).iter_errors(resource)]
    try:
        kubernetes_validate.validate(resource, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error.message)]
    return []


def main() -> int:
    """1 where any resource of any overlay is not valid."""
    wrong = 0
    for overlay in OVERLAYS:
        built = subprocess.run(
            ["kubectl", "kustomize", HERE / overlay], check=True, capture_output=True, text=True
        ).stdout
        resources = [resource for resource in yaml.safe_load_all(built) if resource]
        found = {f"{one['kind']}/{one['metadata']['name']}": faults(one) for one in resources}
        for name, told in found.items():
            for fault in told:
                print(f"{overlay}: {name}: {fault}")
                wrong += 1
        print(f"{overlay}: {len(resources)} resources, {sum(map(bool, found.values()))} not valid")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
