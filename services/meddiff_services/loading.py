"""What a worker loads, once a process: foundations, fine-tuned models, encoders; and the fingerprint it runs under."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import diffusers
import numpy as np
import PIL
import scipy
import torch
import transformers
from meddiff import __version__
from meddiff.contracts.problems import ProblemError
from meddiff.contracts.recipes import FoundationChoice, Quality, Recipe
from meddiff.contracts.tasks import Marker
from meddiff.metrics import MODEL_LOADS
from meddiff.science import encoders
from meddiff.science import foundation as foundations
from meddiff.science.foundation import Foundation
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore, StoreRefused
from prometheus_client import REGISTRY

from meddiff_services.gpu import Gpus

if torch.cuda.is_available():
    REGISTRY.register(Gpus())
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

T = TypeVar("T")

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device(settings: Settings) -> torch.device:
    """The device tasks run on: the setting, or the first GPU where there is one. On a GPU the same task gives the same
    bytes as far as its kernels allow."""
    chosen = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device("cuda:0" if chosen == "cuda" else chosen)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    return where


def fingerprint(recipe: Recipe, settings: Settings) -> dict[str, str]:
    """Under which equal requests give equal bytes: software versions, device class, number format."""
    where = device(settings)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "meddiff": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "pillow": PIL.__version__,
        "device": f"{where.type}: {name}",
        "dtype": recipe.foundation.dtype,
    }


def merged_fingerprint(markers: Iterable[Marker]) -> dict[str, str]:
    """The fingerprints of the workers that ended the tasks; where several differ, all of their values. What a former
    version did not tell is ``unknown``."""
    found: list[dict[str, str]] = [marker.output.get("fingerprint", {}) for marker in markers]
    names = dict.fromkeys(name for one in [{"meddiff": ""}, *found] for name in one)
    return {name: " | ".join(sorted({one.get(name, "unknown") for one in found})) for name in names}


def fetch_folder(store: ObjectStore, prefix: str, folder: Path, last: str) -> Path:
    """The objects under ``prefix`` as files under ``folder``; ``last``, the file whose presence says all are there."""
    if not (folder / last).exists():
        names = [key[len(prefix) :] for key in store.list(prefix)]
        for name in sorted(names, key=lambda n: n == last):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            store.download_file(prefix + name, target)
    return folder


def resolve(source: str, settings: Settings, store: ObjectStore, last: str) -> str:
    """``source`` of a foundation or encoder as what ``from_pretrained`` takes: ``builtin``, a folder, or a hub id.

    ``last`` is a file that every such folder has. A folder of that name under ``settings.model_root`` stands in for a
    hub id. Raises ``ProblemError`` for a folder outside it and for a source that is not there.
    """
    if source == "builtin":
        return source
    if source.startswith("s3://"):
        bucket, _, prefix = source.removeprefix("s3://").partition("/")
        if bucket not in settings.s3_models:
            raise ProblemError("source-refused", "the recipe's foundation lies in a bucket that the operator names not")
        if ".." in prefix.split("/"):
            raise ProblemError("source-refused", "the recipe names a prefix that leaves its bucket")
        folder = settings.scratch / "foundations" / bucket / prefix.strip("/")
        try:
            return str(fetch_folder(store.of_bucket(bucket), prefix.rstrip("/") + "/", folder, last))
        except StoreRefused as error:
            raise ProblemError("source-unreachable", f"the recipe's {source} cannot be read: {error}") from None
    if settings.model_root is not None:
        folder = (settings.model_root / source).resolve()
        if folder.is_relative_to(settings.model_root.resolve()) and folder.is_dir():
            return str(folder)
    if not HUB_ID.fullmatch(source) or Path(source).exists():
        raise ProblemError("source-refused", "the recipe names a folder outside the operator's model root")
    return source


def load_foundation(choice: FoundationChoice, settings: Settings, store: ObjectStore) -> Foundation:
    """The recipe's foundation, fresh: training may change it."""
    source, where = resolve(choice.source, settings, store, "model_index.json"), device(settings)
    try:
        return foundations.load(source, DTYPES[choice.dtype], where)
    except (OSError, ValueError) as error:
        raise ProblemError("source-unreachable", f"the foundation {choice.source} cannot be loaded") from error


@lru_cache(maxsize=2)
def _model(folder: Path, unet_folder: Path | None, dtype: torch.dtype, where: torch.device) -> Foundation:
    return foundations.load(folder, dtype, where, unet_folder)


def load_model(folder: Path, recipe: Recipe, settings: Settings, unet: str = "unet") -> Foundation:
    """The fine-tuned model in ``folder`` with the U-Net of that name, kept for the next task."""
    other = folder / unet if unet != "unet" else None
    return _counted(_model, folder, other, DTYPES[recipe.foundation.dtype], device(settings))


@lru_cache(maxsize=2)
def _encoder(kind: str, source: str, where: torch.device) -> encoders.Encoder:
    return encoders.load_encoder(kind, source, where)


def load_encoder(quality: Quality, settings: Settings, store: ObjectStore) -> encoders.Encoder:
    """The recipe's encoder, kept for the next task."""
    source, where = resolve(quality.encoder_source, settings, store, "config.json"), device(settings)
    try:
        return _counted(_encoder, quality.encoder, source, where)
    except (OSError, ValueError) as error:
        raise ProblemError("source-unreachable", f"the encoder {quality.encoder_source} cannot be loaded") from error


def _counted(load: Callable[..., T], *what: object) -> T:
    """What ``load`` gives, counted by whether its cache had it."""
    before = load.cache_info().hits  # type: ignore[attr-defined]
    found = load(*what)
    MODEL_LOADS.labels("hit" if load.cache_info().hits > before else "miss").inc()  # type: ignore[attr-defined]
    return found
