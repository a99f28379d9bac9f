"""The Python client: the service's HTTP API, typed by its contracts."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from meddiff.contracts.base import sha256_hex
from meddiff.contracts.dataset import Dataset, DatasetList, DatasetSummary, ValidationReport
from meddiff.contracts.evaluation import Report
from meddiff.contracts.jobs import ENDED, Job, JobList, Kind, Preview, PreviewList, Status
from meddiff.contracts.manifest import Manifest
from meddiff.contracts.models import ModelCard, ModelList
from meddiff.contracts.problems import Problem
from meddiff.contracts.recipes import Recipe
from meddiff.contracts.requests import DEFAULT_RECIPE, EvaluateRequest

DELIVERED = ("image", "label", "shape", "guide")
"""The pictures of a pair that ``pull`` fetches."""

M = TypeVar("M", bound=BaseModel)

_IMPORTING = httpx.Timeout(60.0, read=3600.0)
"""While a dataset is imported nothing comes; for ever is no answer either."""
_TRIES = 4
_AWAY = frozenset({502, 503, 504})
_NO_PROXY = {f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")}
"""What goes to this machine is no proxy's to see, whatever the environment names."""
_WAIT_SECONDS = 5
_OUTAGE_SECONDS = 120.0
_DOWNLOADS_AT_ONCE = 4


