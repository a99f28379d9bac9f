"""The object store as a dictionary: what the planner asks of it, counted, and failing when it is told to."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import TypeVar

from meddiff.contracts.base import canonical_json
from meddiff.store.objects import NotFound, StoreUnavailable
from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)


class MemoryStore:
    """``fails``: whether this call finds the store away. ``calls``: how often it was asked."""

    def __init__(self, clock: Callable[[], float], fails: Callable[[], bool] = lambda: False) -> None:
        self._clock, self._fails = clock, fails
        self._objects: dict[str, tuple[float, bytes]] = {}
        self._keys: list[str] = []
        self.calls = 0

    def _called(self) -> None:
        self.calls += 1
        if self._fails():
            raise StoreUnavailable("away")

    def ping(self) -> None:
        self._called()

    def put(self, key: str, data: bytes, content_type: str = "") -> None:
        self._called()
        if key not in self._objects:
            insort(self._keys, key)
        self._objects[key] = (self._clock(), data)

    def put_json(self, key: str, value: BaseModel) -> None:
        self.put(key, canonical_json(value))

    def create_json(self, key: str, value: BaseModel) -> bool:
        self._called()
        if key in self._objects:
            return False
        insort(self._keys, key)
        self._objects[key] = (self._clock(), canonical_json(value))
        return True

    def get(self, key: str) -> bytes:
        self._called()
        try:
            return self._objects[key][1]
        except KeyError:
            raise NotFound(key) from None

    def get_json(self, key: str, model: type[M]) -> M:
        return model.model_validate_json(self.get(key))

    def exists(self, key: str) -> bool:
        self._called()
        return key in self._objects

    def modified(self, key: str) -> datetime:
        self._called()
        try:
            return datetime.fromtimestamp(self._objects[key][0], UTC)
        except KeyError:
            raise NotFound(key) from None

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[str]:
        """A call for each thousand keys, as S3 has it."""
        for n, key in enumerate(self._below(prefix, start_after)):
            if n % 1000 == 0:
                self._called()
            yield key
        self._called()

    def _below(self, prefix: str, start_after: str | None) -> Iterator[str]:
        place = bisect_left(self._keys, max(prefix, (start_after or "") + "\0" if start_after else prefix))
        found = []
        while place < len(self._keys) and self._keys[place].startswith(prefix):
            found.append(self._keys[place])
            place += 1
        return iter(found)

    def children(self, prefix: str) -> tuple[str, ...]:
        self._called()
        return tuple(sorted({key[len(prefix) :].partition("/")[0] for key in self._below(prefix, None)} - {""}))

    def delete(self, keys: Iterable[str]) -> None:
        self._called()
        for key in keys:
            if self._objects.pop(key, None) is not None:
                del self._keys[bisect_left(self._keys, key)]
