"""The object store: what it promises, and nothing of how S3 is spoken beyond this file."""

from __future__ import annotations

import copy
import io
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any, TypeVar
from uuid import uuid4

import structlog
import urllib3
from minio import Minio
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, S3Error, ServerError
from pydantic import BaseModel

from meddiff.contracts.base import canonical_json
from meddiff.metrics import STORE_CALLS
from meddiff.settings import Settings
from meddiff.store.retry import RetryPolicy

log = structlog.get_logger()
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_PAGE = 1000
_PART_BYTES = 64 * 2**20  # Few requests for a large file: of each that fails the file is sent again.
_SIGNED_FOR = timedelta(hours=1)  # By this machine's clock, which may be slow.
_MISSING = frozenset({"NoSuchKey", "NoSuchObject"})
_CLIENT_ERRORS = (S3Error, ServerError, InvalidResponseError, urllib3.exceptions.HTTPError)
_BUSY = frozenset({429, 500, 502, 503, 504})
_TRANSIENT = frozenset({"InternalError", "ServiceUnavailable", "SlowDown", "SlowDownWrite", "RequestTimeout"})


class NotFound(Exception):
    """There is no object of that key."""


class StoreError(Exception):
    """What was asked of the store was not done."""


class StoreUnavailable(StoreError):
    """The store did not answer within the deadline: later it may."""


class StoreRefused(StoreError):
    """The store answered that it will not: wrong credentials, no such bucket, no room."""