class ServiceError(Exception):
    """The service answered with a problem (RFC 9457); its faults are in ``problem.errors``."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class Client:
    """A connection to one service, e.g. ``Client("http://127.0.0.1:8080")``; usable as a context manager. ``key``: the
    API key, else that of the environment's ``MEDDIFF_API_KEY``; a service on loopback may need none.

    Every method raises ``ServiceError`` where the service answers with a problem and ``httpx.TransportError`` where it
    does not answer at all. Calls are repeated a few times while the service is unreachable or answers 503, or a
    proxy 502 or 504 for it; a ``POST`` carries an ``Idempotency-Key``, so a repeated one starts nothing twice.
    """

    def __init__(self, base_url: str, *, key: str | None = None, timeout: float = 60.0) -> None:
        self.base_url = base_url
        token = (key or os.environ.get("MEDDIFF_API_KEY", "")).strip()  # A file of it may end with a line break.
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=base_url, headers=headers, timeout=timeout, follow_redirects=True, mounts=_NO_PROXY
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # ------------------------------------------------------------------------------------------------------- jobs

    def finetune(
        self,
        dataset_uri: str,
        *,
        name: str | None = None,
        recipe: str = DEFAULT_RECIPE.name,
        override: dict[str, Any] | None = None,
        max_pairs: int | None = None,
        split_seed: int = 0,
        metadata: dict[str, str] | None = None,
    ) -> Job:
        """``POST /finetune``: a model from a dataset's URI or id; ``override`` changes values of the named recipe, e.g.
        ``{"finetuning": {"steps": 500}}``. Returns the accepted job."""
        body = {
            "dataset_uri": dataset_uri,
            "name": name,
            "recipe": {"name": recipe, "override": override or {}},
            "max_pairs": max_pairs,
            "split_seed": split_seed,
            "metadata": metadata or {},
        }
        return _parsed(Job, self._post("/finetune", json=body))

    def generate(
        self,
        model: str,
        count: int,
        *,
        seed: int = 0,
        start_index: int = 0,
        masks: str | None = None,
        backgrounds: str | None = None,
        override: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Job:
        """``POST /generate``: ``count`` accepted pairs of a model's id or name; ``override`` changes values of the
        model's recipe. Returns the accepted job."""
        body = {
            "model": model,
            "count": count,
            "seed": seed,
            "start_index": start_index,
            "masks": masks,
            "backgrounds": backgrounds,
            "recipe": override or {},
            "metadata": metadata or {},
        }
        return _parsed(Job, self._post("/generate", json=body))

    def evaluate(self, dataset_uri: str, **choices: Any) -> Job:
        """``POST /evaluate``: what synthetic pairs are worth. ``choices`` are the fields of ``EvaluateRequest``, e.g.
        ``folds=5`` or ``synthetic_job=job.id``. Returns the accepted job."""
        request = EvaluateRequest(dataset_uri=dataset_uri, **choices)
        return _parsed(Job, self._post("/evaluate", json=request.model_dump(mode="json")))

    def report(self, job_id: str) -> Report:
        """``GET /jobs/{id}/report``."""
        return _parsed(Report, self._get(f"{_job(job_id)}/report").content)

    def report_page(self, job_id: str) -> bytes:
        """``GET /jobs/{id}/report?format=html``: one page that needs nothing beside it."""
        return self._get(f"{_job(job_id)}/report", params={"format": "html"}).content

    def job(self, job_id: str) -> Job:
        """``GET /jobs/{id}``."""
        return _parsed(Job, self._get(_job(job_id)).content)

    def jobs(
        self, *, kind: Kind | None = None, status: Status | None = None, metadata: dict[str, str] | None = None
    ) -> Iterator[Job]:
        """``GET /jobs``, newest first, only those with all of ``metadata``; pages are fetched as they are needed."""
        query: dict[str, Any] = {
            name: value for name, value in (("kind", kind), ("status", status)) if value is not None
        }
        query["metadata"] = [f"{name}:{value}" for name, value in (metadata or {}).items()]
        for content in self._pages("/jobs", query):
            yield from _parsed(JobList, content).jobs

    def wait(self, job_id: str, on_update: Callable[[Job], None] | None = None) -> Job:
        """Until the job has ended, whichever way; ``on_update`` gets it now, after every change and every few
        seconds. A service that is away for less than two minutes is waited for."""
        response = self._get_patiently(_job(job_id))
        while True:
            if response.status_code != httpx.codes.NOT_MODIFIED:
                job = _parsed(Job, response.content)
            if on_update is not None:
                on_update(job)
            if job.status in ENDED:
                return job
            known = {"If-None-Match": response.headers["ETag"]}
            response = self._get_patiently(_job(job_id), params={"wait": _WAIT_SECONDS}, headers=known)

    def cancel(self, job_id: str) -> Job:
        """``POST /jobs/{id}/cancel``. Returns the job, usually ``cancelling``."""
        return _parsed(Job, self._post(f"{_job(job_id)}/cancel"))

    def manifest(self, job_id: str) -> Manifest:
        """``GET /jobs/{id}/manifest``."""
        return _parsed(Manifest, self._get(f"{_job(job_id)}/manifest").content)

    def previews(self, job_id: str) -> tuple[Preview, ...]:
        """``GET /jobs/{id}/previews``: those drawn so far."""
        return _parsed(PreviewList, self._get(f"{_job(job_id)}/previews").content).previews

    def preview(self, job_id: str, name: str) -> bytes:
        """``GET /jobs/{id}/previews/{name}``: a PNG."""
        return self._get(f"{_job(job_id)}/previews/{quote(name, safe='')}").content

    def pull(self, job_id: str, folder: Path, on_progress: Callable[[int, int], None] | None = None) -> Manifest:
        """Fetches a job's manifest, contact sheet and pairs: ``manifest.json``, ``contact_sheet.png`` and
        ``pairs/{index}.{image,label,shape,guide}.png``.

        Every picture's SHA-256 is checked against the manifest; files that are there already and right are kept, so an
        interrupted pull goes on where it was. ``on_progress`` gets pictures done and in all. Raises ``ValueError``
        where a picture's digest is not the manifest's.
        """
        raw = self._get(f"{_job(job_id)}/manifest").content
        manifest = _parsed(Manifest, raw)
        wanted = [(pair.index, what, getattr(pair, what).sha256) for pair in manifest.pairs for what in DELIVERED]
        (folder / "pairs").mkdir(parents=True, exist_ok=True)

        def fetch(picture: tuple[int, str, str]) -> None:
            index, what, digest = picture
            path = folder / "pairs" / f"{index:08d}.{what}.png"
            if path.exists() and sha256_hex(path.read_bytes()) == digest:
                return
            content = self._get(f"{_job(job_id)}/pairs/{index}/{what}").content
            if sha256_hex(content) != digest:
                raise ValueError(f"pair {index}: the {what}'s SHA-256 is not the manifest's")
            _write(path, content)

        with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as threads:
            for done, _ in enumerate(threads.map(fetch, wanted), start=1):
                if on_progress is not None:
                    on_progress(done, len(wanted))
        _write(folder / "contact_sheet.png", self._get(f"{_job(job_id)}/contact_sheet").content)
        _write(folder / "manifest.json", raw)
        return manifest

    # --------------------------------------------------------------------------------------- datasets and models

    def upload(self, source: Path) -> DatasetSummary:
        """``POST /datasets``: imports a folder or a zip archive of this machine."""
        return _parsed(DatasetSummary, self._post_dataset("/datasets", source))

    def validate(self, source: str | Path) -> ValidationReport:
        """``POST /datasets/validate``: every fault of a dataset URI, or of a folder or zip archive of this machine."""
        return _parsed(ValidationReport, self._post_dataset("/datasets/validate", source))

    def datasets(self) -> tuple[DatasetSummary, ...]:
        """``GET /datasets``: every one."""
        pages = (_parsed(DatasetList, content) for content in self._pages("/datasets", {}))
        return tuple(dataset for page in pages for dataset in page.datasets)

    def dataset(self, dataset_id: str) -> Dataset:
        """``GET /datasets/{id}``: with every case."""
        return _parsed(Dataset, self._get(f"/datasets/{quote(dataset_id, safe='')}").content)

    def delete_dataset(self, dataset_id: str, *, derived: bool = False) -> None:
        """``DELETE /datasets/{id}``; with ``derived`` the models and pairs made from it go too."""
        self._send("DELETE", f"/datasets/{quote(dataset_id, safe='')}", params={"derived": derived})

    def models(self) -> tuple[ModelCard, ...]:
        """``GET /models``: every one, newest first."""
        pages = (_parsed(ModelList, content) for content in self._pages("/models", {}))
        return tuple(model for page in pages for model in page.models)

    def model(self, model: str) -> ModelCard:
        """``GET /models/{id}``; a name will do as well."""
        return _parsed(ModelCard, self._get(f"/models/{quote(model, safe='')}").content)

    def delete_model(self, model: str, *, derived: bool = False) -> None:
        """``DELETE /models/{id}``, a name will do as well; with ``derived`` the pairs made with it go too."""
        self._send("DELETE", f"/models/{quote(model, safe='')}", params={"derived": derived})

    def recipes(self) -> dict[str, Recipe]:
        """``GET /recipes``: the named recipes with every value."""
        return {name: Recipe.model_validate(value) for name, value in self._get("/recipes").json().items()}

    # ------------------------------------------------------------------------------------------------------- HTTP

    def _get(self, path: str, **options: Any) -> httpx.Response:
        return self._send("GET", path, **options)

    def _pages(self, path: str, query: dict[str, Any]) -> Iterator[bytes]:
        """The pages of a list, each fetched when it is needed."""
        cursor: str | None = None
        while True:
            response = self._get(path, params={**query, **({"cursor": cursor} if cursor else {})})
            yield response.content
            cursor = response.json()["next"]
            if cursor is None:
                return

    def _get_patiently(self, path: str, **options: Any) -> httpx.Response:
        until = time.monotonic() + _OUTAGE_SECONDS
        while True:
            try:
                return self._get(path, **options)
            except (httpx.TransportError, ServiceError) as error:
                refused = isinstance(error, ServiceError) and error.problem.status not in _AWAY
                if refused or time.monotonic() > until:
                    raise

    def _post(self, path: str, **options: Any) -> bytes:
        return self._send("POST", path, headers={"Idempotency-Key": str(uuid.uuid4())}, **options).content

    def _post_dataset(self, path: str, source: str | Path) -> bytes:
        if isinstance(source, str):
            return self._send("POST", path, json={"dataset_uri": source}, timeout=_IMPORTING).content
        with _archive(source) as archive:
            headers = {"Content-Type": "application/zip", "Content-Length": str(archive.stat().st_size)}
            return self._send("POST", path, headers=headers, upload=archive, timeout=_IMPORTING).content

    def _send(self, method: str, path: str, *, upload: Path | None = None, **options: Any) -> httpx.Response:
        away = _AWAY - {504} if upload else _AWAY  # After a 504 the service may still be at work on it.
        for again in reversed(range(_TRIES)):
            try:
                with upload.open("rb") if upload else nullcontext() as content:
                    response = self._http.request(method, path, content=content, **options)
                if response.status_code not in away or not again:
                    break
            except httpx.TransportError:
                if not again:
                    raise
            time.sleep(0.5 * 2 ** (_TRIES - 1 - again))
        repeated = again < _TRIES - 1
        gone = method == "DELETE" and repeated and response.status_code == httpx.codes.NOT_FOUND
        if response.is_success or response.status_code == httpx.codes.NOT_MODIFIED or gone:
            return response
        raise ServiceError(_problem(response))


def _parsed(model: type[M], content: bytes) -> M:
    """The answer as a ``model``; fields that a newer service adds are passed over."""
    return model.model_validate_json(content, extra="ignore")


def _job(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def _problem(response: httpx.Response) -> Problem:
    """The problem in the answer; of an answer that is none (a proxy's, say) one made from its status."""
    try:
        return _parsed(Problem, response.content)
    except ValueError:
        phrase = response.reason_phrase
        return Problem(
            type="about:blank", title=phrase, status=response.status_code, detail=f"{phrase} without a problem"
        )


def _archive(source: Path) -> AbstractContextManager[Path]:
    return _zipped(source) if source.is_dir() else nullcontext(source)


@contextmanager
def _zipped(folder: Path) -> Iterator[Path]:
    """A temporary zip archive of a folder; pictures are compressed already, so they are stored as they are."""
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "dataset.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED, strict_timestamps=False) as target:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    target.write(path, path.relative_to(folder))
        yield archive


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)
