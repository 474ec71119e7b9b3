"""Writing files and directories so that a crash leaves the old one or the new one, never half.

Every write goes to a temporary sibling in the same directory, is synced to disk, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def temporary_sibling(path: str | os.PathLike[str]) -> Path:
    """A fresh hidden name beside `path` (same file system, so that a rename is atomic)."""
    path = Path(path)
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` at once, making parent directories; returns the path."""
    return write_pieces(path, [data])


def write_pieces(path: str | os.PathLike[str], pieces: Iterable[bytes | memoryview]) -> Path:
    """The same of pieces that are made while the file is written, one in memory at a time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8 with the newlines it has."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], obj: Any) -> Path:
    """Write `obj` as JSON: sorted keys, indent 2, a trailing newline; NaN is refused."""
    text = json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return write_text(path, text + "\n")


def sync(path: str | os.PathLike[str]) -> None:
    """Flush one file or directory entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_dir(tmp_dir: str | os.PathLike[str], final_dir: str | os.PathLike[str]) -> Path:
    """Make the finished `tmp_dir` appear as `final_dir` at once.

    Every file is synced first. An old `final_dir` is moved aside, then removed: a crash between
    the two renames leaves both directories whole under their hidden names beside `final_dir`.
    """
    tmp_dir, final_dir = Path(tmp_dir), Path(final_dir)
    for folder, _, names in os.walk(tmp_dir):
        for name in names:
            sync(Path(folder) / name)
        sync(folder)
    final_dir.parent.mkdir(parents=True, exist_ok=True)
    aside = None
    if os.path.lexists(final_dir):
        aside = temporary_sibling(final_dir)
        os.rename(final_dir, aside)
    os.rename(tmp_dir, final_dir)
    sync(final_dir.parent)
    if aside is not None:
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink()
    return final_dir


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
