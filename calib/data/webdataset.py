"""WebDataset shards: tar files of pictures and captions, `KEY.jpg` beside `KEY.txt` or `KEY.json`.

Pairs for models that edit are `KEY.before.png`, `KEY.after.png` (or `KEY.png`), the instruction as
a caption, and maybe `KEY.mask.png`.

Read with the standard library, headers first: a sample is an offset into its file, so that a run
goes on in the middle of a shard without reading what lies before, a window of samples holds no
pictures, and nothing is decoded but pictures, text and JSON. (The webdataset library streams: it
cannot start in the middle, its decoders unpickle `.pyd` and `.pth`, and `pipe:` names run a shell.)
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from calib.data.folder import AFTER, BEFORE, MASK, caption_in
from calib.data.pixels import ENDINGS
from calib.data.source import LARGEST, Files, Sample, Source, checked, checked_pair

TEXTS = (".txt", ".text", ".caption")
Part = tuple[int, int]  # offset and size in bytes
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(pattern: str) -> list[str]:
    """`train-{000..002}.tar` or `{a,b}.tar` -> the names it stands for; several braces multiply."""
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    if numbers := _RANGE.fullmatch(found[1]):
        low, high = numbers.groups()
        values = [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
    else:
        values = found[1].split(",")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return list(chain.from_iterable(expand(head + value + tail) for value in values))


def shards_of(pattern: str) -> list[str]:
    """The tar files that a path, a folder, a glob or a brace pattern names.

    FileNotFoundError names the first that is missing, ValueError compressed ones.
    """
    if Path(pattern).is_dir():
        files = sorted(str(path) for path in Path(pattern).glob("*.tar"))
    else:
        names = expand(pattern)
        files = [f for n in names for f in (sorted(glob.glob(n)) if glob.has_magic(n) else [n])]
    for name in files:
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"the shard {name} of --data {pattern} is missing; check the pattern's numbers."
            )
        if not name.endswith(".tar"):
            raise ValueError(
                f"the shard {name} is no .tar file; expected uncompressed tar files (gunzip "
                "those that are not), since samples are read by their offset."
            )
    if not files:
        raise FileNotFoundError(f"no file matches --data {pattern}; check the pattern.")
    return files


def tar_source(pattern: str, columns: tuple[str, str] | None = None) -> Source:
    """The samples of all shards. columns: file endings of the picture, and of the caption (or the
    field of a .json that holds it)."""

    def rows(shard: str, first: int) -> Iterator[Sample]:
        samples = members(shard)
        for number in range(first, len(samples)):
            key, parts = samples[number]
            yield Sample(f"{shard}:{key}", lambda parts=parts: read(shard, parts, columns))  # type: ignore[misc]

    shards = tuple(shards_of(pattern))
    first = members(shards[0])
    pairs = bool(first) and any(end.startswith(BEFORE + ".") for end in first[0][1])
    read = _edit if pairs else _sample
    return Source(pattern, shards, rows, lambda shard: len(members(shard)), pairs=pairs)


@lru_cache(maxsize=4)
def members(path: str) -> list[tuple[str, dict[str, Part]]]:
    """The samples of a shard in their order: (key, {ending: place}). Reads headers alone.

    Files of one key stand together. Links, devices and folders are passed over. Where the file
    ends too early, a last sample without parts stands for what is lost.
    """
    samples: list[tuple[str, dict[str, Part]]] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined] # or it would keep them all
                folder, _, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if not member.isreg() or not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                samples[-1][1]["." + ending.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        samples.append((f"end of the file ({error})", {}))
    return samples


def _sample(
    shard: str, parts: dict[str, Part], columns: tuple[str, str] | None
) -> tuple[Files, str]:
    """(picture, caption) at these places of a shard."""
    endings = (f".{columns[0].lstrip('.')}",) if columns else ENDINGS
    image = next((part for end, part in parts.items() if end.endswith(endings)), None)
    if image is None:
        raise ValueError(f"there is no picture, only {', '.join(parts) or 'nothing'}")
    return checked(_bytes(shard, image), _caption(shard, parts, columns))


def _edit(shard: str, parts: dict[str, Part], columns: tuple[str, str] | None) -> tuple[Files, str]:
    """(pair, instruction) at these places of a shard."""

    def beside(*names: str) -> bytes | None:
        ends = (name + ending for name in names for ending in ENDINGS)
        found = next((parts[end] for end in ends if end in parts), None)
        return _bytes(shard, found) if found else None

    caption = _caption(shard, parts, columns)
    return checked_pair(beside(BEFORE), beside(AFTER, ""), beside(MASK), caption)


def _caption(shard: str, parts: dict[str, Part], columns: tuple[str, str] | None) -> object:
    """The caption at these places of a shard, None where there is none."""
    texts = (f".{columns[1].lstrip('.')}", *TEXTS) if columns else TEXTS
    caption: object = None
    if text := next((parts[end] for end in texts if end in parts), None):
        caption = _bytes(shard, text).decode("utf-8")
    elif fields := parts.get(".json"):
        row: Any = json.loads(_bytes(shard, fields))
        caption = caption_in(row, columns) if isinstance(row, dict) else None
    return caption


def _bytes(path: str, part: Part) -> bytes:
    offset, size = part
    if size > LARGEST:
        raise ValueError(f"a file has {size} bytes, more than {LARGEST}")
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError(f"the shard ends {size - len(data)} bytes too early")
    return data
