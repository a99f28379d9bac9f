"""What both trainings share: a clock that outlives interruptions, atomic files, the learning rate, the log."""

import csv
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_atomically(state: Any, path: Path) -> None:
    """`torch.save` into a neighbour, then rename over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def cosine(share: float, first: float, last: float, warmup: float = 0.01) -> float:
    """Learning rate after `share` in [0, 1] of the training: linear warm-up, then half a cosine from first to last."""
    if share < warmup:
        return first * share / warmup + last
    return float(last + (first - last) * 0.5 * (1 + np.cos(np.pi * min(1.0, (share - warmup) / (1 - warmup)))))


@dataclass
class Run:
    """A training of fixed length in minutes that can be cut anywhere: `clock` yields steps until time is used up."""

    folder: Path
    minutes: float
    step: int = 0
    seconds: float = 0.0
    _losses: list[float] = field(default_factory=list)
    _mark: tuple[int, float] = (0, 0.0)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def share(self) -> float:
        """Share of the time that is used, in [0, 1]."""
        return min(1.0, self.seconds / (60 * self.minutes))

    def clock(self) -> Iterator[int]:
        while self.share < 1:
            begin = time.monotonic()
            yield self.step
            self.step += 1
            self.seconds += time.monotonic() - begin

    def note(self, loss: float, lr: float, every: int = 100, **more: float) -> None:
        """Collect the loss of a step and append a line to `log.csv` each `every` steps: means since the last line."""
        self._losses.append(loss)
        if (self.step + 1) % every:
            return
        steps, seconds = self._mark
        row = {
            "step": self.step + 1,
            "minutes": round(self.seconds / 60, 2),
            "loss": round(float(np.mean(self._losses)), 6),
            "lr": f"{lr:.2e}",
            "seconds_per_step": round((self.seconds - seconds) / max(1, self.step - steps), 4),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **{name: round(value, 4) for name, value in more.items()},
        }
        path = self.folder / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            if new:
                writer.writeheader()
            writer.writerow(row)
        self._losses, self._mark = [], (self.step, self.seconds)

    def state(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def resume(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self._mark = (self.step, self.seconds)


class Average:
    """Exponential moving average of a module's parameters, with a warm-up so that early steps are soon forgotten."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        own, new = list(self.weights.values()), [p.detach() for _, p in module.named_parameters()]
        torch._foreach_lerp_(own, new, 1 - decay)

    def state(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.weights}

    def resume(self, state: dict[str, Any]) -> None:
        self.updates, self.weights = state["updates"], state["weights"]
