"""What fine-tuning from the built-in foundation gains over fine-tuning from random weights.

    python -m benchmarks.foundation_gain DATASET [--pairs 30] [--steps 360] [--threads 2]

Both sides learn from the same cached latents of the same pairs by the recipe ``cpu``, with the same seeds; the random
side keeps the autoencoder and the text encoder and starts from a U-Net as torch initialises it. Compared is eq. 1 on
unseen cases of the same dataset, averaged weights, at fixed timesteps and noise, before and after each quarter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from meddiff.contracts.recipes import CPU, Recipe, override
from meddiff.science import finetune, foundation
from meddiff.science.foundation import Foundation
from meddiff.science.training import TrainingState
from torch import Tensor

from benchmarks.sources import Case, cases_by_digest

UNSEEN = 40
TIMESTEPS = (100, 300, 500, 700, 900)


def split(dataset: Path, pairs: int) -> tuple[list[Case], list[Case]]:
    """Cases to learn from and cases of other patients to compare on, drawn with a fixed seed."""
    cases = [case for case in cases_by_digest(dataset).values() if case.mask.any()]
    order = np.random.default_rng(0).permutation(len(cases))
    chosen = [cases[i] for i in order]
    learned = chosen[:pairs]
    known = {case.patient for case in learned} - {None}
    return learned, [case for case in chosen[pairs:] if case.patient not in known][:UNSEEN]


def cached(f: Foundation, cases: list[Case], recipe: Recipe) -> dict[str, Tensor]:
    return finetune.build_cache(f, [(c.image, c.mask) for c in cases], [], recipe, 0, lambda done, total: None)


@torch.no_grad()
def unseen_loss(f: Foundation, weights: dict[str, Tensor], cache: dict[str, Tensor]) -> float:
    """Eq. 1 on the cache of unseen cases: mean over cases and ``TIMESTEPS``."""
    f.unet.load_state_dict(weights)
    f.unet.eval()
    device = next(f.unet.parameters()).device
    clean, mask, masked, loss_mask, prompt = (
        cache[name].to(device, torch.float32)
        for name in ("latents", "mask", "masked_latents", "loss_mask", "prompt_embeds")
    )
    losses = []
    for t in TIMESTEPS:
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(t)).to(device)
        steps = torch.full((len(noise),), t, device=device)
        alpha, beta = f.alpha_beta(steps)
        noisy = alpha * clean + beta * noise
        inputs = f.unet_input(noisy, mask, masked)
        predicted = f.predicted_clean(f.unet(inputs, steps, prompt.expand(len(noise), -1, -1)).sample, noisy, steps)
        loss = finetune.masked_loss(predicted, clean, loss_mask, f.loss_weight(steps))
        losses.append(float(loss))
    return float(np.mean(losses))


def curve(f: Foundation, train: dict[str, Tensor], unseen: dict[str, Tensor], recipe: Recipe) -> list[float]:
    """Loss on unseen cases before training and after each quarter of the recipe's steps."""
    losses = [unseen_loss(f, {k: v.clone() for k, v in f.unet.state_dict().items()}, unseen)]
    state: TrainingState | None = None
    for quarter in (1, 2, 3, 4):
        stop = recipe.finetuning.steps * quarter // 4
        state = finetune.train(f, train, recipe, 0, "inpainter", state, stop, lambda entry: None, lambda: False)
        losses.append(unseen_loss(f, state.ema, unseen))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=CPU.finetuning.steps)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = override(CPU, {"finetuning": {"steps": arguments.steps}})
    f = foundation.load("builtin", torch.float32, torch.device("cpu"))
    learned, unseen = split(arguments.dataset, arguments.pairs)
    train = cached(f, learned, recipe)
    test = cached(f, unseen, override(recipe, {"finetuning": {"variants": 1}}))
    pretrained = curve(f, train, test, recipe)
    torch.manual_seed(0)
    f.unet = UNet2DConditionModel.from_config(f.unet.config).requires_grad_(True)
    random = curve(f, train, test, recipe)
    print(f"{arguments.dataset.name}: eq. 1 on {len(unseen)} unseen cases, {arguments.pairs} pairs")
    print("steps        " + "".join(f"{recipe.finetuning.steps * q // 4:>9}" for q in range(5)))
    print("foundation   " + "".join(f"{loss:9.4f}" for loss in pretrained))
    print("random       " + "".join(f"{loss:9.4f}" for loss in random))
    print(f"ratio after all steps (random / foundation): {random[-1] / pretrained[-1]:.2f}")


if __name__ == "__main__":
    main()
