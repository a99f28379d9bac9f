"""Captions of what is drawn, and a tokenizer that has a token for each of their words."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from transformers import CLIPTokenizer

LENGTH = 32
LESION = ("an image of a lesion", "a lesion", "a mass", "a nodule", "a spot", "an image")
HEALTHY = ("healthy tissue", "background", "an image of healthy tissue", "an image")
WORDS = [
    "a",
    "an",
    "image",
    "of",
    "lesion",
    "mass",
    "nodule",
    "spot",
    "healthy",
    "tissue",
    "background",
    "on",
    "soft",
    "sharp",
    "dark",
    "bright",
    "ringed",
    "skin",
    "ultrasound",
    "photo",
    "flat",
    "clouds",
    "grain",
    "stripes",
    "cells",
    "blobs",
    "gravel",
    "pigment",
    "shadow",
    "hta",
]


def lesion(rng: np.random.Generator, words: str, kind: str) -> str:
    """A caption of a drawn lesion: its own words three times of four, else a general one, now and then none."""
    chance = rng.random()
    if chance < 0.15:
        return ""
    return f"{words} spot on {kind}" if chance < 0.6 else str(rng.choice(LESION))


def healthy(rng: np.random.Generator, kind: str) -> str:
    """A caption of what is to be painted as its surroundings are."""
    chance = rng.random()
    if chance < 0.15:
        return ""
    return kind if chance < 0.4 else str(rng.choice(HEALTHY))


def tokenizer() -> CLIPTokenizer:
    """A byte-level BPE tokenizer: every byte, inside a word and at its end, and every prefix of ``WORDS``."""
    letters = _byte_letters()
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        joined = list(accumulate(pieces))
        for left, right in zip(joined, pieces[1:], strict=False):
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
        vocabulary += [piece for piece in joined if piece not in vocabulary]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    return CLIPTokenizer(vocab={token: n for n, token in enumerate(vocabulary)}, merges=pairs, model_max_length=LENGTH)


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (Radford et al., 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + n) for n in range(len(rest))]
