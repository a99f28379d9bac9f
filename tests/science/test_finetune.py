from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from meddiff.contracts.recipes import CPU, PAPER, Recipe, override
from meddiff.science import finetune, foundation
from meddiff.science.finetune import build_cache, hole_beside, masked_loss, train
from meddiff.science.foundation import Foundation
from meddiff.science.geometry import Image, Mask
from meddiff.science.training import StepLog, TrainingState

from .tiny import write_checkpoint

SMALL = override(
    CPU,
    {
        "foundation": {"resolution": 64},
        "finetuning": {"variants": 4, "steps": 6, "batch_size": 2, "warmup_steps": 2, "segment_steps": 3},
    },
)


@pytest.fixture(scope="module", params=["v_prediction", "epsilon"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param)


def loaded(checkpoint: Path) -> Foundation:
    torch.set_num_threads(1)
    return foundation.load(checkpoint, torch.float32, torch.device("cpu"))


def pair(seed: int, height: int, width: int, channels: int = 3) -> tuple[Image, Mask]:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.bool_)
    mask[height // 3 : height // 2, width // 4 : width // 2] = True
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8), mask


PAIRS = [pair(0, 80, 110), pair(1, 120, 70, channels=1), pair(2, 64, 64)]


def cached(f: Foundation, recipe: Recipe = SMALL, seed: int = 1) -> dict[str, torch.Tensor]:
    return build_cache(f, PAIRS, [PAIRS[0][0]], recipe, seed, lambda done, total: None)


# -------------------------------------------------------------------------------------------------------- the loss


def test_loss_is_normalised_by_the_mask_area_of_each_example() -> None:
    target = torch.zeros(2, 4, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :2], mask[1, :, :, :7] = 1, 1
    prediction = target + torch.tensor([3.0, 1.0]).view(2, 1, 1, 1)
    weight = torch.tensor([1.0, 2.0])
    assert masked_loss(prediction, target, mask, weight).item() == pytest.approx((9 * 1 + 1 * 2) / 2)


def test_gradient_is_exactly_zero_outside_the_mask() -> None:
    torch.manual_seed(0)
    prediction = torch.randn(3, 4, 8, 8, requires_grad=True)
    mask = (torch.rand(3, 1, 8, 8) > 0.6).float()
    masked_loss(prediction, torch.randn(3, 4, 8, 8), mask, torch.rand(3) + 0.1).backward()
    assert prediction.grad is not None
    outside = (mask == 0).expand_as(prediction)
    assert (prediction.grad[outside] == 0).all()
    assert (prediction.grad[~outside] != 0).all()


def test_an_empty_mask_gives_zero_not_nan() -> None:
    assert masked_loss(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.zeros(1, 1, 2, 2), torch.ones(1)) == 0


