"""A real S3 server, and a store with a bucket of the service beside one that is a named source."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from meddiff.embedded.servers import start_s3
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore
from pydantic import SecretStr

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def s3_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    server = start_s3(tmp_path_factory.mktemp("s3"))
    try:
        yield Settings(
            s3_endpoint=server.endpoint,
            s3_access_key=SecretStr(server.access_key),
            s3_secret_key=SecretStr(server.secret_key),
            s3_sources=("hospital", "absent"),
            file_roots=(DATA,),
        )
    finally:
        server.stop()


@pytest.fixture(scope="session")
def store(s3_settings: Settings) -> ObjectStore:
    own = ObjectStore.from_settings(s3_settings)
    own.ensure_bucket()
    own.of_bucket("hospital").ensure_bucket()
    return own


@pytest.fixture
def settings(s3_settings: Settings, tmp_path: Path) -> Settings:
    """Settings under which ``file://`` may read the shared data and this test's folder."""
    return s3_settings.model_copy(update={"file_roots": (DATA, tmp_path)})
