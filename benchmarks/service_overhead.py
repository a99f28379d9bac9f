"""A generate job through the services against the same functions in one process, in turns.

    python -m benchmarks.service_overhead --data FOLDER/PH2

Starts an embedded stack, fine-tunes shortly, and then lets the service (gateway, Redis, S3, a sampler, two inpainters,
a scorer) and this process (two threads) each make ``--count`` accepted pairs with that model, ``--turns`` times. Of the
service it counts from the request to the end of the job as a client sees it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from meddiff.client import Client
from meddiff.contracts.recipes import override
from meddiff.embedded import stack
from meddiff.store.keys import ModelKeys
from meddiff.store.objects import ObjectStore
from meddiff_services.loading import fetch_folder
from threadpoolctl import threadpool_limits

from benchmarks.in_process import Generator
from benchmarks.sources import cases_by_digest

QUICK = {"finetuning": {"steps": 120}, "mask_generation": {"steps": 400}}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """A published model's weights, by the names that ``Generator`` takes them."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    masks = UNet2DModel.from_pretrained(folder / "mask_generator").state_dict()
    return {f"unet.{k}": v for k, v in unet.items()} | {f"masks.{k}": v for k, v in masks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    threadpool_limits(1, user_api="blas")  # As in a worker.
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        running = stack.up(home / "stack", inpainters=2, file_roots=[arguments.data])
        try:
            compare(running, arguments, home / "model")
        finally:
            stack.down(home / "stack")


def compare(running: stack.Stack, arguments: argparse.Namespace, folder: Path) -> None:
    with Client(running.address) as client:
        tuned = client.finetune(arguments.data.resolve().as_uri(), name="speed", override=QUICK)
        assert client.wait(tuned.id).status == "succeeded"
        card = client.model("speed")
        fetch_folder(
            ObjectStore.from_settings(running.settings), ModelKeys("local", card.id).root + "/", folder, "model.json"
        )
        known = cases_by_digest(arguments.data)
        recipe = override(card.recipe, {"work": {"inference_threads": 2}})
        healthy = [case.image for case in known.values() if case.role == "background"]
        generator = Generator([known[digest] for digest in card.cases], healthy, recipe, weights(folder))
        ratios = []
        for turn in range(arguments.turns):
            begun = time.perf_counter()
            job = client.wait(client.generate("speed", arguments.count, seed=turn).id)
            assert job.status == "succeeded", job.problem
            through = time.perf_counter() - begun
            begun = time.perf_counter()
            made = generator.generate(arguments.count, turn)
            alone = time.perf_counter() - begun
            assert len(made) == arguments.count
            ratios.append(alone / through)
            print(f"turn {turn + 1}: services {through:.1f} s, one process {alone:.1f} s", flush=True)
    print(f"d, one process / services: median {np.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
