"""Pictures in a folder, captions in metadata.jsonl or a .txt file beside each; and prompts alone.

`metadata.jsonl` as the imagefolder of the datasets library has it: an object a line, `file_name`
relative to the folder, and the caption under `text`, `caption` or `prompt`.

Pairs for models that edit: `NAME.before.png`, `NAME.after.png` (or `NAME.png`), the instruction in
`NAME.txt`, and maybe `NAME.mask.png`; in metadata.jsonl `before_file_name`, `after_file_name` (or
`file_name`) and `mask_file_name`.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from calib.data.pixels import ENDINGS
from calib.data.source import LARGEST, Files, Sample, Source, checked, checked_pair

METADATA = "metadata.jsonl"
CAPTIONS = ("text", "caption", "prompt", "captions", "description", "instruction")
BEFORE, AFTER, MASK = ".before", ".after", ".mask"  # ends of a pair's names, before their ending


def single(
    name: str,
    keys: Sequence[str],
    read: Callable[[str], tuple[Files, str]],
    pictures: bool = True,
    pairs: bool = False,
) -> Source:
    """A source of samples to be read one by one: each is a shard, so an epoch is one shuffle."""

    def rows(shard: str, first: int) -> Iterator[Sample]:
        if first == 0:
            yield Sample(shard, lambda: read(shard))

    return Source(name, tuple(keys), rows, lambda shard: 1, pictures, single=True, pairs=pairs)


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
    if befores := [key for key in keys if Path(key).stem.endswith(BEFORE)]:
        return single(str(path), befores, lambda key: _pair(path / key), pairs=True)

    def read(key: str) -> tuple[bytes, str]:
        caption = (path / key).with_suffix(".txt")
        if not caption.is_file():
            raise ValueError(f"there is no caption, which would be in {caption.name}")
        return checked(picture(path / key), caption.read_text("utf-8"))

    return single(str(path), keys, read)


def _pair(before: Path) -> tuple[Files, str]:
    """The edit whose picture before is this file; ValueError where a part is missing."""
    stem = before.stem.removesuffix(BEFORE)

    def beside(*ends: str) -> bytes | None:
        files = (before.with_name(stem + end + kind) for end in ends for kind in ENDINGS)
        found = next((file for file in files if file.is_file()), None)
        return picture(found) if found else None

    words = before.with_name(stem + ".txt")
    if not words.is_file():
        raise ValueError(f"there is no instruction, which would be in {words.name}")
    return checked_pair(picture(before), beside(AFTER, ""), beside(MASK), words.read_text("utf-8"))


def _listed(path: Path, columns: tuple[str, str] | None) -> Source:
    # Bytes, decoded a row at a time: a row that is no UTF-8 is damaged, and the others are not.
    lines = (path / METADATA).read_bytes().removeprefix(BOM_UTF8).splitlines()
    rows = {f"{METADATA}:{i}": line for i, line in enumerate(lines, 1) if line.strip()}
    root = path.resolve()
    paired = b'"before_file_name"' in next(iter(rows.values()), b"")

    def file_of(row: dict[str, Any], *fields: str) -> bytes | None:
        name = next((row[field] for field in fields if isinstance(row.get(field), str)), None)
        if name is None:
            return None
        file = (path / name).resolve()
        if not file.is_relative_to(root):
            raise ValueError(f"{name!r} lies outside the folder")
        return picture(file)

    def read(key: str) -> tuple[Files, str]:
        row: Any = json.loads(rows[key])
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, not {rows[key][:40]!r}")
        caption = caption_in(row, columns)
        if paired:
            before, mask = (file_of(row, f"{part}_file_name") for part in ("before", "mask"))
            return checked_pair(before, file_of(row, "after_file_name", "file_name"), mask, caption)
        data = file_of(row, columns[0] if columns else "file_name")
        if data is None:
            raise ValueError("the row names no file; expected a field file_name")
        return checked(data, caption)

    return single(str(path), list(rows), read, pairs=paired)


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
