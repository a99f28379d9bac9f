"""Where a dataset comes from: a folder, an archive or an S3 prefix, each read as a mapping of paths to bytes."""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
import tempfile
import zipfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote

from meddiff.contracts.problems import Fault, ProblemError
from meddiff.layouts import is_text, relevant
from meddiff.settings import Settings
from meddiff.store.objects import NotFound, ObjectStore, StoreRefused

MAX_FILES = 100_000
MAX_FILE_BYTES = 256 * 2**20
MAX_UNPACKED_BYTES = 32 * 2**30
MAX_RATIO = 100
RATIO_COUNTS_FROM = 64 * 2**20

_DATASET_ID = re.compile(r"^ds_[0-9a-f]{32}$")


class UnreadableFile(OSError):
    """One file of a source cannot be read; its text tells the user why."""


class Source(Mapping[str, bytes]):
    """The files of a dataset, read on access: relative POSIX path -> content, sorted, without junk.

    Reading a file raises ``UnreadableFile`` where that file is damaged or too large, and ``ProblemError`` where the
    whole source is gone.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = dict.fromkeys(relevant(paths))
        unnamed = [Fault(pointer=path, detail="its name is not UTF-8") for path in self._paths if not is_text(path)]
        if unnamed:
            raise ProblemError("invalid-dataset", "names of files that cannot be read", sorted_faults(unnamed))
        if len(self._paths) > MAX_FILES:
            raise ProblemError("invalid-dataset", f"more than {MAX_FILES} files")

    @abstractmethod
    def _read(self, path: str) -> bytes:
        """The content of one of the paths."""

    def __getitem__(self, path: str) -> bytes:
        if path not in self._paths:
            raise KeyError(path)
        return self._read(path)

    def __contains__(self, path: object) -> bool:
        return path in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class Folder(Source):
    """A folder and what lies below it. No file may lie, through links, outside ``root``; linked folders are refused."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder, self._root = folder, root.resolve()
        files: list[str] = []
        faults: list[Fault] = []
        closed: list[OSError] = []
        for parent, folders, names in os.walk(folder, onerror=closed.append):
            files_here = set(names)
            for name in folders + names:
                path = Path(parent, name)
                relative = path.relative_to(folder).as_posix()
                if not relevant([relative]):
                    continue
                if _circular(path):
                    faults.append(Fault(pointer=relative, detail="a link that leads to itself"))
                elif not path.resolve().is_relative_to(self._root):
                    faults.append(Fault(pointer=relative, detail="a link that leaves the folder"))
                elif path.is_symlink() and path.is_dir():
                    faults.append(Fault(pointer=relative, detail="a link to a folder"))
                elif name in files_here:
                    files.append(relative)
        if closed:
            unread = [
                Fault(pointer=_below(folder, error), detail=f"cannot be read: {error.strerror}") for error in closed
            ]
            raise ProblemError("source-unreachable", "folders that cannot be read", sorted_faults(unread))
        if faults:
            raise ProblemError(
                "source-refused", "links in the folder lead where nothing may be read", sorted_faults(faults)
            )
        super().__init__(files)

    def _read(self, path: str) -> bytes:
        file = (self._folder / path).resolve()
        try:
            status = file.stat()
            if not file.is_relative_to(self._root) or not stat.S_ISREG(status.st_mode):
                raise UnreadableFile("not a regular file")
            _bound(status.st_size)
            return file.read_bytes()
        except UnreadableFile:
            raise
        except OSError as error:
            raise UnreadableFile(f"cannot be read: {error.strerror}") from None


