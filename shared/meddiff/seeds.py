"""Randomness belongs to the candidate and the training step: a seed is a hash of what it is for."""

from __future__ import annotations

import hashlib


def derive(*parts: str | int) -> int:
    """A 63-bit seed from its path, e.g. ``derive(job_seed, "noise", index)``: the same on every machine."""
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
