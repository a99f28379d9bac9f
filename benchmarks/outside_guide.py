"""Outside the guide nothing changes: recomputed from a pulled job and the dataset's own files.

    python -m benchmarks.outside_guide PULLED DATASET

Reads the background of each pair from the dataset by its digest, not from the service, and compares it with the
synthetic image at every pixel outside the recorded guide. Exits 1 where any differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.sources import Pulled, cases_by_digest


def main(pulled: Pulled, dataset: Path) -> int:
    """Prints the largest difference in grey levels, the median of guide area over shape area, and the share outside."""
    real = cases_by_digest(dataset)
    differences, excess, outside = [], [], []
    for pair in pulled.manifest.pairs:
        image, guide, shape = pulled.image(pair), pulled.mask(pair, "guide"), pulled.mask(pair, "shape")
        if pair.background.repaired:
            raise SystemExit("the backgrounds are repaired ones: the dataset does not have them")
        background = real[pair.background.sha256].image
        differences.append(int(np.abs(image.astype(int) - background.astype(int))[~guide].max(initial=0)))
        excess.append(guide.sum() / shape.sum())
        outside.append((~guide).mean())
    print(f"pairs: {len(differences)}")
    print(f"largest difference outside the guide: {max(differences)}")
    print(f"guide area / shape area: median {np.median(excess):.2f}, highest {max(excess):.2f}")
    print(f"share of the image outside the guide: median {np.median(outside):.3f}, lowest {min(outside):.3f}")
    return int(max(differences) > 0)


if __name__ == "__main__":
    raise SystemExit(main(Pulled(Path(sys.argv[1])), Path(sys.argv[2])))
