"""A job: what was asked, where it stands, how it ended."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from meddiff.contracts.access import KeyId, TraceId
from meddiff.contracts.base import Contract, DatasetId, JobId, ModelId, Stored, Tenant
from meddiff.contracts.problems import Problem
from meddiff.contracts.recipes import Recipe
from meddiff.contracts.requests import EvaluateRequest, FinetuneRequest, GenerateRequest

Kind = Literal["finetune", "generate", "evaluate"]
Status = Literal["queued", "validating", "running", "cancelling", "succeeded", "incomplete", "failed", "cancelled"]
EndStatus = Literal["succeeded", "incomplete", "failed", "cancelled"]
ENDED: frozenset[str] = frozenset({"succeeded", "incomplete", "failed", "cancelled"})


class FinetuneSpec(Stored):
    """``spec.json`` of a fine-tune: the request with everything resolved. The job exists once it is written."""

    kind: Literal["finetune"] = "finetune"
    tenant: Tenant
    id: JobId
    created_at: datetime
    requested_by: KeyId | None = None
    trace_id: TraceId | None = None
    request: FinetuneRequest
    recipe: Recipe
    model_id: ModelId
    parent: JobId | None = None


class GenerateSpec(Stored):
    """``spec.json`` of a generate job. ``dataset_id`` is the model's own dataset."""

    kind: Literal["generate"] = "generate"
    tenant: Tenant
    id: JobId
    created_at: datetime
    requested_by: KeyId | None = None
    trace_id: TraceId | None = None
    request: GenerateRequest
    recipe: Recipe
    model_id: ModelId
    dataset_id: DatasetId
    parent: JobId | None = None


class EvaluateSpec(Stored):
    """``spec.json`` of an evaluation. ``model_id`` and ``synthetic_job``: whose pairs are judged; of a model's they are
    made by a child job; neither is given where generators are fitted by child jobs."""

    kind: Literal["evaluate"] = "evaluate"
    tenant: Tenant
    id: JobId
    created_at: datetime
    requested_by: KeyId | None = None
    trace_id: TraceId | None = None
    request: EvaluateRequest
    recipe: Recipe
    model_id: ModelId | None = None
    model_dataset_id: DatasetId | None = None
    synthetic_job: JobId | None = None
    parent: None = None


Spec = FinetuneSpec | GenerateSpec | EvaluateSpec


class End(Stored):
    """``end.json``: created once, and with it the job is over."""

    status: EndStatus
    finished_at: datetime
    result: dict[str, Any] = {}
    problem: Problem | None = None


class Progress(Contract):
    """``done`` of ``total`` in ``unit`` (``steps`` of training, ``pairs`` accepted, segmenters' ``runs``) of the stage
    named beside it."""

    done: int
    total: int
    unit: str


class Job(Contract):
    """What ``GET /jobs/{id}`` answers. ``requested_by`` is the id of an API key. Times are UTC; ``eta_seconds`` is
    absent until a speed has been measured."""

    id: JobId
    kind: Kind
    parent: JobId | None = None
    requested_by: KeyId | None = None
    status: Status
    stage: str | None = None
    progress: Progress | None = None
    eta_seconds: float | None = None
    queue_position: int | None = None
    attempt: int = 1
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    request: dict[str, Any]
    recipe: Recipe
    metadata: dict[str, str] = {}
    result: dict[str, Any] | None = None
    problem: Problem | None = None
    links: dict[str, str] = {}


class JobList(Contract):
    """A page of jobs, newest first; ``next`` is the cursor of the following page."""

    jobs: tuple[Job, ...]
    next: str | None = None


class Preview(Contract):
    """A picture drawn while the job ran; ``name`` is ``{number}.{what}`` and ``uri`` the link to its PNG."""

    name: str
    uri: str


class PreviewList(Contract):
    """Previews in the order of their numbers."""

    previews: tuple[Preview, ...]