def test_weighted_error_of_the_clean_latents_is_the_error_of_the_prediction(checkpoint: Path) -> None:
    f = loaded(checkpoint)
    torch.manual_seed(0)
    clean, noise, guess = (torch.randn(4, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([20, 300, 700, 980])
    f.scheduler.alphas_cumprod = f.scheduler.alphas_cumprod.double()
    alpha, beta = f.alpha_beta(t)
    noisy = alpha * clean + beta * noise
    velocity = f.scheduler.config.prediction_type == "v_prediction"
    wanted = alpha * noise - beta * clean if velocity else noise
    assert f.predicted_clean(wanted, noisy, t).numpy() == pytest.approx(clean.numpy(), abs=1e-9)
    mask = torch.ones(4, 1, 8, 8, dtype=torch.float64)
    loss = masked_loss(f.predicted_clean(guess, noisy, t), clean, mask, f.loss_weight(t))
    assert loss.item() == pytest.approx((guess - wanted).square().mean().item(), rel=1e-9)


def test_an_example_without_loss_mask_moves_no_weight(checkpoint: Path) -> None:
    f = loaded(checkpoint)
    cache = cached(f)
    losses: list[float] = []
    train(f, cache, SMALL, 0, "inpainter", None, 1, lambda entry: losses.append(entry.loss), lambda: False)
    silent = cache | {"loss_mask": torch.zeros_like(cache["loss_mask"])}
    f = loaded(checkpoint)
    before = {n: p.clone() for n, p in f.unet.named_parameters()}
    train(f, silent, SMALL, 0, "inpainter", None, 1, lambda entry: losses.append(entry.loss), lambda: False)
    assert losses[0] > 0
    assert losses[1] == 0
    assert all(torch.equal(p, before[n]) for n, p in f.unet.named_parameters())


# --------------------------------------------------------------------------------------------------------- the cache


def test_cache_holds_every_variant_and_is_a_function_of_the_seed(checkpoint: Path) -> None:
    f = loaded(checkpoint)
    cache, again, other = cached(f), cached(f), cached(f, seed=2)
    assert cache["latents"].shape == cache["masked_latents"].shape == (12, 4, 16, 16)
    assert cache["mask"].shape == cache["loss_mask"].shape == (12, 1, 16, 16)
    assert cache["prompt_embeds"].shape[0] == 1
    assert all(torch.equal(cache[name], again[name]) for name in cache)
    assert not torch.equal(cache["latents"], other["latents"])
    assert ((cache["mask"] >= 0) & (cache["mask"] <= 1)).all()
    assert (cache["loss_mask"].sum(dim=(1, 2, 3)) > 0).all()


def test_loss_lies_inside_the_guide_alone(checkpoint: Path) -> None:
    cache = cached(loaded(checkpoint))
    assert (cache["loss_mask"][cache["mask"] == 0] == 0).all()


def test_the_second_u_net_is_shown_no_lesion_as_healthy(checkpoint: Path) -> None:
    changes = {"finetuning": {"separate_repair": True, "repair_share": 0.5}, "inpainting": {"background": "repair"}}
    cache = build_cache(loaded(checkpoint), PAIRS, [], override(SMALL, changes), 1, lambda done, total: None)
    assert (cache["repair/mask"].flatten(1).amin(dim=1) == 0).all()
    assert (cache["repair/loss_mask"][cache["repair/mask"] == 0] == 0).all()


def test_lesion_free_images_spare_the_second_u_net(checkpoint: Path) -> None:
    changes = {"finetuning": {"separate_repair": True}, "inpainting": {"background": "repair"}}
    assert "repair/mask" not in cached(loaded(checkpoint), override(SMALL, changes))


def test_the_first_variant_of_a_pair_is_the_pair_as_it_is(checkpoint: Path) -> None:
    f = loaded(checkpoint)
    holes, none = (cached(f, override(SMALL, {"finetuning": {"repair_share": share}})) for share in (0.5, 0.0))
    first = slice(0, None, SMALL.finetuning.variants)
    for name in ("latents", "masked_latents", "mask", "loss_mask"):
        assert torch.equal(holes[name][first], none[name][first])


def test_the_edge_of_a_shape_weighs_more_where_the_recipe_says_so(checkpoint: Path) -> None:
    cache = cached(loaded(checkpoint), override(SMALL, {"finetuning": {"edge_weight": 4.0, "repair_share": 0.0}}))
    weight, mask = cache["loss_mask"], cache["mask"]
    edge = (mask > 0.5) & (mask < 1)
    assert set(weight[edge].tolist()) - {0.0} == {5.0}  # 0 beyond the picture.
    assert (weight[mask == 1] <= 1).all()


def test_padded_pixels_carry_no_loss(checkpoint: Path) -> None:
    image, _ = pair(0, 40, 120)
    mask = np.zeros((40, 120), np.bool_)
    mask[:, 10:110] = True
    recipe = override(SMALL, {"finetuning": {"variants": 1}})
    cache = build_cache(loaded(checkpoint), [(image, mask)], [], recipe, 0, lambda done, total: None)
    rows = cache["loss_mask"][0, 0].any(dim=1)
    padded = round(16 * (120 - 40) / 2 / 120)
    assert not rows[:padded].any()
    assert not rows[-padded:].any()
    assert rows[padded + 1 : -padded - 1].all()


def test_repair_examples_ask_for_healthy_tissue_only(checkpoint: Path) -> None:
    f = loaded(checkpoint)
    half = cached(f, override(SMALL, {"finetuning": {"repair_share": 0.5}}))["mask"].amax(dim=(1, 2, 3))
    first_of_pair = torch.arange(12) % 4 == 0
    assert (half[first_of_pair] == 1).all()
    assert set(half[~first_of_pair].tolist()) == {0.5, 1.0}
    never = cached(f, override(SMALL, {"finetuning": {"repair_share": 0.0}}))
    assert (never["mask"].amax(dim=(1, 2, 3)) == 1).all()


def test_a_hole_never_touches_the_lesion() -> None:
    for seed in range(20):
        forbidden = PAIRS[0][1]
        hole = hole_beside(PAIRS[1][1], forbidden, np.random.default_rng(seed))
        assert hole is not None
        assert hole.any()
        assert not (hole & forbidden).any()
    assert hole_beside(PAIRS[1][1], np.ones((50, 50), np.bool_), np.random.default_rng(0)) is None


def test_the_papers_recipe_takes_the_mask_itself_and_its_inverse_in_the_whole_image(checkpoint: Path) -> None:
    recipe = override(PAPER, {"foundation": {"resolution": 64}})
    image, mask = pair(0, 64, 64)
    cache = build_cache(loaded(checkpoint), [(image, mask)], [], recipe, 0, lambda done, total: None)
    cells = torch.from_numpy(mask.reshape(16, 4, 16, 4).mean(axis=(1, 3))).float()
    assert torch.equal(cache["mask"][0, 0], cells)
    assert torch.equal(cache["repair/mask"][0, 0], 1 - cells)
    assert torch.equal(cache["loss_mask"][0, 0], (cells > 0).float())
    assert torch.equal(cache["repair/loss_mask"][0, 0], (cells < 1).float())
    assert torch.equal(cache["latents"], cache["repair/latents"])


def test_image_and_mask_go_through_one_transform() -> None:
    """A picture that is its own mask still is, whatever the augmentation did to both."""
    mask = np.zeros((90, 130), np.bool_)
    mask[20:50, 40:100] = True
    mask[30:70, 50:60] = True
    image = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2)
    torch.set_num_threads(1)
    recipe = override(CPU, {"foundation": {"resolution": 64}})
    for seed in range(12):
        rng = np.random.default_rng(seed)
        example = finetune.Example(image, mask, mask)
        prepared = finetune.prepare(4, example, recipe, rng, as_it_is=False)
        bright = (prepared["image"].mean(dim=0) > 0).float()
        pooled = torch.nn.functional.avg_pool2d(bright[None], 4)
        assert (pooled - prepared["mask"]).abs().mean() < 0.02


# ------------------------------------------------------------------------------------------------------ the training


def run(checkpoint: Path, cache: dict[str, torch.Tensor], cuts: list[int], recipe: Recipe = SMALL) -> TrainingState:
    state = None
    for stop in cuts:
        f = loaded(checkpoint)
        if state is not None:
            state = TrainingState.from_tensors(state.to_tensors())
        state = train(f, cache, recipe, 3, "inpainter", state, stop, lambda entry: None, lambda: False)
    assert state is not None
    return state


def test_a_resumed_training_is_bitwise_the_uninterrupted_one(checkpoint: Path) -> None:
    cache = cached(loaded(checkpoint))
    whole, cut = run(checkpoint, cache, [6]).to_tensors(), run(checkpoint, cache, [1, 4, 6]).to_tensors()
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_training_logs_every_step_and_lowers_the_loss(checkpoint: Path) -> None:
    f = loaded(checkpoint)
    recipe = override(
        SMALL, {"finetuning": {"steps": 60, "learning_rate": 5e-3, "warmup_steps": 5, "schedule": "cosine"}}
    )
    log: list[StepLog] = []
    state = train(f, cached(f), recipe, 0, "inpainter", None, 60, log.append, lambda: False)
    assert state.step == 60
    assert [entry.step for entry in log] == list(range(1, 61))
    assert all(entry.seconds > 0 and entry.memory_bytes > 0 and entry.total == 60 for entry in log)
    assert log[0].learning_rate == pytest.approx(1e-3)
    assert max(entry.learning_rate for entry in log) == pytest.approx(5e-3)
    assert log[-1].learning_rate < 1e-4
    assert np.mean([entry.loss for entry in log[-15:]]) < 0.9 * np.mean([entry.loss for entry in log[:15]])


def test_a_stop_ends_the_training_at_the_next_step(checkpoint: Path) -> None:
    f = loaded(checkpoint)
    log: list[StepLog] = []
    state = train(f, cached(f), SMALL, 0, "inpainter", None, 6, log.append, lambda: len(log) == 2)
    assert state.step == 2


def test_only_the_finest_blocks_are_computed_again_and_no_weight_differs(checkpoint: Path) -> None:
    again = override(SMALL, {"finetuning": {"gradient_checkpointing": True}})
    cache = cached(loaded(checkpoint))
    f = loaded(checkpoint)
    computed: list[int] = []
    for module in f.unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[-1]))
    counts = {}
    for recipe in (SMALL, again):
        computed.clear()
        train(f, cache, recipe, 3, "inpainter", None, 1, lambda entry: None, lambda: False)
        counts[recipe.finetuning.gradient_checkpointing] = Counter(computed)
    finest = cache["mask"].shape[-1]
    assert counts[True] == {side: n * (2 if side == finest else 1) for side, n in counts[False].items()}
    assert len(counts[True]) > 1
    once, twice = run(checkpoint, cache, [2]), run(checkpoint, cache, [2], again)
    assert all(torch.equal(p, twice.params[name]) for name, p in once.params.items())


def test_bfloat16_computes_with_float32_master_weights(checkpoint: Path) -> None:
    torch.set_num_threads(1)
    f = foundation.load(checkpoint, torch.bfloat16, torch.device("cpu"))
    recipe = override(SMALL, {"foundation": {"dtype": "bfloat16"}, "finetuning": {"gradient_checkpointing": True}})
    state = train(f, cached(f, recipe), recipe, 0, "inpainter", None, 2, lambda entry: None, lambda: False)
    assert all(tensor.dtype == torch.float32 for tensor in state.params.values())
    assert any((state.params[name] != state.params[name].bfloat16().float()).any() for name in state.params)