class Archive(Source):
    """A ZIP archive, never unpacked to disk. Raises ``ProblemError`` where a member is unsafe or it is a bomb."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError):
            raise ProblemError("invalid-dataset", "not a ZIP archive, or a damaged one") from None
        members = [member for member in self._zip.infolist() if not member.is_dir()]
        faults = [Fault(pointer=m.filename, detail=detail) for m in members for detail in _unsafe(m)]
        names = [_member_name(member) for member in members]
        self._members = dict(zip(names, members, strict=True))
        faults += [
            Fault(pointer=name, detail=f"{count} members of this name")
            for name, count in Counter(names).items()
            if count > 1
        ]
        packed, unpacked = os.fstat(file.fileno()).st_size, sum(m.file_size for m in members)
        if unpacked > MAX_UNPACKED_BYTES or unpacked > max(RATIO_COUNTS_FROM, MAX_RATIO * packed):
            faults.append(Fault(pointer="/", detail=f"{packed} bytes would unpack to {unpacked}: an archive bomb"))
        if faults:
            raise ProblemError("invalid-dataset", "the archive is not safe to read", sorted_faults(faults))
        super().__init__(self._members)

    def _read(self, path: str) -> bytes:
        member = self._members[path]
        _bound(member.file_size)
        try:
            return self._zip.read(member)
        except Exception:  # Each compression method has its own way to fail on damaged bytes.
            raise UnreadableFile("damaged within the archive") from None


class Objects(Source):
    """The objects under a prefix of an S3 bucket."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        with _reaching():
            keys = list(itertools.islice(store.list(prefix), MAX_FILES + 1))
        if not keys:
            raise ProblemError("source-unreachable", "nothing lies under that prefix", [_uri_fault("no object there")])
        super().__init__(key.removeprefix(prefix) for key in keys if not key.endswith("/"))

    def _read(self, path: str) -> bytes:
        key = self._prefix + path
        with _reaching():
            try:
                _bound(self._store.size(key))
                return self._store.get(key)
            except NotFound:
                raise UnreadableFile("gone since the listing") from None


@dataclass(frozen=True)
class BucketPath:
    """What an ``s3://`` URI names: an archive where it ends in ``.zip``, else a prefix."""

    bucket: str
    key: str


def is_dataset_id(uri: str) -> bool:
    """Whether a ``dataset_uri`` names a dataset that the service holds already."""
    return _DATASET_ID.match(uri) is not None


def check_uri(uri: str, settings: Settings, tenant: str) -> None:
    """Return where ``uri`` is a dataset id or ``tenant`` may read it; nothing is opened. Raises as ``locate`` does."""
    if not is_dataset_id(uri):
        locate(uri, settings, tenant)


def locate(uri: str, settings: Settings, tenant: str) -> Path | BucketPath:
    """What ``uri`` names. Raises ``ProblemError`` ``invalid-request`` for a URI of no known form and ``source-refused``
    for what the operator has not named for this tenant: another folder, another bucket, the service's own bucket."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme.lower() == "s3":
        return _locate_objects(rest, settings, tenant)
    if separator and scheme.lower() == "file":
        return _locate_folder(rest, settings.file_roots.get(tenant, ()))
    raise _invalid("expected s3://bucket/prefix, s3://bucket/archive.zip, file:///folder or a dataset id")


@contextmanager
def open_source(uri: str, settings: Settings, store: ObjectStore, tenant: str) -> Iterator[Source]:
    """The dataset at ``uri``, open for reading. Raises ``ProblemError`` as ``locate`` does, ``source-unreachable``
    where nothing can be read there, ``too-large`` and ``invalid-dataset`` for an archive that is refused."""
    place = locate(uri, settings, tenant)
    if isinstance(place, BucketPath):
        bucket = store.of_bucket(place.bucket)
        if place.key.lower().endswith(".zip"):
            with _downloaded(bucket, place.key, settings.max_upload_bytes) as file:
                yield Archive(file)
        else:
            yield Objects(bucket, place.key.rstrip("/") + "/" if place.key.strip("/") else "")
    elif _is_folder(place):
        yield Folder(place, _root_of(place, settings.file_roots.get(tenant, ())))
    else:
        with open_archive(place) as archive:
            yield archive


@contextmanager
def open_archive(path: Path) -> Iterator[Source]:
    """The ZIP archive at ``path``, open for reading. Raises ``ProblemError`` ``invalid-dataset``, and
    ``source-unreachable`` where it may not be read."""
    try:
        file = path.open("rb")
    except OSError as error:
        detail = f"cannot be read: {error.strerror}"
        raise ProblemError("source-unreachable", "the archive cannot be read", [_uri_fault(detail)]) from None
    with file:
        yield Archive(file)


def sorted_faults(faults: Iterable[Fault]) -> list[Fault]:
    """The faults in order of file name, for one answer that is always the same."""
    return sorted(faults, key=lambda fault: (fault.pointer, fault.detail))


def _locate_objects(rest: str, settings: Settings, tenant: str) -> BucketPath:
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise _invalid("no bucket is named")
    if {".", ".."} & set(key.split("/")):
        raise _invalid("a key has no . and no .. in it")
    if bucket == settings.s3_bucket:
        raise ProblemError("source-refused", "the service's own bucket is not a source", [_uri_fault("own bucket")])
    if not any(_lies_in(f"{bucket}/{key}", source) for source in settings.s3_sources.get(tenant, ())):
        detail = "the operator has not named that bucket or prefix as a source"
        raise ProblemError("source-refused", detail, [_uri_fault(detail)])
    return BucketPath(bucket, key)


def _lies_in(path: str, source: str) -> bool:
    """Whether ``bucket/key`` is what ``source`` names, a bucket or ``bucket/prefix``, or lies below it."""
    return (path + "/").startswith(source.rstrip("/") + "/")


def _locate_folder(rest: str, roots: Sequence[Path]) -> Path:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash or "\0" in unquote(path):
        raise _invalid("a file URI is file:///absolute/folder")
    if _circular(Path("/" + unquote(path))):
        raise _invalid("a link that leads to itself")
    folder = Path("/" + unquote(path)).resolve()
    _root_of(folder, roots)
    return folder


def _root_of(folder: Path, roots: Sequence[Path]) -> Path:
    """The operator's root that ``folder``, its links resolved, lies under."""
    for root in roots:
        if folder.is_relative_to(root.resolve()):
            return root
    detail = "the operator has not named a root that holds this folder"
    raise ProblemError("source-refused", detail, [_uri_fault(detail)])


