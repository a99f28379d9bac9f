"""What a worker loads, once a process: foundations, fine-tuned models, encoders; and the fingerprint it runs under."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import diffusers
import torch
import transformers
from meddiff import __version__
from meddiff.contracts.problems import ProblemError
from meddiff.contracts.recipes import FoundationChoice, Quality, Recipe
from meddiff.science import encoders
from meddiff.science import foundation as foundations
from meddiff.science.foundation import Foundation
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device(settings: Settings) -> torch.device:
    """The device tasks run on: the setting, or the first GPU where there is one."""
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
        "device": f"{where.type}: {name}",
        "dtype": recipe.foundation.dtype,
    }


def fetch_folder(store: ObjectStore, prefix: str, folder: Path, last: str) -> Path:
    """The objects under ``prefix`` as files under ``folder``; ``last``, the file whose presence says all are there."""
    if not (folder / last).exists():
        names = [key[len(prefix) :] for key in store.list(prefix)]
        for name in sorted(names, key=lambda n: n == last):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            store.download_file(prefix + name, target)
    return folder


def resolve(source: str, settings: Settings, store: ObjectStore) -> str:
    """``source`` of a foundation or encoder as what ``from_pretrained`` takes: ``builtin``, a folder, or a hub id.

    A folder of that name under ``settings.model_root`` stands in for a hub id. Raises ``ProblemError`` for a folder
    outside it and for a source that is not there.
    """
    if source == "builtin":
        return source
    if source.startswith("s3://"):
        bucket, _, prefix = source.removeprefix("s3://").partition("/")
        if bucket not in settings.s3_sources:
            raise ProblemError("source-refused", "the recipe's foundation lies in a bucket that is not a named source")
        folder = settings.scratch / "foundations" / bucket / prefix.strip("/")
        return str(fetch_folder(store.of_bucket(bucket), prefix.rstrip("/") + "/", folder, "model_index.json"))
    if settings.model_root is not None:
        folder = (settings.model_root / source).resolve()
        if folder.is_relative_to(settings.model_root.resolve()) and folder.is_dir():
            return str(folder)
    if source.startswith("/"):
        raise ProblemError("source-refused", "the recipe names a folder outside the operator's model root")
    return source


def load_foundation(choice: FoundationChoice, settings: Settings, store: ObjectStore) -> Foundation:
    """The recipe's foundation, fresh: training may change it."""
    source = resolve(choice.source, settings, store)
    try:
        return foundations.load(source, DTYPES[choice.dtype], device(settings))
    except OSError as error:
        raise ProblemError("source-unreachable", f"the foundation {choice.source} cannot be loaded") from error


@lru_cache(maxsize=2)
def _model(folder: Path, unet_folder: Path | None, dtype: torch.dtype, where: torch.device) -> Foundation:
    return foundations.load(folder, dtype, where, unet_folder)


def load_model(folder: Path, recipe: Recipe, settings: Settings, unet: str = "unet") -> Foundation:
    """The fine-tuned model in ``folder`` with the U-Net of that name, kept for the next task."""
    other = folder / unet if unet != "unet" else None
    return _model(folder, other, DTYPES[recipe.foundation.dtype], device(settings))


@lru_cache(maxsize=2)
def _encoder(kind: str, source: str, where: torch.device) -> encoders.Encoder:
    return encoders.load_encoder(kind, source, where)


def load_encoder(quality: Quality, settings: Settings, store: ObjectStore) -> encoders.Encoder:
    """The recipe's encoder, kept for the next task."""
    try:
        return _encoder(quality.encoder, resolve(quality.encoder_source, settings, store), device(settings))
    except OSError as error:
        raise ProblemError("source-unreachable", f"the encoder {quality.encoder_source} cannot be loaded") from error
