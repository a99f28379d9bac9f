"""Figures and pictures of the built-in foundation: what `docs/foundation.md` shows.

    python -m benchmarks.foundation_report LOGS DATA DOCS

LOGS: the folder the foundation was trained in; DATA: a folder with PH2, BUSI, DDTI, ISIC-2017 and ISIC-2018; DOCS:
where ``log.png`` and ``samples.png`` go. Prints the PSNR of reconstructing real images, none of which
was trained on, and paints held-out drawings only.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import AutoencoderKL
from meddiff.contracts.recipes import CPU, override
from meddiff.pretraining import autoencoder
from meddiff.pretraining.inpainter import draw
from meddiff.science import foundation, geometry, inpainting
from meddiff_services.pictures import Pixels, sheet
from torch import Tensor

from benchmarks.sources import cases_by_digest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATASETS = ("PH2", "BUSI", "DDTI", "ISIC-2017", "ISIC-2018")
CASES = 40


def as_tensor(image: Pixels) -> Tensor:
    """uint8 (1, 3, h, w), cut to a multiple of 4 px."""
    height, width = (side // 4 * 4 for side in image.shape[:2])
    coloured = np.broadcast_to(image[:height, :width], (height, width, 3))
    return torch.from_numpy(np.ascontiguousarray(coloured.transpose(2, 0, 1)))[None]


def psnr_table(vae: AutoencoderKL, data: Path) -> None:
    """One line a dataset: mean and lowest PSNR at native size (up to 512 px) and of the image at 128 px."""
    for name in DATASETS:
        cases = list(cases_by_digest(data / name).values())
        chosen = [c.image for c in cases if max(c.image.shape) <= 512]
        if not chosen:
            print(f"{name:10} none of at most 512 px a side", flush=True)
            continue
        chosen = [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))[:CASES]]
        native = [float(autoencoder.psnr(vae, as_tensor(image))) for image in chosen]
        small = [float(autoencoder.psnr(vae, as_tensor(geometry.resize_image(i, (128, 128))))) for i in chosen]
        print(
            f"{name:10} n {len(chosen):3}  native: mean {np.mean(native):.2f} dB, lowest {min(native):.2f}   "
            f"128 px: mean {np.mean(small):.2f} dB, lowest {min(small):.2f}",
            flush=True,
        )


def plot_logs(logs: Path, target: Path) -> None:
    """Loss over minutes of both trainings."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    for axis, part in zip(axes, ("autoencoder", "inpainter"), strict=True):
        with (logs / part / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        axis.semilogy([float(row["minutes"]) for row in rows], [float(row["loss"]) for row in rows])
        axis.set(title=part, xlabel="minutes on 2 cores", ylabel="loss")
    figure.tight_layout()
    figure.savefig(target, dpi=80)


def paint_samples(target: Path, count: int = 16) -> None:
    """Held-out drawings: what was there, the hole, and what the foundation paints into it from noise, untuned."""
    f = foundation.load("builtin", torch.float32, torch.device("cpu"))
    recipe = override(CPU, {"inpainting": {"strength": 1.0, "context": 4.0}, "finetuning": {"prompt": "a lesion"}})
    samples = draw(10**6, count, held_out=True)
    canvases = [inpainting.Canvas(s.picture, s.shape, s.guide, None, n) for n, s in enumerate(samples)]
    painted = inpainting.inpaint(f, canvases, recipe)
    rows = [
        [s.picture, np.where(s.guide[..., None], np.where(s.shape[..., None], 0, 128), s.picture).astype(np.uint8), p]
        for s, p in zip(samples, painted, strict=True)
    ]
    target.write_bytes(sheet(rows, ["drawn", "shape and guide", "painted"], side=96, groups=4))


def main(logs: Path, data: Path, docs: Path) -> None:
    torch.set_num_threads(2)
    docs.mkdir(parents=True, exist_ok=True)
    plot_logs(logs, docs / "log.png")
    paint_samples(docs / "samples.png")
    psnr_table(AutoencoderKL.from_pretrained(foundation.BUILTIN / "vae", torch_dtype=torch.float32), data)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
