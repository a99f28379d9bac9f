"""Where the real datasets are, and small files made with Pillow."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TENANT = "radiology"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """RGB noise of (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def patch(size: tuple[int, int] = (48, 32), value: int = 255) -> Image.Image:
    """A grey mask of (width, height) with a rectangle of ``value`` in it."""
    values = np.zeros((size[1], size[0]), np.uint8)
    values[8:20, 10:30] = value
    return Image.fromarray(values)


def photo(seed: int = 0, size: tuple[int, int] = (48, 32)) -> bytes:
    return encoded(noise(seed, size))


def mask(size: tuple[int, int] = (48, 32)) -> bytes:
    return encoded(patch(size))


def pairs(count: int = 3) -> dict[str, bytes]:
    """A faultless dataset in the layout ``pairs``."""
    files = {f"images/{n}.png": photo(n) for n in range(count)}
    return files | {f"masks/{n}.png": mask() for n in range(count)}


def write_folder(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(files: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path
