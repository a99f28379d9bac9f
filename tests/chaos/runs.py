"""Seeded chaos: jobs of all three kinds, faults at random moments, and every result compared with the quiet day's."""

from __future__ import annotations

import io
import json
import random
import re
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meddiff import housekeeping, phantoms
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.ids import model_id_of
from meddiff.contracts.tasks import TaskFault
from meddiff.housekeeping import Verified
from meddiff.store.keys import JobKeys, ModelKeys
from rig import SERVICES, Rig
from tiny import write_checkpoint

TENANT = "local"
ENDS_WITHIN = 400.0
SETTLED_WITHIN = 60.0
WORKERS = tuple(name for name in SERVICES if not name.startswith("gateway"))
RECIPE = {
    "foundation": {"source": "checkpoint", "resolution": 64},
    "finetuning": {"steps": 24, "segment_steps": 6, "variants": 1, "preview_pairs": 1},
    "mask_generation": {
        "steps": 12, "segment_steps": 6, "sampling_steps": 2, "resolution": 16, "widths": (32,), "batch_size": 4,
    },
    "inpainting": {"solver_steps": 4},
    "quality": {"far_quantile": 0.0},
    "work": {"shard_size": 2, "attempts": 8.0, "training_threads": 1, "inference_threads": 1},
    "evaluation": {
        "segmenter": "unet", "size": 64, "steps": 10, "every": 5, "inner_folds": 2, "batch_size": 4, "tested": 6,
    },
}  # fmt: skip
COUNT = 8


