"""The one training loop: AdamW with an average of the weights, cut into segments that resume bit for bit.

Step s draws all its randomness from its own seed, so parameters, averages and AdamW's two moments are the whole state.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

LossAt = Callable[[nn.Module, int, Accelerator], Tensor]
"""``loss_at(module, step, accelerator)``: the scalar loss of step ``step``.

Of several processes each draws the same batch from the step's seed and takes its share, every ``num_processes``-th
example from ``process_index`` on; gradients are averaged, so the step is the same however many devices share it.
``module`` is the one to call: it may be wrapped for distributed work."""


@dataclass(frozen=True)
class StepLog:
    """One training step: ``step`` of ``total`` (1-based), its loss, learning rate, wall time in seconds and the peak
    memory in bytes (of the GPU, else of the process)."""

    step: int
    total: int
    loss: float
    learning_rate: float
    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class TrainingState:
    """Everything a training is after ``step`` steps: parameters by name, their exponential moving average, and
    AdamW's first and second moments. Tensors are float32 on the CPU."""

    step: int
    params: dict[str, Tensor]
    ema: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]

    def to_tensors(self) -> dict[str, Tensor]:
        """A flat dict for safetensors: ``params.*``, ``ema.*``, ``exp_avg.*``, ``exp_avg_sq.*`` and ``step``."""
        parts = {"params": self.params, "ema": self.ema, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        flat = {f"{part}.{name}": t.contiguous() for part, tensors in parts.items() for name, t in tensors.items()}
        return flat | {"step": torch.tensor(self.step)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TrainingState:
        """The inverse of ``to_tensors``."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

        return cls(int(tensors["step"]), part("params."), part("ema."), part("exp_avg."), part("exp_avg_sq."))


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies ``weights`` (a state's ``params`` or ``ema``) into ``module``. Raises ``KeyError`` for a missing name."""
    with torch.no_grad():
        for name, p in _trainable(module).items():
            p.copy_(weights[name])


def share_of(batch: int, accelerator: Accelerator) -> slice:
    """This process's part of a batch. Raises ``ValueError`` where the parts would differ in size."""
    if batch % accelerator.num_processes:
        raise ValueError(f"a batch of {batch} cannot be shared evenly by {accelerator.num_processes} processes")
    return slice(accelerator.process_index, None, accelerator.num_processes)


def warmup(step: int, steps: int, learning_rate: float, warmup_steps: int, cosine: bool = False) -> float:
    """The learning rate of step ``step`` (0-based) of ``steps``: a linear rise over ``warmup_steps``, then constant, or
    falling to zero along half a cosine."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    if not cosine:
        return learning_rate
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def train_segment(
    module: nn.Module,
    loss_at: LossAt,
    state: TrainingState | None,
    *,
    total: int,
    stop_step: int,
    learning_rate: Callable[[int], float],
    ema_decay: float,
    on_step: Callable[[StepLog], None],
    should_stop: Callable[[], bool],
) -> TrainingState:
    """Trains ``module`` from ``state`` (None: from its own weights) up to ``stop_step``, or until ``should_stop()``.

    Gradients are clipped to norm 1; the average forgets with ``ema_decay``, faster in the first steps. Stopping and
    resuming from the returned state gives the same bits as going on. ``module`` holds the last weights afterwards.
    Raises ``ValueError`` if ``stop_step`` lies beyond ``total`` and ``FloatingPointError`` if the loss, or at the end a
    weight, is no longer finite.
    """
    if stop_step > total:
        raise ValueError(f"stop_step {stop_step} lies beyond total {total}")
    accelerator = Accelerator(cpu=next(module.parameters()).device.type == "cpu")
    if state is not None:
        load_weights(module, state.params)
    module.train()
    params = _trainable(module)
    optimizer = torch.optim.AdamW(params.values(), weight_decay=0.0, fused=True)
    wrapped, wrapped_optimizer = accelerator.prepare(module, optimizer)
    params = _trainable(accelerator.unwrap_model(wrapped))
    if state is not None and state.step:
        for name, p in params.items():
            optimizer.state[p] = {
                "step": torch.tensor(float(state.step), device=p.device),
                "exp_avg": _laid_out_like(p, state.exp_avg[name]),
                "exp_avg_sq": _laid_out_like(p, state.exp_avg_sq[name]),
            }
    averages = params if state is None else state.ema
    ema = {name: _laid_out_like(p, averages[name]) for name, p in params.items()}
    step = 0 if state is None else state.step
    del state, averages  # Of a large network every copy counts.

    while step < stop_step and not _agreed(should_stop()):
        started = time.perf_counter()
        rate = learning_rate(step)
        optimizer.param_groups[0]["lr"] = rate
        loss = loss_at(wrapped, step, accelerator)
        value = float(accelerator.reduce(loss.detach(), "mean"))
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {step + 1} is not finite")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(params.values(), 1.0)
        wrapped_optimizer.step()
        wrapped_optimizer.zero_grad()
        step += 1
        decay = min(ema_decay, step / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), list(params.values()), 1 - decay)
        if accelerator.is_main_process:
            on_step(StepLog(step, total, value, rate, time.perf_counter() - started, _peak_memory(accelerator.device)))

    if not all(bool(torch.isfinite(p).all()) for p in params.values()):
        raise FloatingPointError(f"the weights after step {step} are not finite")
    moments = {
        n: optimizer.state[p] or dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like(p))
        for n, p in params.items()
    }
    return TrainingState(
        step=step,
        params={n: _stored(p) for n, p in params.items()},
        ema={n: _stored(t) for n, t in ema.items()},
        exp_avg={n: _stored(m["exp_avg"]) for n, m in moments.items()},
        exp_avg_sq={n: _stored(m["exp_avg_sq"]) for n, m in moments.items()},
    )


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def _laid_out_like(p: Tensor, values: Tensor) -> Tensor:
    """``values`` in the memory layout of ``p``: the fused kernel walks a parameter and its moments as they lie."""
    return torch.empty_like(p, requires_grad=False).copy_(values.detach())


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _agreed(stop: bool) -> bool:
    """The first process's answer, in every process."""
    answer = [stop]
    broadcast_object_list(answer)
    return answer[0]


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
