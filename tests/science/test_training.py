from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from meddiff.science.training import StepLog, TrainingState, load_weights, train_segment, warmup
from meddiff.seeds import derive
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TOTAL = 9


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def loss_at(module: nn.Module, step: int, accelerator: Accelerator) -> Tensor:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(derive(7, step)))
    return (module(x) - x.sum(dim=1, keepdim=True)).square().mean()  # type: ignore[no-any-return]


def trained(
    state: TrainingState | None, stop: int, log: list[StepLog] | None = None, ema: float = 0.9
) -> TrainingState:
    return train_segment(
        network(),
        loss_at,
        state,
        total=TOTAL,
        stop_step=stop,
        learning_rate=lambda step: warmup(step, TOTAL, 0.05, 3),
        ema_decay=ema,
        on_step=(log if log is not None else []).append,
        should_stop=lambda: False,
    )


def assert_same(a: TrainingState, b: TrainingState) -> None:
    one, other = a.to_tensors(), b.to_tensors()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_resumed_from_a_file_gives_the_same_bits_as_training_that_went_on(tmp_path: Path) -> None:
    whole = trained(None, TOTAL)
    save_file(trained(None, 4).to_tensors(), tmp_path / "state.safetensors")
    resumed = trained(TrainingState.from_tensors(load_file(tmp_path / "state.safetensors")), TOTAL)
    assert resumed.step == TOTAL
    assert_same(whole, resumed)


def test_stopping_between_steps_leaves_the_state_of_the_last_one() -> None:
    seen: list[StepLog] = []
    stopped = train_segment(
        network(),
        loss_at,
        None,
        total=TOTAL,
        stop_step=TOTAL,
        learning_rate=lambda step: warmup(step, TOTAL, 0.05, 3),
        ema_decay=0.9,
        on_step=seen.append,
        should_stop=lambda: len(seen) == 2,
    )
    assert [entry.step for entry in seen] == [1, 2]
    assert_same(stopped, trained(None, 2))


def test_a_training_that_is_stopped_at_once_or_has_nothing_left_to_do_changes_nothing() -> None:
    start = trained(None, 0)
    for name, p in network().named_parameters():
        assert torch.equal(start.params[name], p)
        assert torch.equal(start.ema[name], p)
        assert not start.exp_avg[name].any()
    assert_same(trained(start, 0), start)
    end = trained(None, TOTAL)
    assert_same(trained(end, TOTAL), end)


def test_the_first_step_moves_every_weight_by_the_learning_rate_as_adam_does() -> None:
    start, after = trained(None, 0), trained(None, 1)
    for name, p in start.params.items():
        moved = (after.params[name] - p).abs()
        assert torch.allclose(moved[after.exp_avg[name].abs() > 1e-6], torch.tensor(0.05 / 3), rtol=1e-2)


def test_the_average_starts_fast_and_is_the_weights_themselves_without_decay() -> None:
    start, after = trained(None, 0), trained(None, 1)
    for name in start.params:
        expected = torch.lerp(start.params[name], after.params[name], 1 - 1 / 11)
        assert torch.allclose(after.ema[name], expected)
    plain = trained(None, TOTAL, ema=0.0)
    assert all(torch.equal(plain.ema[name], plain.params[name]) for name in plain.params)


def test_the_log_tells_step_rate_time_and_memory() -> None:
    log: list[StepLog] = []
    trained(None, 5, log)
    assert [(entry.step, entry.total) for entry in log] == [(n, TOTAL) for n in range(1, 6)]
    assert [entry.learning_rate for entry in log] == pytest.approx([0.05 / 3, 0.1 / 3, 0.05, 0.05, 0.05])
    assert all(entry.seconds > 0 and entry.memory_bytes > 10_000_000 and math.isfinite(entry.loss) for entry in log)
    assert log[-1].loss < log[0].loss


def test_the_cosine_falls_from_the_full_rate_to_nearly_nothing() -> None:
    rates = [warmup(step, 100, 1.0, 10, cosine=True) for step in range(100)]
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (lambda module: module(torch.full((1, 3), math.nan)).sum(), "the loss of step 1 "),
        (lambda module: module(torch.zeros(1, 3)).mul(0).sqrt().sum(), "the weights after step 1 "),
    ],
    ids=["its loss", "its gradient alone"],
)
def test_a_last_step_that_is_not_finite_ends_the_training(loss: Callable[[nn.Module], Tensor], named: str) -> None:
    with pytest.raises(FloatingPointError, match=named):
        train_segment(
            network(),
            lambda module, step, accelerator: loss(module),
            None,
            total=1,
            stop_step=1,
            learning_rate=lambda step: 0.1,
            ema_decay=0.0,
            on_step=lambda entry: None,
            should_stop=lambda: False,
        )


def test_a_segment_beyond_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        trained(None, TOTAL + 1)


def test_loaded_weights_are_the_states() -> None:
    module = network()
    load_weights(module, trained(None, 3).ema)
    assert all(torch.equal(p, trained(None, 3).ema[name]) for name, p in module.named_parameters())