@dataclass
class Outcome:
    """What a run met and what was wrong after it."""

    seed: int
    jobs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    recoveries: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def dataset() -> bytes:
    """A zip archive of phantoms."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        phantoms.write(folder, pairs=18, backgrounds=2)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


def write_models(folder: Path) -> None:
    """A foundation of random weights, small enough to train in seconds."""
    write_checkpoint(folder)


class Chaos:
    """A rig, and what its jobs give on a quiet day."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.store = rig.store
        self.accepted(lambda: rig.ask("GET", "/readyz"))
        self.dataset = self.accepted(
            lambda: rig.ask("POST", "/datasets", content=dataset(), headers={"Content-Type": "application/zip"})
        )["id"]
        tuned = self.submit("finetune", self.finetune(), "quiet")
        self.end(tuned)
        self.model = model_id_of(tuned)
        made = self.submit("generate", self.generate(), "quiet")
        self.end(made)
        self.made = made
        judged = self.submit("evaluate", self.evaluate(), "quiet")
        self.end(judged)
        self.quiet = {kind: self.result(kind, job) for kind, job in zip(KINDS, (tuned, made, judged), strict=True)}

    # ---------------------------------------------------------------------------------------------------------- jobs

    def finetune(self) -> dict[str, Any]:
        return {"dataset_uri": self.dataset, "max_pairs": 10, "recipe": {"name": "cpu", "override": RECIPE}}

    def generate(self) -> dict[str, Any]:
        return {"model": self.model, "count": COUNT, "seed": 7}

    def evaluate(self) -> dict[str, Any]:
        override = {"evaluation": RECIPE["evaluation"]}
        recipe = {"name": "cpu", "override": override}
        return {
            "dataset_uri": self.dataset, "synthetic_job": self.made, "synthetic": [COUNT], "seeds": 2,
            "arms": ["synthetic"], "recipe": recipe,
        }  # fmt: skip

    def accepted(self, ask: Callable[[], Any]) -> dict[str, Any]:
        """The answer to a question that is asked until there is one."""
        deadline = time.monotonic() + ENDS_WITHIN
        while time.monotonic() < deadline:
            response = ask()
            if response is not None:
                assert response.status_code < 300, response.text
                return dict(response.json())
            time.sleep(0.5)
        raise AssertionError("no gateway answers")

    def submit(self, kind: str, body: dict[str, Any], key: str) -> str:
        """The id of the job that was accepted under an idempotency key of its own."""
        headers = {"Idempotency-Key": f"{kind} {key}"}
        return str(self.accepted(lambda: self.rig.ask("POST", f"/{kind}", json=body, headers=headers))["id"])

    def ended(self, job: str) -> bool:
        return self.store.exists(JobKeys(TENANT, job).end)

    def end(self, job: str) -> None:
        deadline = time.monotonic() + ENDS_WITHIN
        while not self.ended(job):
            assert time.monotonic() < deadline, f"job {job} did not end"
            time.sleep(0.2)

    def result(self, kind: str, job: str) -> dict[str, Any]:
        """Status, and what the job made: digests of its model's files, its manifest, or its report, with ids, keys and
        times masked."""
        keys = JobKeys(TENANT, job)
        end = json.loads(self.store.get(keys.end))
        found: dict[str, Any] = {"status": end["status"], "problem": end["problem"]}
        if end["status"] not in ("succeeded", "incomplete"):
            return found
        if kind == "finetune":
            root = ModelKeys(TENANT, end["result"]["model_id"]).root + "/"
            names = [key.removeprefix(root) for key in self.store.list(root)]
            return found | {name: sha256_hex(self.store.get(root + name)) for name in names if name != "model.json"}
        data = self.store.get(keys.manifest if kind == "generate" else keys.report("json"))
        return found | {"made": json.loads(masked(data.decode()))}

    # ---------------------------------------------------------------------------------------------------------- a run

    def run(self, seed: int) -> Outcome:
        """Jobs of all kinds, faults at random moments, calm, and every invariant checked from the store alone."""
        draw = random.Random(seed)
        outcome = Outcome(seed)
        before = Counter(self.rig.restarts)
        planned = sorted(
            (draw.uniform(0, 25), draw.choice(sorted(FAULTS)), draw.random()) for _ in range(draw.randint(3, 5))
        )
        stop = threading.Event()
        inject = threading.Thread(target=self._inject, args=(planned, outcome, stop))
        inject.start()
        try:
            jobs = {
                kind: self.submit(kind, body, f"{seed}")
                for kind, body in zip(KINDS, (self.finetune(), self.generate(), self.evaluate()), strict=True)
            }
            outcome.jobs = len(jobs)
            for kind, job in jobs.items():
                try:
                    self.end(job)
                except AssertionError as error:
                    outcome.wrong.append(f"seed {seed}: {kind}: {error}")
        finally:
            stop.set()
            inject.join()
            self.calm()
        for kind, job in jobs.items():
            if self.ended(job) and (found := difference(self.quiet[kind], self.result(kind, job))) is not None:
                outcome.wrong.append(f"seed {seed}: {kind} {job}: {found}")
            faults = [self.store.get_json(key, TaskFault) for key in self.store.list(JobKeys(TENANT, job).faults_root)]
            outcome.recoveries["tasks tried again after a fault"] += len(faults)
        outcome.recoveries["processes started again"] += (self.rig.restarts - before).total()
        self._settle(outcome)
        return outcome

    def _inject(self, planned: list[tuple[float, str, float]], outcome: Outcome, stop: threading.Event) -> None:
        begun = time.monotonic()
        for moment, name, luck in planned:
            if stop.wait(max(0.0, moment - (time.monotonic() - begun))):
                return
            outcome.faults[name] += 1
            FAULTS[name](self.rig, luck)

    def calm(self) -> None:
        """No fault is left in force."""
        self.rig.to_redis.quiet()
        self.rig.to_s3.quiet()

    def _settle(self, outcome: Outcome) -> None:
        """Nothing is active, and the store holds what it should and nothing else."""
        deadline = time.monotonic() + SETTLED_WITHIN
        while list(self.store.list("active/")) and time.monotonic() < deadline:
            time.sleep(0.5)
        outcome.wrong += [f"seed {outcome.seed}: still active: {key}" for key in self.store.list("active/")]
        now = datetime.now(UTC)
        housekeeping.tidy(self.store, now)
        for finding in housekeeping.fsck(self.store, now, Verified()):
            outcome.wrong.append(f"seed {outcome.seed}: {finding.kind}: {finding.key} ({finding.why})")


def _for_a_while(seconds: float, begin: Callable[[], None], end: Callable[[], None]) -> None:
    begin()
    time.sleep(seconds)
    end()


