"""Which emoji the world has, and by which names: those that names and eyes can tell apart.

The rule (ours). A name is the shortest of the emoji's short names that has letters alone, three at
least, else Unicode's, in lower case; it has at most three words and none that a caption needs for
itself, and no other emoji bears it. Oldest first (best known), an emoji is taken if its picture is
at least APART from every one taken before, until there are enough. Skin tones and most
variants by sex or hair go that way, and so do clock faces, moons and flags that look alike.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from calib.emoji.art import Entry, read_entries, read_picture

COUNT = 1000
# Root of the mean squared difference of two pictures of 32 x 32 pixels, colours from 0 to 1, the
# mean of that on white and on black.
APART = 0.15
WORDS = 3  # of a name
RESERVED = frozenset(
    "left right above below on twice three times background draw show me picture".split()
)


@dataclass(frozen=True)
class Emoji:
    """One emoji of the world."""

    name: str
    category: str


@dataclass(frozen=True)
class Catalogue:
    """The world's emoji in their order, and their pictures.

    large: uint8 [N, 64, 64, 4], small: uint8 [N, 32, 32, 4], red, green, blue and cover.
    """

    emoji: tuple[Emoji, ...]
    large: np.ndarray
    small: np.ndarray

    @cached_property
    def index(self) -> dict[str, int]:
        """Place of every name."""
        return {one.name: i for i, one in enumerate(self.emoji)}


def name_of(entry: Entry) -> str | None:
    """The caption's name of an emoji, or None where it has none that fits the rule."""
    good = [s for s in entry.short_names if re.fullmatch(r"[a-z_-]{3,}", s)]
    # A flag's short name is its country's code.
    good = [s for s in good if not s.startswith("flag-")] if entry.category != "Flags" else []
    for text in sorted(good, key=len)[:1] or [entry.name]:
        words = re.sub(r"[_\-’'.&:,]+", " ", text.lower()).split()
        if 1 <= len(words) <= WORDS and all(word.isascii() and word.isalpha() for word in words):
            return None if RESERVED & set(words) else " ".join(words)
    return None


@lru_cache(maxsize=4)
def catalogue(folder: Path, count: int = COUNT) -> Catalogue:
    """The first `count` emoji of a folder of pictures that pass the rule.

    ValueError where there are fewer than two.
    """
    named = [(name, entry) for entry in read_entries(folder) if (name := name_of(entry))]
    often = Counter(name for name, _ in named)
    named = sorted(
        ((name, entry) for name, entry in named if often[name] == 1),
        key=lambda pair: (pair[1].age, pair[1].order),
    )
    large = np.stack([read_picture(entry.image) for _, entry in named]) if named else np.empty(0)
    taken: list[int] = []
    if len(named):
        small = halved(large)
        looks = _looks(small)
        squares = (looks * looks).sum(1)
        for i in range(len(named)):
            if len(taken) == count:
                break
            products = looks[taken] @ looks[i]
            away = squares[taken] + squares[i] - 2 * products
            if (away >= APART**2).all():
                taken.append(i)
    if len(taken) < 2:
        raise ValueError(f"{folder} has {len(taken)} emoji that the rule takes, expected two")
    emoji = tuple(Emoji(named[i][0], named[i][1].category) for i in taken)
    return Catalogue(emoji, large[taken], small[taken])


def halved(pictures: np.ndarray) -> np.ndarray:
    """uint8 [N, 2S, 2S, 4] at half the side, uint8 [N, S, S, 4]; colours weighted by cover."""
    n, side = len(pictures), pictures.shape[1] // 2
    parts = pictures.reshape(n, side, 2, side, 2, 4).astype(np.float32)
    cover = parts[..., 3:]
    total = cover.sum((2, 4))
    colours = (parts[..., :3] * cover).sum((2, 4)) / np.maximum(total, 1)
    return np.concatenate([colours, total / 4], -1).round().astype(np.uint8)


def _looks(small: np.ndarray) -> np.ndarray:
    """Pictures on white and on black, a row each, scaled so that squared distances are means."""
    x = small.astype(np.float32) / 255
    black = x[..., :3] * x[..., 3:]
    white = black + 1 - x[..., 3:]
    rows = np.stack([black, white], 1).reshape(len(x), -1)
    return rows / np.float32(np.sqrt(rows.shape[1]))
