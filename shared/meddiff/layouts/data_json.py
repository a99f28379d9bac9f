"""``data.json``, as the authors of MedDiff-FT feed their training: image, mask and prompt of each pair."""

from __future__ import annotations

import itertools
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from meddiff.contracts.problems import Fault
from meddiff.layouts.base import Files, Layout, Listing, RawCase, is_text

_NAMES = frozenset({"data.json", "data.jsonl"})
_MASK_KEY = re.compile(r"^masks?(?:_\w+)?$")


def read(files: Files) -> Listing | None:
    """Cases of JSON lines, an array of objects, or the authors' one object of columns.

    Each has ``image``, ``mask`` (or ``mask_1``, ``mask_2`` …, merged) and, if wanted, ``prompt`` and ``patient``.
    A path counts from the file's own folder; where nothing lies there (the authors' begin with ``../data/train/``),
    leading folders are dropped until it names a file.
    """
    listings = sorted(
        (path for path in files if PurePosixPath(path).name.lower() in _NAMES), key=lambda p: (p.count("/"), p)
    )
    named: dict[str, str] = {}
    for path in listings:
        try:
            text = _text(files[path])
        except OSError as error:
            if named:
                continue
            return Listing((), (Fault(pointer=path, detail=str(error)),))
        if '"image"' in text:
            named[path] = text
    if not named:
        return None
    name = next(iter(named))
    rivals = [path for path in named if path.count("/") == name.count("/")]
    if len(rivals) > 1:
        return Listing(
            (), tuple(Fault(pointer=path, detail="one of several; name the folder of one") for path in rivals)
        )
    faults: list[Fault] = []
    cases: list[RawCase] = []
    prompts: Counter[str] = Counter()
    for place, row in _rows(named[name]):
        problems = [row] if isinstance(row, str) else list(_problems(row, name, files))
        faults += [Fault(pointer=name, detail=f"{place}: {problem}") for problem in problems]
        if isinstance(row, str) or problems:
            continue
        masks = tuple(_resolve(mask, name, files) or mask for mask in _masks(row))
        patient = row.get("patient")
        known = not (patient is None or patient != patient or str(patient).strip() == "")
        cases.append(
            RawCase(
                _resolve(row["image"], name, files) or row["image"],
                masks,
                patient=str(patient).strip() if known else None,
            )
        )
        if row.get("prompt"):
            prompts[row["prompt"]] += 1
    faults += [
        Fault(pointer=image, detail=f"named {count} times in {name}")
        for image, count in Counter(case.image for case in cases).items()
        if count > 1
    ]
    notes = (f"{len(prompts)} different prompts; the most frequent is used",) if len(prompts) > 1 else ()
    prompt = min(prompts, key=lambda p: (-prompts[p], p)) if prompts else None
    return Listing(tuple(cases), tuple(faults), notes, prompt)


def _text(content: bytes) -> str:
    """The file's text, in whichever Unicode encoding it is (RFC 4627, section 3), with or without its mark."""
    return content.decode(json.detect_encoding(content), errors="replace").removeprefix("\ufeff")


def _rows(text: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Each entry with its place, or in its stead what is wrong with it."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        yield from _lines(text)
        return
    if isinstance(whole, dict):
        yield from _columns(whole) if isinstance(whole.get("image"), list) else [("entry 1", whole)]
    else:
        for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
            yield f"entry {number}", row if isinstance(row, dict) else "not an object"


def _lines(text: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield f"line {number}", row if isinstance(row, dict) else "not a JSON object"


def _columns(table: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    columns = {key: values for key, values in table.items() if isinstance(values, list)}
    count = len(columns["image"])
    for key, values in columns.items():
        if len(values) != count:
            yield key, f"{len(values)} values beside {count} images"
            return
    constants = {key: value for key, value in table.items() if key not in columns}
    for index in range(count):
        yield f"entry {index + 1}", constants | {key: values[index] for key, values in columns.items()}


def _masks(row: dict[str, Any]) -> list[Any]:
    values = [value for key, value in sorted(row.items()) if _MASK_KEY.match(key) and value is not None]
    return [mask for value in values for mask in (value if isinstance(value, list) else [value])]


def _problems(row: dict[str, Any], name: str, files: Files) -> Iterable[str]:
    masks = _masks(row)
    if "image" not in row:
        yield "no image"
    if not masks:
        yield "no mask"
    for path in [*([row["image"]] if "image" in row else []), *masks]:
        if not isinstance(path, str):
            yield f"{path!r:.60} is not a path"
        elif _resolve(path, name, files) is None:
            yield f"{path} is not in the dataset"
    prompt, patient = row.get("prompt"), row.get("patient")
    if prompt is not None and not (isinstance(prompt, str) and is_text(prompt)):
        yield "the prompt is not text"
    if patient is not None and not isinstance(patient, str | int | float):
        yield "the patient is neither text nor a number"


def _resolve(path: str, name: str, files: Files) -> str | None:
    plain = path.replace("\\", "/")
    parts = [part for part in PurePosixPath(plain).parts if part not in ("..", ".", "/")]
    folder = PurePosixPath(name).parent
    dropped = (str(folder.joinpath(*parts[start:])) for start in range(len(parts)))
    candidates = itertools.chain([posixpath.normpath(folder / plain)], dropped)
    return next((candidate for candidate in candidates if candidate in files), None)


LAYOUT = Layout("data_json", 'data.json with lines of {"image": "…", "mask": "…", "prompt": "…"}', read)
