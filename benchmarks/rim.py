"""Seams in numbers: how much colour and gradient change across the rim of a guide.

    python -m benchmarks.rim PULLED DATASET

For each pair the same rim is measured twice: in the synthetic image, and in the real image that lies behind it. Further
figures: overlap of shapes, similarity of crops, and how the shapes' area, place and eccentricity compare to real masks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from meddiff.science import encoders, geometry, quality
from meddiff_services.pictures import Mask, Pixels
from numpy.typing import NDArray
from scipy import ndimage, stats
from skimage.measure import label, regionprops

from benchmarks.sources import Case, Pulled, cases_by_digest

BAND_PX = 3
SIGMA_PX = 2.0


def colour_step(image: Pixels, guide: Mask) -> float:
    """Mean over the rim of the difference, in grey levels, between local means of a band inside and one outside."""
    values = image.astype(np.float32)
    inside, outside = _bands(guide)
    rim = inside & ndimage.binary_dilation(outside)
    if not rim.any():
        return 0.0
    means = [_local_mean(values, band)[rim] for band in (inside, outside)]
    return float(np.abs(means[0] - means[1]).mean())


def gradient(image: Pixels, guide: Mask) -> float:
    """Mean absolute difference, in grey levels, of neighbours of which one lies inside the guide, one outside."""
    values = image.astype(np.float32)
    steps = []
    for axis in (0, 1):
        across = np.diff(guide.astype(np.int8), axis=axis) != 0
        steps.append(np.abs(np.diff(values, axis=axis))[across].ravel())
    joined = np.concatenate(steps)
    return float(joined.mean()) if joined.size else 0.0


def _bands(guide: Mask) -> tuple[Mask, Mask]:
    return (
        guide & (ndimage.distance_transform_edt(guide) <= BAND_PX),
        ~guide & (ndimage.distance_transform_edt(~guide) <= BAND_PX),
    )


def _local_mean(values: NDArray[np.float32], band: Mask) -> NDArray[np.float32]:
    weight = ndimage.gaussian_filter(band.astype(np.float32), SIGMA_PX)[..., None]
    return np.asarray(ndimage.gaussian_filter(values * band[..., None], (SIGMA_PX, SIGMA_PX, 0)) / (weight + 1e-6))


def shape_statistics(mask: Mask) -> tuple[float, float, float, float, int]:
    """Area and centroid (row, column) as shares of the image, eccentricity of the largest component, components."""
    regions = regionprops(label(mask))
    largest = max(regions, key=lambda region: region.area)
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    return float(mask.mean()), rows.mean() / height, columns.mean() / width, largest.eccentricity, len(regions)


def report(pulled: Pulled, dataset: Path) -> None:
    """Prints every figure, one a line."""
    manifest = pulled.manifest
    real = cases_by_digest(dataset)
    steps, gradients, excess = [], [], []
    for pair in manifest.pairs:
        image, guide, shape = pulled.image(pair), pulled.mask(pair, "guide"), pulled.mask(pair, "shape")
        background = real[pair.background.sha256].image
        steps.append((colour_step(image, guide), colour_step(background, guide)))
        gradients.append((gradient(image, guide), gradient(background, guide)))
        excess.append(guide.sum() / shape.sum())
    for name, values in (("colour step", steps), ("gradient", gradients)):
        ours, theirs = np.median(np.array(values), axis=0)
        print(f"rim {name}: synthetic {ours:.2f}, real {theirs:.2f}, ratio {ours / max(theirs, 1e-6):.2f}")
    print(f"guide area / shape area: median {np.median(excess):.2f}")
    shapes = [pulled.mask(pair, "shape") for pair in manifest.pairs]
    print(f"highest IoU of two shapes: {_highest_iou(shapes):.3f}")
    _similarities(pulled, [real[d] for d in manifest.cases])
    ours_table = np.array([shape_statistics(shape) for shape in shapes])
    real_table = np.array([shape_statistics(real[d].mask) for d in manifest.cases])
    for column, name in enumerate(("area", "centroid row", "centroid column", "eccentricity", "components")):
        test = stats.ks_2samp(ours_table[:, column], real_table[:, column])
        print(
            f"{name}: synthetic {ours_table[:, column].mean():.3f}, real {real_table[:, column].mean():.3f}, "
            f"KS {test.statistic:.2f} (p {test.pvalue:.2f})"
        )


def _highest_iou(shapes: list[Mask]) -> float:
    """Exact for shapes of one size; those of different sizes are compared in a common frame of 256 x 256."""
    if len({shape.shape for shape in shapes}) > 1:
        shapes = [geometry.resize_mask(shape, (256, 256)) for shape in shapes]
    flat = np.array([shape.ravel() for shape in shapes], dtype=np.float32)
    intersection = flat @ flat.T
    area = flat.sum(axis=1)
    iou = intersection / (area[:, None] + area[None, :] - intersection)
    np.fill_diagonal(iou, 0)
    return float(iou.max())


def _similarities(pulled: Pulled, real: list[Case]) -> None:
    manifest = pulled.manifest
    recipe = manifest.recipe.quality
    encoder = encoders.load_encoder(recipe.encoder, recipe.encoder_source, torch.device("cpu"))

    def embed(image: Pixels, mask: Mask) -> NDArray[np.float32]:
        crop = quality.lesion_crop(image, mask, recipe.context, recipe.crop_px)
        coloured = np.broadcast_to(crop, (*crop.shape[:2], 3)).astype(np.float32) / 255
        return encoder(torch.from_numpy(coloured.transpose(2, 0, 1))[None])[0].numpy()

    ours = np.array([embed(pulled.image(p), pulled.mask(p, "shape")) for p in manifest.pairs])
    theirs = np.array([embed(case.image, case.mask) for case in real])
    among = ours @ ours.T
    np.fill_diagonal(among, -1)
    print(f"highest crop similarity of two pairs: {among.max():.3f}, to a real lesion: {(ours @ theirs.T).max():.3f}")


if __name__ == "__main__":
    report(Pulled(Path(sys.argv[1])), Path(sys.argv[2]))
