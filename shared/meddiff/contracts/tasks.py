"""Tasks and their markers: what the planner lists and the workers leave behind."""

from __future__ import annotations

from typing import Any, Literal

from meddiff.contracts.base import Contract, JobId, Stored, Tenant

Queue = Literal["datasets", "training", "masks", "inpainting", "quality"]
Stage = Literal[
    "import",  # datasets: read, judge and store the dataset
    "cache",  # training: latents and prompt embedding, once
    "inpainter",  # training: segment of the guided inpainter
    "repair",  # training: segment of the paper's second U-Net
    "mask_generator",  # training: segment of the mask DDPM
    "backgrounds",  # inpainting: lesions repaired away, kept with the model
    "calibrate",  # quality: reference embeddings and similarity band
    "publish",  # training: assemble the model
    "masks",  # masks: shapes, guides and backgrounds of a shard
    "inpainting",  # inpainting: images of a shard
    "quality",  # quality: scores and labels of a shard
    "manifest",  # quality: the manifest and the contact sheet
    "split",  # quality: which cases train and which test
    "stop",  # training: segmenters on inner folds of an arm, to choose where it stops
    "segmenter",  # training: one segmenter, and the figures of its test cases
    "report",  # quality: what the figures say
]

QUEUE_OF: dict[Stage, Queue] = {
    "import": "datasets",
    "cache": "training",
    "inpainter": "training",
    "repair": "training",
    "mask_generator": "training",
    "backgrounds": "inpainting",
    "calibrate": "quality",
    "publish": "training",
    "masks": "masks",
    "inpainting": "inpainting",
    "quality": "quality",
    "manifest": "quality",
    "split": "quality",
    "stop": "training",
    "segmenter": "training",
    "report": "quality",
}


class Task(Contract):
    """A unit of work: the stage of a job and the number of its shard or segment (0 where there is just one)."""

    tenant: Tenant
    job_id: JobId
    stage: Stage
    shard: int = 0

    @property
    def queue(self) -> Queue:
        return QUEUE_OF[self.stage]


class Marker(Stored):
    """``done/{stage}/{shard}.json``: the task is done. ``units`` (steps, candidates) in ``seconds`` give the speed;
    ``output`` is what later stages and the planner need to know, and is a function of the job's spec and the
    fingerprint. Only ``seconds`` and ``worker`` may differ between two runs of the same task."""

    stage: Stage
    shard: int
    units: int
    seconds: float
    worker: str
    output: dict[str, Any]


KILLED = "its process was ended from outside, perhaps for want of memory"
"""The ``error`` of a fault that no exception left behind."""
STORE_FAULT = "the store, which answers, did not give or take an object"
"""The ``error`` of a fault that is the store's, not the task's."""


class TaskFault(Stored):
    """``faults/{stage}/{shard}/{n}.json``: what went wrong, without a word of the user's data."""

    stage: Stage
    shard: int
    error: str
    worker: str
