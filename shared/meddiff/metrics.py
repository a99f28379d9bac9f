"""What services count for Prometheus, by its naming rules: base units, ``_total`` for counters, few values a label.

A process counts what happens in it; what is known of queues and jobs as a whole the gateway tells
(``meddiff_services.gateway.metrics``).
"""

from __future__ import annotations

from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from meddiff.contracts.jobs import EndStatus, Kind

STORE_CALLS = Counter("meddiff_store_calls", "Calls of the object store, retries included", ["outcome"])
JOBS_ACCEPTED = Counter("meddiff_jobs_accepted", "Jobs accepted, child jobs of evaluations not counted", ["kind"])
JOBS_ENDED = Counter("meddiff_jobs_ended", "Jobs that this process ended", ["kind", "status"])
TASK_SECONDS = Histogram(
    "meddiff_task_duration_seconds",
    "What a task took, by how it left",
    ["stage", "result"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
)
TASKS_REDELIVERED = Counter("meddiff_tasks_redelivered", "Tasks that the broker delivered again", ["stage"])
LEASES_LOST = Counter("meddiff_leases_lost", "Running tasks whose lease became another worker's", ["stage"])
TRAINING_STEPS = Counter("meddiff_training_steps", "Optimiser steps done", ["stage"])
TRAINING_LOSS = Gauge("meddiff_training_loss", "Loss of the latest step", ["stage"])
TRAININGS_DIVERGED = Counter("meddiff_trainings_diverged", "Segments whose loss was no longer finite", ["stage"])
CANDIDATES = Counter(
    "meddiff_candidates",
    "Synthetic pairs judged: accepted, or why not; of those accepted, duplicate shapes at the end of their job",
    ["outcome"],
)
SIMILARITY = Histogram(
    "meddiff_candidate_similarity_ratio",
    "Similarity of a synthetic lesion to the real ones, a cosine",
    buckets=tuple(round(0.3 + 0.05 * n, 2) for n in range(15)),
)
MODEL_LOADS = Counter(
    "meddiff_model_cache_requests", "Models and encoders asked for: found in memory, or loaded", ["result"]
)

# What has a known set of labels starts at 0, so that a rate is known from the first event on.
for _outcome in ("done", "unavailable", "refused"):
    STORE_CALLS.labels(_outcome)
for _kind in get_args(Kind):
    JOBS_ACCEPTED.labels(_kind)
    for _status in get_args(EndStatus):
        JOBS_ENDED.labels(_kind, _status)