def _is_folder(place: Path) -> bool:
    """Else it is a file. Raises ``ProblemError`` for what is neither, or is not there."""
    try:
        mode = place.stat().st_mode
    except OSError as error:
        mode, detail = 0, f"cannot be read: {error.strerror}"
        if error.errno == errno.ENOENT:
            detail = "does not exist"
    else:
        detail = "neither a folder nor a file"
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise ProblemError("source-unreachable", "there is no such folder or archive", [_uri_fault(detail)])
    return stat.S_ISDIR(mode)


def _below(folder: Path, error: OSError) -> str:
    return Path(str(error.filename)).relative_to(folder).as_posix()


@contextmanager
def _downloaded(bucket: ObjectStore, key: str, limit: int) -> Iterator[IO[bytes]]:
    """The object as a file of at most ``limit`` bytes without a name: nothing is left of it, however this ends."""
    with tempfile.TemporaryFile() as file:
        with _reaching():
            try:
                if bucket.size(key) > limit:
                    raise ProblemError("too-large", f"the archive has more than {limit} bytes; name a prefix instead")
                bucket.download(key, file)
            except NotFound:
                detail = "there is no such archive"
                raise ProblemError("source-unreachable", detail, [_uri_fault(detail)]) from None
        yield file


def _member_name(member: zipfile.ZipInfo) -> str:
    """The member's path in POSIX writing, without a leading ``./``."""
    return member.filename.replace("\\", "/").removeprefix("./")


def _circular(path: Path) -> bool:
    try:
        path.resolve()
    except (OSError, RuntimeError):
        return True
    return False


def _unsafe(member: zipfile.ZipInfo) -> Iterator[str]:
    name = _member_name(member)
    if name.startswith("/") or re.match(r"^[A-Za-z]:", name) or ".." in PurePosixPath(name).parts:
        yield "its path leaves the archive"
    if stat.S_ISLNK(member.external_attr >> 16):
        yield "a symbolic link"
    if member.flag_bits & 0x1:
        yield "encrypted"


def _bound(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise UnreadableFile(f"{size} bytes; a file may have {MAX_FILE_BYTES}")


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except StoreRefused as error:
        raise ProblemError(
            "source-unreachable", f"the bucket cannot be read: {error}", [_uri_fault(str(error))]
        ) from None


def _uri_fault(detail: str) -> Fault:
    return Fault(pointer="/dataset_uri", detail=detail)


def _invalid(detail: str) -> ProblemError:
    return ProblemError("invalid-request", f"dataset_uri: {detail}", [_uri_fault(detail)])
