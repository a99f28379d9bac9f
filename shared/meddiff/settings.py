"""Every setting, from the environment (``MEDDIFF_…``); or from files of that name, in lower case, in
``/run/secrets``: there a secret belongs. The environment goes first."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveFloat, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

SECRETS = Path("/run/secrets")


class Settings(BaseSettings):
    """One process's settings. Each field is explained once, here."""

    model_config = SettingsConfigDict(
        env_prefix="MEDDIFF_", extra="ignore", env_ignore_empty=True, secrets_dir=SECRETS if SECRETS.is_dir() else None
    )

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis: queues, leases and caches")
    s3_endpoint: str = Field("127.0.0.1:9000", description="host:port of the S3 store as the services reach it")
    s3_public_endpoint: str | None = Field(
        None,
        pattern=r"^(https?://)?[^/]+$",
        description="[http[s]://]host[:port] of the S3 store as clients reach it: then pictures are answered by links "
        "to it; without a scheme with that of MEDDIFF_S3_SECURE",
    )
    s3_secure: bool = Field(False, description="TLS towards the S3 store")
    s3_region: str = Field("us-east-1", min_length=1, description="region that requests to the S3 store are signed for")
    s3_access_key: SecretStr = Field(SecretStr(""), description="access key of the S3 store")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="secret key of the S3 store")
    s3_bucket: str = Field("meddiff", description="the service's own bucket")
    file_roots: dict[str, tuple[Path, ...]] = Field(
        {}, description="by tenant, folders that its file:// dataset URIs may read from"
    )
    s3_sources: dict[str, tuple[str, ...]] = Field(
        {}, description="by tenant, what its s3:// URIs may read from: bucket or bucket/prefix"
    )
    s3_models: tuple[str, ...] = Field((), description="buckets that a recipe's s3:// foundation or encoder may lie in")
    model_root: Path | None = Field(None, description="folder of foundation checkpoints and encoders kept offline")
    scratch: Path = Field(Path("/tmp/meddiff"), description="local disk of a worker: models, latest checkpoints")
    host: str = Field(
        "127.0.0.1",
        description="address the gateway, and a worker's metrics, listen on; a gateway without keys on loopback only",
    )
    port: int = Field(8080, description="port the gateway listens on")
    metrics_port: int | None = Field(None, description="port a worker serves its Prometheus metrics on")
    require_keys: bool = Field(True, description="whether requests need an API key; only on loopback they may not")
    tenant: str = Field("local", description="the tenant of requests that need no key")
    tenant_weights: dict[str, PositiveFloat] = Field(
        {}, description="shares of tenants whose share of the workers is not 1"
    )
    max_active_jobs: int = Field(1000, ge=1, description="jobs that may be unfinished at once, of all tenants")
    max_tenant_jobs: int = Field(200, ge=1, description="jobs that one tenant may have unfinished at once")
    tenant_jobs: dict[str, int] = Field({}, description="the same by tenant, where it is another number")
    sweep_seconds: float = Field(2.0, gt=0, description="how often active jobs are planned again")
    tidy_seconds: float = Field(3600.0, gt=0, description="how often what nothing needs is removed from the store")
    lease_seconds: float = Field(60.0, gt=0, description="how long a dispatched or running task holds its lease")
    fault_pause_seconds: float = Field(
        5.0, gt=0, description="how long a task that failed waits for its second try; four times as long for each more"
    )
    task_seconds: int = Field(10_800, ge=1, description="how long a task may take before its process is ended")
    visibility_timeout: int = Field(
        14_400, ge=1, description="Celery: seconds after which an unacknowledged task returns; above task_seconds"
    )
    redelivery_seconds: int = Field(10, ge=1, description="Celery: how often it looks for such tasks")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    max_upload_bytes: int = Field(2**30, ge=1, description="largest dataset upload")
    max_dataset_bytes: int = Field(
        16 * 2**30,
        ge=1,
        description="of a dataset's pictures as PNG, which lie in a worker's TMPDIR until all are judged",
    )
