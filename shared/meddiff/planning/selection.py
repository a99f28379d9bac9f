"""Which candidates a generate job delivers: a pure fold over its scored shards, in index order."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from meddiff import signatures
from meddiff.contracts.base import Contract
from meddiff.contracts.jobs import GenerateSpec
from meddiff.contracts.manifest import Pair, Reason, Rejected

PRIOR_RATE = 0.9  # The share of candidates expected to be accepted, before any is scored ...
PRIOR_WEIGHT = 16  # ... as if this many had been.


class Entry(Contract):
    """One candidate in the ``candidates`` of a quality marker: why it was turned away, or ``None``; its shape's
    signature; and what the manifest will say of it, as a pair or as a rejected one."""

    index: int
    reason: Reason | None
    signature: str
    pair: Pair | None = None
    rejected: Rejected | None = None


@dataclass(frozen=True)
class Tally:
    """What is known of shards [0, ``shards``): the watermark of scored shards without a gap.

    ``accepted``: indices in ascending order; ``signatures``: those of their shapes, one after the other; ``rejected``:
    (index, reason) in ascending order. Once the job's count is reached nothing more is taken in, so the tally ends
    with the N-th accepted index.
    """

    shards: int = 0
    accepted: tuple[int, ...] = ()
    signatures: bytes = b""
    rejected: tuple[tuple[int, Reason], ...] = ()

    @property
    def judged(self) -> int:
        """Candidates taken in."""
        return len(self.accepted) + len(self.rejected)

    @property
    def reasons(self) -> dict[Reason, int]:
        """How many were turned away for each reason."""
        return dict(Counter(reason for _, reason in self.rejected))

    def to_bytes(self) -> bytes:
        packed = base64.b64encode(self.signatures).decode()
        return zlib.compress(json.dumps([self.shards, self.accepted, packed, self.rejected]).encode(), level=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Tally:
        shards, accepted, packed, rejected = json.loads(zlib.decompress(data))
        rejections = tuple((index, reason) for index, reason in rejected)
        return cls(shards, tuple(accepted), base64.b64decode(packed), rejections)


@dataclass(frozen=True)
class Selection:
    """What the manifest lists: the first N accepted candidates in index order, and all that were turned away before
    the N-th. ``next_index`` is where a further job goes on."""

    accepted: tuple[Entry, ...]
    rejected: tuple[tuple[Entry, Reason], ...]
    next_index: int

    def by_reason(self) -> dict[Reason, int]:
        """How many were turned away for each reason."""
        return dict(Counter(reason for _, reason in self.rejected))


def select(entries: Sequence[Entry], spec: GenerateSpec) -> Selection:
    """The selection among ``entries`` in index order, without a gap up to the N-th accepted one."""
    judged = list(_judge(entries, b"", spec))
    return Selection(
        accepted=tuple(entry for entry, reason in judged if reason is None),
        rejected=tuple((entry, reason) for entry, reason in judged if reason is not None),
        next_index=judged[-1][0].index + 1,
    )


def fold(tally: Tally, shards: Sequence[Sequence[Entry]], spec: GenerateSpec) -> Tally:
    """``tally`` carried on over the candidates of the shards that follow it; shard by shard or all at once is the
    same, and the same as ``select`` from the beginning."""
    entries = [entry for shard in shards for entry in shard]
    judged = list(_judge(entries, tally.signatures, spec))
    accepted = [entry for entry, reason in judged if reason is None]
    return Tally(
        shards=tally.shards + len(shards),
        accepted=tally.accepted + tuple(entry.index for entry in accepted),
        signatures=tally.signatures + bytes.fromhex("".join(entry.signature for entry in accepted)),
        rejected=tally.rejected + tuple((entry.index, reason) for entry, reason in judged if reason is not None),
    )


def _judge(entries: Iterable[Entry], known: bytes, spec: GenerateSpec) -> Iterator[tuple[Entry, Reason | None]]:
    """Each entry with its reason, until as many are accepted as the job is to make, those with the ``known`` signatures
    included.

    An acceptable one whose shape overlaps that of an earlier accepted one by more than ``max_shape_iou`` is a
    ``duplicate_shape``; not where the caller gave the shapes, to be used again and again.
    """
    max_iou = spec.recipe.quality.max_shape_iou if spec.request.masks is None else 1.0
    accepted = signatures.Shapes(known)
    for entry in entries:
        if len(accepted) >= spec.request.count:
            return
        reason = entry.reason
        if reason is None:
            signature = bytes.fromhex(entry.signature)
            if max_iou < 1 and accepted.max_iou(signature) > max_iou:
                reason = "duplicate_shape"
            else:
                accepted.add(signature)
        yield entry, reason


def is_full(tally: Tally, spec: GenerateSpec) -> bool:
    """Whether as many candidates are accepted as were asked for."""
    return len(tally.accepted) >= spec.request.count


def budget(spec: GenerateSpec) -> int:
    """The number of shards that may be made before the job ends incomplete."""
    return math.ceil(spec.request.count * spec.recipe.work.attempts / spec.recipe.work.shard_size)


def wanted(tally: Tally, spec: GenerateSpec) -> int:
    """The number of shards expected to be enough: those scored, and what is missing at the observed acceptance rate,
    rounded up to whole shards and never beyond the budget."""
    missing = spec.request.count - len(tally.accepted)
    rate = (len(tally.accepted) + PRIOR_RATE * PRIOR_WEIGHT) / (tally.judged + PRIOR_WEIGHT)
    return min(budget(spec), tally.shards + math.ceil(missing / rate / spec.recipe.work.shard_size))


def indices(spec: GenerateSpec, shard: int) -> range:
    """The candidates of a shard."""
    size = spec.recipe.work.shard_size
    first = spec.request.start_index + shard * size
    return range(first, first + size)


def next_start_index(tally: Tally, spec: GenerateSpec) -> int:
    """Where a further job goes on: the index after the last candidate that counts."""
    return spec.request.start_index + tally.judged
