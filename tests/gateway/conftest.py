from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gateways import Gateway, started
from meddiff.settings import Settings

MAX_UPLOAD_BYTES = 3 * 2**20


@pytest.fixture(scope="module")
def gateway(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for a module's tests, on the session's store and Redis."""
    folder: Path = tmp_path_factory.mktemp("gateway")
    root = folder / "allowed"
    root.mkdir()
    changes = {"file_roots": (root,), "max_upload_bytes": MAX_UPLOAD_BYTES, "sweep_seconds": 0.3}
    with started(settings.model_copy(update=changes), folder) as running:
        yield running
