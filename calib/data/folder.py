"""Pictures in a folder, captions in metadata.jsonl or a .txt file beside each; and prompts alone.

`metadata.jsonl` as the imagefolder of the datasets library has it: an object a line, `file_name`
relative to the folder, and the caption under `text`, `caption` or `prompt`.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from calib.data.pixels import ENDINGS
from calib.data.source import LARGEST, Sample, Source, checked

METADATA = "metadata.jsonl"
CAPTIONS = ("text", "caption", "prompt", "captions", "description")


def single(
    name: str, keys: Sequence[str], read: Callable[[str], tuple[bytes, str]], pictures: bool = True
) -> Source:
    """A source of samples to be read one by one: each is a shard, so an epoch is one shuffle."""

    def rows(shard: str, first: int) -> Iterator[Sample]:
        if first == 0:
            yield Sample(shard, lambda: read(shard))

    return Source(name, tuple(keys), rows, lambda shard: 1, pictures, single=True)


def folder_source(path: Path, columns: tuple[str, str] | None = None) -> Source:
    """The pictures below `path`. columns: fields of metadata.jsonl for the file and the caption.

    ValueError if there are none.
    """
    if (path / METADATA).is_file():
        return _listed(path, columns)
    found = (each for each in path.rglob("*") if each.suffix.lower() in ENDINGS)
    keys = sorted(str(each.relative_to(path)) for each in found)
    if not keys:
        raise ValueError(
            f"{path} holds no picture; expected files such as a.jpg with a.txt beside, a "
            f"{METADATA}, .tar shards, or a dataset of the datasets library."
        )

    def read(key: str) -> tuple[bytes, str]:
        caption = (path / key).with_suffix(".txt")
        if not caption.is_file():
            raise ValueError(f"there is no caption, which would be in {caption.name}")
        return checked(picture(path / key), caption.read_text("utf-8"))

    return single(str(path), keys, read)


def _listed(path: Path, columns: tuple[str, str] | None) -> Source:
    # Bytes, decoded a row at a time: a row that is no UTF-8 is damaged, and the others are not.
    lines = (path / METADATA).read_bytes().removeprefix(BOM_UTF8).splitlines()
    rows = {f"{METADATA}:{i}": line for i, line in enumerate(lines, 1) if line.strip()}
    root = path.resolve()

    def read(key: str) -> tuple[bytes, str]:
        row: Any = json.loads(rows[key])
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, not {rows[key][:40]!r}")
        name = row.get(columns[0] if columns else "file_name")
        if not isinstance(name, str):
            raise ValueError("the row names no file; expected a field file_name")
        file = (path / name).resolve()
        if not file.is_relative_to(root):
            raise ValueError(f"{name!r} lies outside the folder")
        return checked(picture(file), caption_in(row, columns))

    return single(str(path), list(rows), read)


def caption_in(row: dict[str, Any], columns: tuple[str, str] | None = None) -> object:
    """The caption among a row's fields, None where there is none."""
    names = (columns[1],) if columns else CAPTIONS
    return next((row[name] for name in names if row.get(name)), None)


def picture(path: Path) -> bytes:
    """The bytes of a picture's file; ValueError if that is too large to be one."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"the picture's file is larger than {LARGEST} bytes")
    return path.read_bytes()


def prompts_source(path: Path) -> Source:
    """A prompt a line, empty ones left out; ValueError if there is none, or for no UTF-8."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); expected a prompt a line.") from error
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; expected one a line.")
    known = dict.fromkeys(prompts)  # a prompt that stands there twice is one
    return single(str(path), list(known), lambda key: (b"", key), pictures=False)
