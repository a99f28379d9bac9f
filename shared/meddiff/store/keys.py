"""Every key of the object store, in one place. A key is a function of tenant, owner, stage and index, nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from uuid import UUID

from meddiff.contracts.tasks import Stage

_SEGMENT = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")


def join(*segments: str | int) -> str:
    """Segments joined by ``/``. Raises ``ValueError`` for an empty one, or one that could leave its parent."""
    parts = [str(s) for s in segments]
    for part in parts:
        if not _SEGMENT.match(part):
            raise ValueError(f"not a key segment: {part!r}")
    return "/".join(parts)


@dataclass(frozen=True)
class DatasetKeys:
    """Keys of one dataset."""

    tenant: str
    dataset_id: str

    @property
    def root(self) -> str:
        return join("t", self.tenant, "datasets", self.dataset_id)

    @property
    def dataset(self) -> str:
        return f"{self.root}/dataset.json"

    def image(self, case_id: str) -> str:
        return f"{self.root}/cases/{join(case_id + '.image.png')}"

    def mask(self, case_id: str) -> str:
        return f"{self.root}/cases/{join(case_id + '.mask.png')}"


@dataclass(frozen=True)
class ModelKeys:
    """Keys of one model: a diffusers folder, and beside it what generation needs."""

    tenant: str
    model_id: str

    @property
    def root(self) -> str:
        return join("t", self.tenant, "models", self.model_id)

    @property
    def card(self) -> str:
        return f"{self.root}/model.json"

    @property
    def reference(self) -> str:
        return f"{self.root}/reference.safetensors"

    def file(self, *path: str) -> str:
        return f"{self.root}/{join(*path)}"

    def background(self, case_id: str) -> str:
        return self.file("backgrounds", f"{case_id}.png")


@dataclass(frozen=True)
class JobKeys:
    """Keys of one job."""

    tenant: str
    job_id: str

    @property
    def root(self) -> str:
        return join("t", self.tenant, "jobs", self.job_id)

    @property
    def spec(self) -> str:
        return f"{self.root}/spec.json"

    @property
    def cancel(self) -> str:
        return f"{self.root}/cancel.json"

    @property
    def end(self) -> str:
        return f"{self.root}/end.json"

    @property
    def manifest(self) -> str:
        return f"{self.root}/manifest.json"

    @property
    def contact_sheet(self) -> str:
        return f"{self.root}/contact_sheet.png"

    @property
    def cache(self) -> str:
        return f"{self.root}/cache/latents.safetensors"

    @property
    def done_root(self) -> str:
        return f"{self.root}/done/"

    def done(self, stage: Stage, shard: int) -> str:
        return f"{self.root}/done/{join(stage, f'{shard:08d}.json')}"

    def started(self, stage: Stage, shard: int) -> str:
        """There while a worker runs the task, and after that only if it was killed."""
        return f"{self.root}/started/{join(stage, f'{shard:08d}')}"

    def fault(self, stage: Stage, shard: int, n: int) -> str:
        return f"{self.root}/faults/{join(stage, f'{shard:08d}', f'{n:04d}.json')}"

    def faults(self, stage: Stage, shard: int) -> str:
        return f"{self.root}/faults/{join(stage, f'{shard:08d}')}/"

    @property
    def faults_root(self) -> str:
        return f"{self.root}/faults/"

    def checkpoints(self, part: str) -> str:
        return f"{self.root}/checkpoints/{join(part)}/"

    def checkpoint(self, part: str, step: int, name: str) -> str:
        return f"{self.root}/checkpoints/{join(part, f'{step:08d}', name)}"

    def training_log(self, part: str, segment: int) -> str:
        return f"{self.root}/logs/{join(part, f'{segment:08d}.jsonl')}"

    def rows(self, run: int) -> str:
        """Figures of the test cases of an evaluation's run."""
        return f"{self.root}/rows/{join(f'{run:08d}.jsonl')}"

    def segmenter(self, split: int, arm: str) -> str:
        """Weights of the first segmenter of an arm on a split."""
        return f"{self.root}/segmenters/{join(f'{split:04d}', arm.replace(' ', '_') + '.safetensors')}"

    def report(self, suffix: str) -> str:
        """``suffix``: json or html."""
        return f"{self.root}/{join(f'report.{suffix}')}"

    @property
    def candidates_root(self) -> str:
        return f"{self.root}/candidates/"

    def candidate(self, index: int, what: str) -> str:
        """``what``: shape, guide, image or label."""
        return f"{self.root}/candidates/{join(f'{index:08d}.{what}.png')}"

    @property
    def previews(self) -> str:
        return f"{self.root}/previews/"

    def preview(self, n: int, what: str) -> str:
        return f"{self.root}/previews/{join(f'{n:06d}.{what}.png')}"


def tenant_root(tenant: str, what: str) -> str:
    """``what``: datasets, models or jobs."""
    return join("t", tenant, what) + "/"


def active(tenant: str, job_id: str) -> str:
    """What the sweep lists; removed after the job's end."""
    return join("active", tenant, job_id)


def newest(tenant: str, job_id: str) -> str:
    """What a list of jobs reads: the complement of a UUIDv7 makes later jobs come first."""
    return newest_root(tenant) + f"{_complement(job_id):032x}"


def newest_root(tenant: str) -> str:
    return join("t", tenant, "newest") + "/"


def job_of_newest(key: str) -> str:
    """The job that ``newest`` made ``key`` of."""
    return str(UUID(int=_complement(key.rpartition("/")[2])))


def _complement(number: str) -> int:
    return (1 << 128) - 1 - UUID(number).int


def api_key(digest: str) -> str:
    """``digest``: SHA-256 of the key's token."""
    return api_keys_root() + join(f"{digest}.json")


def api_keys_root() -> str:
    return "keys/"


def audit_record(tenant: str, number: str) -> str:
    """``number``: a UUIDv7; later ones come first."""
    return audit_root(tenant) + f"{_complement(number):032x}.json"


def audit_root(tenant: str) -> str:
    return join("audit", tenant) + "/"


def idempotency(digest: str) -> str:
    return join("idempotency", f"{digest}.json")


def model_name(tenant: str, name: str) -> str:
    """Points from a model's name to its id; the newest finetune of a name holds it."""
    return join("t", tenant, "names", f"{name}.json")
