"""Which cases train and which test: whole groups on one side; a group is a patient, or a set of near-duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from meddiff.science.encoders import Encoder
from meddiff.science.geometry import Image, resize_image
from meddiff.seeds import derive

VIEWED = 160  # Side that whole images are stretched to before they are embedded.


@dataclass(frozen=True)
class Draw:
    """Indices of cases: those that train, further real ones for the oracle, and those that test."""

    train: tuple[int, ...]
    extra: tuple[int, ...]
    test: tuple[int, ...]


def whole_image_embeddings(encoder: Encoder, images: Iterable[Image]) -> NDArray[np.float32]:
    """Unit vectors (n, d) of images (H, W, C) as a whole."""
    return np.stack([_embedded(encoder, image) for image in images])


def _embedded(encoder: Encoder, image: Image) -> NDArray[np.float32]:
    small = resize_image(image.astype(np.float32) / np.float32(255), (VIEWED, VIEWED)).clip(0, 1)
    pixels = np.broadcast_to(small, (VIEWED, VIEWED, 3)).transpose(2, 0, 1).copy()
    return np.asarray(encoder(torch.from_numpy(pixels)[None])[0].cpu().numpy())


def groups(
    patients: Sequence[str | None], embeddings: NDArray[np.float32], near_duplicate: float
) -> list[int]:  # fmt: skip
    """A number for each case's group: cases of one patient, or with nearly the same picture, are in one, and so is who
    is in a group with either. ``embeddings``: unit vectors (n, d) of the whole images; ``near_duplicate``: their cosine
    similarity from which two count as one."""
    alike = embeddings @ embeddings.T >= near_duplicate
    names = np.array([patient if patient is not None else f"\0{n}" for n, patient in enumerate(patients)])
    _, found = connected_components(csr_array(alike | (names[:, None] == names[None, :])), directed=False)
    return [int(group) for group in found]


def draw(group_of: Sequence[int], train: int, extra: int, test: int, seed: int) -> Draw:
    """``train`` cases of as many groups, ``extra`` of further groups, and at most ``test`` cases of the groups that are
    left, one of each before the second of any. Raises ``ValueError`` where there are too few groups."""
    numbers = sorted(set(group_of), key=lambda group: derive(seed, "group", group))
    if min(train, extra) < 0 or len(numbers) <= train + extra:
        raise ValueError(f"{len(numbers)} groups of cases; {train + extra} are to train and at least one to test")
    members = {group: [i for i, own in enumerate(group_of) if own == group] for group in numbers}
    first = [members[group][derive(seed, "member", group) % len(members[group])] for group in numbers]
    turns = zip_longest(*(members[group] for group in numbers[train + extra :]))
    rest = [i for turn in turns for i in turn if i is not None]
    return Draw(tuple(first[:train]), tuple(first[train : train + extra]), tuple(rest[:test]))


def folds(group_of: Sequence[int], count: int, seed: int) -> list[tuple[int, ...]]:
    """The cases in ``count`` parts of about the same size, whole groups in each. Raises ``ValueError`` where there are
    fewer groups than parts."""
    numbers = sorted(set(group_of), key=lambda group: derive(seed, "group", group))
    if len(numbers) < count:
        raise ValueError(f"{len(numbers)} groups of cases cannot be cut into {count} parts")
    part_of = {group: place % count for place, group in enumerate(numbers)}
    return [tuple(i for i, group in enumerate(group_of) if part_of[group] == part) for part in range(count)]
