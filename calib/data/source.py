"""A source of training data: named shards of samples that are read when asked for, one by one.

A source is a record of plain functions; `calib.data.option` says which one a word of the user
means. Only the order of the rows in a shard is fixed; `calib.data.shuffle` shuffles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

UNREADABLE = (OSError, ValueError)  # what reading a sample may raise: the sample is at fault
MARK = "\ufeff"  # of byte order, which editors put before a text; no part of it
LARGEST = 256 << 20  # bytes of a picture's file (ours); more is no picture


class Damaged(ValueError):
    """The bytes of a sample are there and are no picture."""


@dataclass(frozen=True)
class Pair:
    """The files of an edit: the picture after, the one before, and where it may differ (a mask,
    white there) if the data say so."""

    after: bytes
    before: bytes
    mask: bytes | None = None


Files = bytes | Pair  # of a sample: a picture's, or an edit's


@dataclass(frozen=True)
class Sample:
    """One row. key: where it lies, for messages; read() -> (file of the picture, caption), of a
    source of pairs (Pair, instruction).

    `read` raises one of UNREADABLE, in a sentence, where the picture or the caption is missing. The
    bytes are empty where a source has prompts alone.
    """

    key: str
    read: Callable[[], tuple[Files, str]]


@dataclass(frozen=True)
class Source:
    """name: as the user wrote it; shards: their names, in an order that is the same in every run.

    rows(shard, first): the samples of a shard from row number `first` on, always in one order;
    length(shard): how many a shard has. Memory is bounded by what the caller keeps.
    """

    name: str
    shards: tuple[str, ...]
    rows: Callable[[str, int], Iterator[Sample]]
    length: Callable[[str], int]
    pictures: bool = True  # False: prompts alone
    single: bool = False  # True: every shard is one sample
    pairs: bool = False  # True: pictures before and after, with instructions

    @property
    def digest(self) -> str:
        """SHA-256 of the shards' names: a resumed run must find the same."""
        return hashlib.sha256("\n".join(self.shards).encode()).hexdigest()


def checked_pair(
    before: bytes | None, after: bytes | None, mask: bytes | None, caption: object
) -> tuple[Pair, str]:
    """(pair, instruction) of a sample; ValueError where one is missing, empty or no such thing."""
    for name, data in (("before", before), ("after", after)):
        if not data:
            raise ValueError(f"the picture {name} is missing or empty")
    assert before is not None and after is not None
    return Pair(after, before, mask or None), checked(after, caption)[1]


def checked(data: bytes, caption: object) -> tuple[bytes, str]:
    """(picture, caption) of a sample; ValueError where either is empty or no such thing.

    Of several captions the first is taken.
    """
    if isinstance(caption, (list, tuple)):
        caption = caption[0] if caption else ""
    if not data:
        raise ValueError("the picture's file is empty")
    words = caption.removeprefix(MARK).split() if isinstance(caption, str) else []
    if not words:
        raise ValueError("the caption is missing or empty")
    return data, " ".join(words)
