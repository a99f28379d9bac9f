"""A real S3 server and a real Redis-protocol server, once for all tests; each test finds both empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import redis
from meddiff.embedded.servers import RedisServer, S3Server, start_redis, start_s3
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore
from minio import Minio
from pydantic import SecretStr


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server."""
    server = start_s3(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A running Redis-protocol server."""
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of an empty Redis."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def settings(s3: S3Server, redis_url: str, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a service with an empty bucket, an empty Redis and a scratch folder of its own.

    The bucket ends with the test, for SeaweedFS sets volumes aside for each and a disk has room for so many.
    """
    settings = Settings(
        redis_url=redis_url,
        s3_endpoint=s3.endpoint,
        s3_access_key=SecretStr(s3.access_key),
        s3_secret_key=SecretStr(s3.secret_key),
        s3_bucket=f"test-{uuid4().hex}",
        scratch=tmp_path / "scratch",
    )
    yield settings
    client = Minio(endpoint=s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key, secure=False)
    if client.bucket_exists(bucket_name=settings.s3_bucket):
        client.remove_bucket(bucket_name=settings.s3_bucket)


@pytest.fixture
def store(settings: Settings) -> ObjectStore:
    """The empty bucket of ``settings``."""
    store = ObjectStore.from_settings(settings)
    store.ensure_bucket()
    return store
