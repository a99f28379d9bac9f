"""How sampled masks compare with real ones that their generator has not seen.

    python -m benchmarks.mask_quality FOLDER…

The mask generator of the cpu recipe is trained on thirty masks of a dataset. Of area, centroid, eccentricity and number
of components a two-sample Kolmogorov-Smirnov test compares 64 samples with the masks held aside, and, as a yardstick,
the thirty themselves with those. Novelty: each mask's highest IoU with one of the thirty, of samples and of held-aside
masks. Whether the network heeds the area that it is told: the correlation of areas asked for and drawn, over the range
of the thirty, of all that it draws. Prints a Markdown table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from meddiff import signatures
from meddiff.contracts.recipes import CPU
from meddiff.science import mask_generator
from meddiff.seeds import derive
from meddiff_services.pictures import Mask
from scipy import stats

from benchmarks.rim import shape_statistics
from benchmarks.sources import cases_by_digest

TRAINED_ON, SAMPLED = 30, 64
SEEDS = [derive("mask_quality", n) for n in range(SAMPLED)]
WHAT = ("area", "centroid row", "centroid column", "eccentricity", "components")


def split(folder: Path) -> tuple[list[Mask], list[Mask]]:
    """Thirty masks of different patients, and those of all other patients."""
    found = [(digest, case) for digest, case in cases_by_digest(folder).items() if case.mask.any()]
    ordered = sorted(found, key=lambda item: derive("masks", item[0]))
    thirty: dict[str, Mask] = {}
    for digest, case in ordered:
        if len(thirty) < TRAINED_ON:
            thirty.setdefault(case.patient or digest, case.mask)
    aside = [case.mask for digest, case in ordered if (case.patient or digest) not in thirty]
    return list(thirty.values()), aside


def trained(masks: Sequence[Mask]) -> UNet2DModel:
    settings = CPU.mask_generation
    state = mask_generator.train(
        masks, CPU, 0, None, settings.steps, lambda _: None, lambda: False, torch.device("cpu")
    )  # fmt: skip
    network = mask_generator.build(settings)
    network.load_state_dict(state.ema)
    return network.eval()


def sampled(network: UNet2DModel, masks: Sequence[Mask]) -> list[Mask]:
    shapes = mask_generator.sample(network, CPU, SEEDS, masks)
    return [mask_generator.place(shape, masks[n % len(masks)].shape) for n, shape in enumerate(shapes)]


@torch.no_grad()
def heeded(network: UNet2DModel, masks: Sequence[Mask]) -> float:
    """The correlation of the areas that the network is told with those it draws."""
    least, *_, most = sorted(float(mask.mean()) for mask in masks)
    asked = np.linspace(least, most, SAMPLED)
    fields = mask_generator.ddim(network, CPU.mask_generation, SEEDS, list(asked))
    return float(np.corrcoef(asked, [(field > 0).mean() for field in fields])[0, 1])


def novelty(masks: Sequence[Mask], known: Sequence[Mask]) -> float:
    """Median of each mask's highest IoU with a known one, in a common frame."""
    shapes = signatures.Shapes(b"".join(bytes.fromhex(signatures.of(mask)) for mask in known))
    return float(np.median([shapes.max_iou(bytes.fromhex(signatures.of(mask))) for mask in masks]))


def report(folder: Path) -> None:
    thirty, aside = split(folder)
    network = trained(thirty)
    samples = sampled(network, thirty)
    ours, theirs, known = (np.array([shape_statistics(m) for m in masks]) for masks in (samples, aside, thirty))
    for column, name in enumerate(WHAT):
        one = stats.ks_2samp(ours[:, column], theirs[:, column])
        yard = stats.ks_2samp(known[:, column], theirs[:, column])
        means = f"{ours[:, column].mean():.3f} | {theirs[:, column].mean():.3f}"
        print(
            f"| {folder.name} ({len(aside)} aside) | {name} | {means} "
            f"| {one.statistic:.2f} (p {one.pvalue:.2f}) | {yard.statistic:.2f} (p {yard.pvalue:.2f}) |"
        )
    near, real = novelty(samples, thirty), novelty(aside, thirty)
    print(f"| {folder.name} | highest IoU with one of the thirty | {near:.3f} | {real:.3f} | | |")
    print(
        f"| {folder.name} | area asked for and drawn, correlation | {heeded(network, thirty):.2f} | | | |", flush=True
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    print("| dataset | of masks | sampled | held aside | KS, sampled and aside | KS, the thirty and aside |")
    print("|---|---|---|---|---|---|")
    for name in sys.argv[1:]:
        report(Path(name))