def _refusing(rig: Rig, luck: float) -> None:
    rig.to_s3.refusing = 0.1 + 0.3 * luck
    _for_a_while(2 + 6 * luck, lambda: None, rig.to_s3.quiet)


def _truncating(rig: Rig, luck: float) -> None:
    rig.to_s3.truncating = 0.05 + 0.2 * luck
    _for_a_while(2 + 6 * luck, lambda: None, rig.to_s3.quiet)


def _slow(rig: Rig, luck: float) -> None:
    rig.to_s3.delay = 0.05 + 0.3 * luck
    _for_a_while(2 + 6 * luck, lambda: None, rig.to_s3.quiet)


def _two_leaders(rig: Rig, luck: float) -> None:
    """Both gateways sweep: whoever leads loses the lead all the time."""
    with rig.client() as client:
        until = time.monotonic() + 2 + 4 * luck
        while time.monotonic() < until:
            client.delete("leader:sweep")
            time.sleep(0.05)


def _rolling_restart(rig: Rig, luck: float) -> None:
    for name in SERVICES:
        rig.terminate(name)
        time.sleep(0.5 + luck)


def _pick(luck: float, names: tuple[str, ...] = tuple(SERVICES)) -> str:
    return names[int(luck * len(names))]


KINDS = ("finetune", "generate", "evaluate")
FAULTS: dict[str, Callable[[Rig, float], None]] = {
    "service killed": lambda rig, luck: rig.kill(_pick(luck)),
    "worker killed": lambda rig, luck: rig.kill(_pick(luck, WORKERS)),
    "service asked to leave": lambda rig, luck: rig.terminate(_pick(luck)),
    "service stopped and continued": lambda rig, luck: rig.stand_still(_pick(luck), 1 + 12 * luck),
    "rolling restart": _rolling_restart,
    "Redis killed, empty": lambda rig, luck: rig.redis_anew(),
    "Redis flushed": lambda rig, luck: rig.client().flushall() and None,
    "Redis read-only": lambda rig, luck: rig.redis_read_only(1 + 6 * luck),
    "Redis out of memory": lambda rig, luck: rig.redis_out_of_memory(1 + 6 * luck),
    "Redis cut off": lambda rig, luck: _for_a_while(1 + 6 * luck, rig.to_redis.cut, rig.to_redis.quiet),
    "store killed": lambda rig, luck: rig.s3_anew(3 * luck),
    "store slow": _slow,
    "store refuses a share": _refusing,
    "store cuts bodies short": _truncating,
    "store cut off": lambda rig, luck: _for_a_while(1 + 6 * luck, rig.to_s3.cut, rig.to_s3.quiet),
    "disk full": lambda rig, luck: rig.disk_full(_pick(luck, WORKERS), 0.5 + luck),
    "two sweeps lead": _two_leaders,
    "messages delivered twice": lambda rig, luck: rig.messages_twice(3 + 5 * luck),
}

_MASKS = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"), "JOB"),
    (re.compile(r"md_[0-9a-f]{32}"), "MODEL"),
    (re.compile(r"\d{4}-\d\d-\d\dT[0-9:.]+(?:Z|\+00:00)"), "TIME"),
)


def masked(text: str) -> str:
    """Without what may differ between two jobs that were asked for the same: ids and times."""
    for pattern, name in _MASKS:
        text = pattern.sub(name, text)
    return text


def difference(quiet: Any, told: Any, path: str = "") -> str | None:
    """The first place where two results differ, if any."""
    if quiet == told:
        return None
    if isinstance(quiet, dict) and isinstance(told, dict):
        for name in sorted(set(quiet) | set(told)):
            if quiet.get(name) != told.get(name):
                return difference(quiet.get(name), told.get(name), f"{path}/{name}")
    if isinstance(quiet, list) and isinstance(told, list):
        for n, (one, other) in enumerate(zip(quiet, told, strict=False)):
            if one != other:
                return difference(one, other, f"{path}/{n}")
        return f"{path}: {len(told)} entries, on a quiet day {len(quiet)}"
    return f"{path}: {str(told)[:200]}, on a quiet day {str(quiet)[:200]}"
