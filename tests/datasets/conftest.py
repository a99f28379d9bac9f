"""Settings under which datasets may be read, and a bucket beside the service's own that is a named source."""

from pathlib import Path

import pytest
from dataset_files import DATA, TENANT
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """``file://`` may read the shared data and this test's folder, ``s3://`` two buckets, of which one is absent."""
    return settings.model_copy(
        update={
            "file_roots": {TENANT: (DATA, tmp_path)},
            "s3_sources": {TENANT: ("hospital", "absent", "shared/radiology")},
        }
    )


@pytest.fixture
def hospital(store: ObjectStore) -> ObjectStore:
    """The bucket that is a named source."""
    bucket = store.of_bucket("hospital")
    bucket.ensure_bucket()
    return bucket
