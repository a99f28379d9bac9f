"""Models of the hub: which of a repository's files are used, and the folder that they lie in here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

INDICES = ("model_index.json", "config.json")
"""Of a pipeline's folder, and of a single network's."""
SUFFIXES = (".safetensors", ".json", ".txt")


def used(files: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    """Of the files of a model those that are used: configurations, vocabularies, and weights as safetensors, of each
    part those in full precision where there are any. Of a pipeline its parts, not one file of them all beside them."""
    some = {name for name in files if name.suffix in SUFFIXES and name.parts[0] != "safety_checker"}
    some -= {name for name in some if "non_ema" in name.name}
    weights = {name for name in some if name.suffix == ".safetensors"}
    full = {name.parent for name in weights if ".fp16." not in name.name}
    unused = {name for name in weights if ".fp16." in name.name and name.parent in full}
    if PurePosixPath(INDICES[0]) in some:
        unused |= {name for name in weights if len(name.parts) == 1}
    return sorted(some - unused)


def variant_of(folder: Path) -> str | None:
    """``fp16`` where the weights of a part are there in half precision alone, as diffusers wants to be told."""
    names = used(PurePosixPath(path.name) for path in folder.glob("*.safetensors"))
    return "fp16" if names and all(".fp16." in name.name for name in names) else None


def download(hub_id: str) -> Path:
    """The folder with a model's ``used`` files; where the hub does not answer, refuses, or is not to be asked, what
    lies here of an earlier time. Raises ``OSError`` where there is no such model, here or there, and ``ValueError`` for
    an id that is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    there = _listed(hub_id)
    wanted = None if there is None else [str(name) for name in used(there)]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=there is None))
    except IncompleteSnapshotError as error:  # Of an earlier time, without a file that nobody may need.
        return Path(error.snapshot_path)


def _listed(hub_id: str) -> list[PurePosixPath] | None:
    """A model's files as the hub tells, or told when they were downloaded; None where neither is known."""
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError

    try:
        return [PurePosixPath(name) for name in HfApi().list_repo_files(hub_id)]
    except HFValidationError:
        raise
    except Exception:  # No answer, in the words of whatever HTTP client the hub's library has, or no good one.
        try:
            return [PurePosixPath(file.path) for file in get_cached_repo_tree(hub_id)]
        except CachedRepoTreeNotFoundError:
            return None
