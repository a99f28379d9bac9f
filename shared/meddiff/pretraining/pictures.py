"""Non-medical pictures that scikit-image and scikit-learn carry in their wheels, and crops of them."""

from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from meddiff.drawing import Generator, Picture, Size, texture, to_grey

TRAINING = {
    "skimage.data": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "clock_motion.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "moon.png",
        "motorcycle_left.png",
        "page.png",
        "rocket.jpg",
        "text.png",
    ),
    "sklearn.datasets.images": ("china.jpg",),
}
HELD_OUT = {"skimage.data": ("chelsea.png", "gravel.png"), "sklearn.datasets.images": ("flower.jpg",)}


def load(names: dict[str, tuple[str, ...]]) -> list[Picture]:
    """Pictures (h, w, 3) in [0, 1] of the files named, by the package that holds them."""
    paths = [Path(str(files(package))) / name for package, group in names.items() for name in group]
    return [np.asarray(Image.open(path).convert("RGB"), np.float32) / np.float32(255) for path in paths]


def crop(rng: Generator, pictures: list[Picture], size: Size) -> Picture:
    """A random window (h, w, 3) of a random picture, shrunk by a factor between 1 and as much as the picture allows."""
    picture = pictures[int(rng.integers(len(pictures)))]
    room = min(picture.shape[0] / size[0], picture.shape[1] / size[1])
    scale = np.exp(rng.uniform(0, np.log(room)))
    h, w = int(size[0] * scale), int(size[1] * scale)
    top, left = rng.integers(picture.shape[0] - h + 1), rng.integers(picture.shape[1] - w + 1)
    window = Image.fromarray((picture[top : top + h, left : left + w] * 255).astype(np.uint8))
    return np.asarray(window.resize((size[1], size[0]), Image.Resampling.LANCZOS), np.float32) / np.float32(255)


def jitter(rng: Generator, picture: Picture) -> Picture:
    """The picture in another tint: channels shuffled or greyed, contrast, brightness and colour balance moved."""
    chance = rng.random()
    if chance < 0.2:
        picture = to_grey(picture)
    elif chance < 0.5:
        picture = picture[..., rng.permutation(3)]
    mean = picture.mean((0, 1))
    balance = rng.normal(0, 0.06, 3) if np.ptp(picture, axis=2).max() > 0.01 else 0
    moved = mean + (picture - mean) * rng.uniform(0.4, 1.2) + rng.normal(0, 0.1) + balance
    return np.clip(moved, 0, 1).astype(np.float32)


def background(rng: Generator, pictures: list[Picture], size: Size) -> tuple[Picture, str]:
    """A picture (h, w, 3) to paint on, with a word for it: mostly drawn skin and ultrasound, else anything."""
    kind = str(rng.choice(["skin", "ultrasound", "photo", "drawn"], p=[0.3, 0.25, 0.2, 0.25]))
    if kind == "photo":
        return jitter(rng, crop(rng, pictures, size)), "photo"
    if kind == "drawn":
        kind = str(rng.choice(["flat", "clouds", "grain", "stripes", "cells", "blobs", "gravel", "pigment"]))
    return texture(rng, size, kind, grey=None if kind != "skin" else rng.random() < 0.05), kind
