"""What the science does on a CUDA device, against what it does on the CPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from meddiff.contracts.recipes import CPU, Evaluation, Recipe, override
from meddiff.science import encoders, finetune, foundation, geometry, inpainting, mask_generator
from meddiff.science.evaluation import figures, segmenters, training, trials
from meddiff.science.geometry import Image, Mask
from meddiff.science.training import StepLog, TrainingState
from meddiff.settings import Settings
from meddiff_services import gpu, loading
from transformers import Dinov2Config, Dinov2Model

from .tiny import write_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HOST, CARD = torch.device("cpu"), torch.device("cuda", 0)
SMALL = override(
    CPU,
    {
        "foundation": {"resolution": 64},
        "finetuning": {"variants": 4, "steps": 6, "batch_size": 2, "warmup_steps": 2, "gradient_checkpointing": True},
        "mask_generation": {"steps": 40},
        "inpainting": {"solver_steps": 8, "strength": 0.6, "ring_strength": 0.6, "batch_size": 4},
    },
)
HALF = override(SMALL, {"foundation": {"dtype": "bfloat16"}})


def pair(seed: int) -> tuple[Image, Mask]:
    """A dark disc on grey noise (72, 96, 3), and its mask."""
    rng = np.random.default_rng(seed)
    rows, columns = np.ogrid[:72, :96]
    mask = np.asarray(np.hypot(rows - rng.uniform(24, 48), columns - rng.uniform(30, 66)) < rng.uniform(9, 18))
    return (rng.normal(160, 12, (72, 96, 3)) - 70 * mask[..., None]).clip(0, 255).astype(np.uint8), mask


PAIRS = [pair(seed) for seed in range(10)]


@pytest.fixture(scope="module", autouse=True)
def as_a_worker_has_it() -> None:
    torch.set_num_threads(1)
    assert loading.device(Settings(device="cuda")) == CARD


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def finetuned(
    checkpoint: Path, recipe: Recipe, device: torch.device, stops: tuple[int, ...]
) -> tuple[TrainingState, list[StepLog]]:
    """A fine-tune that begins anew from its own state at each of ``stops``."""
    state, logs = None, list[StepLog]()
    for stop in stops:
        f = foundation.load(checkpoint, loading.DTYPES[recipe.foundation.dtype], device)
        cache = finetune.build_cache(f, PAIRS, [], recipe, 1, lambda *_: None)
        state = finetune.train(f, cache, recipe, 2, "inpainter", state, stop, logs.append, lambda: False)
    assert state is not None
    return state, logs


@pytest.mark.parametrize("recipe", [SMALL, HALF], ids=["float32", "bfloat16"])
def test_a_finetune_follows_that_of_the_cpu_and_resumes_bit_for_bit(checkpoint: Path, recipe: Recipe) -> None:
    _, on_host = finetuned(checkpoint, recipe, HOST, (6,))
    whole, on_card = finetuned(checkpoint, recipe, CARD, (6,))
    resumed, _ = finetuned(checkpoint, recipe, CARD, (3, 6))
    assert [log.loss for log in on_card] == pytest.approx([log.loss for log in on_host], rel=0.02)
    assert all(log.memory_bytes > 0 for log in on_card)
    tensors, again = whole.to_tensors(), resumed.to_tensors()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_paintings_are_those_of_the_cpu_and_change_nothing_outside_the_guide(checkpoint: Path) -> None:
    canvases = []
    for n, (image, mask) in enumerate(PAIRS[:3]):
        guide = geometry.guide_of(mask, 0.2)
        canvases.append(
            inpainting.Canvas(image, mask, guide, inpainting.fit_lesion(image, mask, guide, image, mask), n)
        )
    on_host, on_card = (
        inpainting.inpaint(foundation.load(checkpoint, torch.float32, device), canvases, SMALL)
        for device in (HOST, CARD)
    )
    alone = inpainting.inpaint(foundation.load(checkpoint, torch.float32, CARD), canvases[1:2], SMALL)
    assert np.array_equal(alone[0], on_card[1])
    for canvas, one, other in zip(canvases, on_host, on_card, strict=True):
        assert np.array_equal(other[~canvas.guide], canvas.background[~canvas.guide])
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 2


def test_shapes_are_drawn_alike() -> None:
    masks = [mask for _, mask in PAIRS]
    losses, states = [], []
    for device in (HOST, CARD):
        logs = list[StepLog]()
        states.append(mask_generator.train(masks, SMALL, 3, None, 40, logs.append, lambda: False, device))
        losses.append([log.loss for log in logs])
    assert losses[1][:5] == pytest.approx(losses[0][:5], rel=0.02)
    fields = []
    for device in (HOST, CARD):
        network = mask_generator.build(SMALL.mask_generation).to(device)
        network.load_state_dict(states[0].ema)
        with torch.no_grad():
            drawn = mask_generator.ddim(network.eval(), SMALL.mask_generation, range(5), [0.1, 0.2, 0.3, 0.4, 0.5])
        fields.append(np.stack(drawn))
    assert np.abs(fields[0] - fields[1]).max() < 0.05


@pytest.mark.parametrize("kind", ["dinov2", "efficientnet-lite0"])
def test_vectors_are_those_of_the_cpu(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)).save_pretrained(tmp_path)
    images = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    one, other = (
        encoders.load_encoder(kind, str(tmp_path) if kind == "dinov2" else "builtin", device)(images)
        for device in (HOST, CARD)
    )
    assert (one * other).sum(dim=1).min() > 0.9995
    assert other.device == HOST


@pytest.mark.parametrize("name", list(segmenters.SEGMENTERS))
def test_a_segmenter_learns_on_the_card(name: str) -> None:
    settings = Evaluation(segmenter=name, size=64, steps=90, every=90, learning_rate=3e-3, ema_decay=0.9)
    material = trials.Material(PAIRS[:8], PAIRS[:4], [frozenset()] * 4, "falling")
    network = trials.trained(material, settings, settings.steps, 1, lambda *_: None, CARD)
    image, mask = PAIRS[9]
    assert figures.figures(training.predict(network, image, 64), mask).dice > 0.8


def test_the_card_and_its_memory_are_told() -> None:
    memory = {s.labels["state"]: s.value for s in next(iter(gpu.Gpus().collect())).samples if s.labels["device"] == "0"}
    assert memory["used"] > 0
    assert memory["free"] > 0
    assert loading.fingerprint(HALF, Settings(device="auto"))["device"] == f"cuda: {torch.cuda.get_device_name()}"