class ObjectStore:
    """One bucket. Every call is retried under one policy; none is hidden in the client below it.

    Every method raises ``StoreUnavailable`` where the store cannot be reached within the policy's deadline and
    ``StoreRefused`` where it refuses the credentials, lacks the bucket or has no room.
    """

    def __init__(self, settings: Settings, retry: RetryPolicy) -> None:
        self.bucket = settings.s3_bucket
        self._retry = retry
        read = max(20.0, 2 * retry.deadline)  # Who gives up early does not wait a minute for a store that hangs.
        self._http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=5, read=read), maxsize=16, retries=False, cert_reqs="CERT_REQUIRED"
        )
        self._client = self._connect(settings, settings.s3_endpoint)
        self._public = self._connect(settings, settings.s3_public_endpoint or settings.s3_endpoint)

    @classmethod
    def from_settings(cls, settings: Settings, retry: RetryPolicy | None = None) -> ObjectStore:
        """The service's own bucket, as the settings name it."""
        return cls(settings, retry or RetryPolicy())

    def of_bucket(self, bucket: str) -> ObjectStore:
        """Another bucket of the same store, with the same credentials; whether it may be read is for the caller."""
        other = copy.copy(self)
        other.bucket = bucket
        return other

    def _connect(self, settings: Settings, endpoint: str) -> Minio:
        scheme, _, host = endpoint.rpartition("://")
        return Minio(
            endpoint=host,
            access_key=settings.s3_access_key.get_secret_value(),
            secret_key=settings.s3_secret_key.get_secret_value(),
            secure=scheme == "https" if scheme else settings.s3_secure,
            region=settings.s3_region,  # Named so that no client asks the store for it.
            http_client=self._http,
        )

    def ping(self) -> None:
        """Returns if the store answers and the bucket is there; tries once, for a probe that asks again by itself."""
        if not self._guard(lambda: self._client.bucket_exists(bucket_name=self.bucket), retry=RetryPolicy(deadline=0)):
            raise StoreRefused(f"the store has no bucket {self.bucket}")

    def ensure_bucket(self) -> None:
        """The bucket exists afterwards, whoever made it."""

        def make() -> None:
            try:
                if not self._client.bucket_exists(bucket_name=self.bucket):
                    self._client.make_bucket(bucket_name=self.bucket)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

        self._guard(make)

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        """``key`` holds ``data`` afterwards, whole: a reader sees the object before or after, never in between."""
        self._guard(
            lambda: self._client.put_object(
                bucket_name=self.bucket,
                object_name=key,
                data=io.BytesIO(data),
                length=len(data),
                content_type=content_type,
            )
        )

    def put_json(self, key: str, value: BaseModel) -> None:
        """``put`` of the canonical JSON of ``value``: equal values are equal bytes."""
        self.put(key, canonical_json(value), "application/json")

    def create(self, key: str, data: bytes, content_type: str = "application/json") -> bool:
        """Conditional create (``If-None-Match: *``, RFC 9110 section 13.1.2): whether this call made the object.

        Of any number of callers exactly one is told ``True``, and its bytes stay. Where an answer was lost on the way
        the stored bytes decide, so callers that compete must not write equal bytes.
        """
        tries = itertools.count()

        def attempt() -> bool:
            again = next(tries) > 0
            url = self._client.get_presigned_url("PUT", self.bucket, key, expires=_SIGNED_FOR)
            headers = {"If-None-Match": "*", "Content-Type": content_type}
            response = self._http.request("PUT", url, body=data, headers=headers)
            if response.status in (409, 412):
                return again and self._read(key) == data
            if response.status != 200:
                raise ServerError(f"conditional create answered {response.status}", response.status)
            return True

        return self._guard(attempt)

    def create_json(self, key: str, value: BaseModel) -> bool:
        """``create`` of the canonical JSON of ``value``."""
        return self.create(key, canonical_json(value))

    def get(self, key: str) -> bytes:
        """The whole object. Raises ``NotFound``."""
        return self._guard(lambda: self._read(key), key)

    def get_json(self, key: str, model: type[M]) -> M:
        """The object as a ``model``. Raises ``NotFound``, and ``ValidationError`` for another schema."""
        return model.model_validate_json(self.get(key))

    def exists(self, key: str) -> bool:
        """Whether there is an object of that key."""
        try:
            self._stat(key)
        except NotFound:
            return False
        return True

    def modified(self, key: str) -> datetime:
        """When the object was last written, in UTC. Raises ``NotFound``."""
        written = self._stat(key).last_modified
        assert isinstance(written, datetime)
        return written

    def size(self, key: str) -> int:
        """The object's size in bytes. Raises ``NotFound``."""
        return int(self._stat(key).size)

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[str]:
        """Keys under ``prefix`` at any depth, those after ``start_after`` only. Keys that are siblings of one fixed
        width come in ascending order; nothing is promised of the order across folders."""
        page = self._page(prefix, start_after)
        yield from page
        while len(page) == _PAGE:
            page = self._page(prefix, page[-1])
            yield from page

    def children(self, prefix: str) -> tuple[str, ...]:
        """Names directly under ``prefix`` (which ends in ``/``), objects and folders alike, ascending."""

        def attempt() -> tuple[str, ...]:
            found = self._client.list_objects(bucket_name=self.bucket, prefix=prefix)
            return tuple(sorted({str(o.object_name)[len(prefix) :].rstrip("/") for o in found} - {""}))

        return self._guard(attempt)

    def delete(self, keys: Iterable[str]) -> None:
        """None of ``keys`` exists afterwards; one that never did is no fault."""
        for batch in _batches(keys):

            def attempt(batch: tuple[str, ...] = batch) -> None:
                doomed = [DeleteObject(key) for key in batch]
                for error in self._client.remove_objects(bucket_name=self.bucket, delete_object_list=doomed):
                    if error.code not in _MISSING:
                        raise ServerError(f"not deleted: {error.code}", 500)

            self._guard(attempt)

    def delete_prefix(self, prefix: str) -> None:
        """Nothing that was under ``prefix`` at the call exists afterwards; parts of uploads: see ``abort_uploads``."""
        self.delete(tuple(self.list(prefix)))
        self.abort_uploads(prefix)

    def abort_uploads(self, prefix: str, begun_before: datetime | None = None) -> None:
        """Forgets the parts of uploads under ``prefix`` that are not complete, begun before a moment or at any: those
        of a process that was killed. A store that does not let go of them holds nothing else up: that is logged. (MinIO
        lists none by a prefix and forgets them itself after a day.)"""

        def attempt() -> None:
            for upload in self._client._list_multipart_uploads(self.bucket, prefix=prefix).uploads:
                begun = upload.initiated_time
                if begun_before is None or (begun is not None and begun < begun_before):
                    assert upload.object_name is not None
                    assert upload.upload_id is not None
                    self._abort(upload.object_name, upload.upload_id)

        try:
            self._guard(attempt, retry=RetryPolicy(deadline=0))
        except StoreError as error:
            log.warning("parts of uploads left", error=str(error))

    def _abort(self, key: str, upload_id: str) -> None:
        try:
            self._client._abort_multipart_upload(self.bucket, key, upload_id)
        except S3Error as error:
            if error.code != "NoSuchUpload":  # Complete or gone meanwhile.
                raise

    def presigned_get(self, key: str, expires: timedelta = timedelta(hours=1)) -> str:
        """A link that reads the object for a while (at most 7 days), at the public endpoint. Nothing is asked of the
        store: the link of a missing object answers 404."""
        return str(self._public.presigned_get_object(bucket_name=self.bucket, object_name=key, expires=expires))

    def upload_file(self, key: str, path: Path, content_type: str = "application/octet-stream") -> None:
        """``put`` of a file of any size, in parts, without holding it in memory."""
        self._guard(
            lambda: self._client.fput_object(
                bucket_name=self.bucket,
                object_name=key,
                file_path=str(path),
                content_type=content_type,
                part_size=_PART_BYTES,
            )
        )

    def download_file(self, key: str, path: Path) -> None:
        """The object as the file ``path``, which appears whole or not at all, whoever else downloads it.

        Raises ``NotFound``.
        """
        partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
        try:
            self._guard(
                lambda: self._client.fget_object(bucket_name=self.bucket, object_name=key, file_path=str(partial)), key
            )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def download(self, key: str, file: IO[bytes]) -> None:
        """Writes the object, and nothing else, to ``file``. Raises ``NotFound``."""

        def copy_whole() -> None:
            response = self._client.get_object(bucket_name=self.bucket, object_name=key)
            try:
                file.seek(0)
                file.truncate()
                shutil.copyfileobj(response, file, 2**20)
                file.flush()
            finally:
                response.close()
                response.release_conn()

        self._guard(copy_whole, key)

    def _stat(self, key: str) -> Any:
        return self._guard(lambda: self._client.stat_object(bucket_name=self.bucket, object_name=key), key)

    def _read(self, key: str) -> bytes:
        response = self._client.get_object(bucket_name=self.bucket, object_name=key)
        try:
            return bytes(response.read())
        finally:
            response.close()
            response.release_conn()

    def _page(self, prefix: str, start_after: str | None) -> tuple[str, ...]:
        def attempt() -> tuple[str, ...]:
            found = self._client.list_objects(
                bucket_name=self.bucket, prefix=prefix, recursive=True, start_after=start_after
            )
            return tuple(str(o.object_name) for o in itertools.islice(found, _PAGE))

        return self._guard(attempt)

    def _guard(self, attempt: Callable[[], T], key: str | None = None, retry: RetryPolicy | None = None) -> T:
        """``attempt`` under the retry policy, its errors in this module's terms."""

        def counted() -> T:
            try:
                result = attempt()
            except _CLIENT_ERRORS as error:
                missing = isinstance(error, S3Error) and error.code in _MISSING
                STORE_CALLS.labels("done" if missing else "unavailable" if _is_transient(error) else "refused").inc()
                raise
            STORE_CALLS.labels("done").inc()
            return result

        try:
            return (retry or self._retry)(counted, _is_transient)
        except _CLIENT_ERRORS as error:
            code = error.code if isinstance(error, S3Error) else type(error).__name__
            if key is not None and code in _MISSING:
                raise NotFound(key) from None
            if _is_transient(error):
                raise StoreUnavailable(f"the store cannot be reached: {code}") from error
            raise StoreRefused(f"the store answered {code}") from error


def _is_transient(error: Exception) -> bool:
    if isinstance(error, S3Error):
        return error.code in _TRANSIENT or error.response.status in _BUSY
    if isinstance(error, ServerError):
        return bool(error.status_code == 429 or error.status_code >= 500)
    if isinstance(error, InvalidResponseError):
        return bool(error._code == 429 or error._code >= 500)
    return isinstance(error, urllib3.exceptions.HTTPError)


def _batches(keys: Iterable[str]) -> Iterator[tuple[str, ...]]:
    rest = iter(keys)
    while batch := tuple(itertools.islice(rest, _PAGE)):
        yield batch
