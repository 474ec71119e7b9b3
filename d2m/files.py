"""Writing files and directories so that a crash leaves the old one or the new one, never half.

Every write goes to a temporary sibling in the same directory (d2m.siblings), is synced to disk,
then renamed.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2m.siblings import ASIDE, temporary_file, temporary_sibling

AT_FDCWD, RENAME_EXCHANGE = -100, 2
# What renameat2 says where kernel or file system cannot exchange.
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` at once, making parent directories; returns the path."""
    return write_pieces(path, [data])


def write_pieces(path: str | os.PathLike[str], pieces: Iterable[bytes | memoryview]) -> Path:
    """The same of pieces that are made while the file is written, one in memory at a time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path) as (file, temporary):
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
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

    Every file is synced first. On Linux an old `final_dir` and the new one change names in one
    system call, so that at every moment one of them has it. Elsewhere, or where the file system
    cannot, the old one is moved aside before, and a crash between the two renames leaves it as a
    hidden sibling, which `d2m.siblings.sweep` brings back. Of two processes the later wins.
    """
    tmp_dir, final_dir = Path(tmp_dir), Path(final_dir)
    for folder, _, names in os.walk(tmp_dir):
        for name in names:
            sync(Path(folder) / name)
        sync(folder)
    final_dir.parent.mkdir(parents=True, exist_ok=True)
    old = _put(tmp_dir, final_dir)
    sync(final_dir.parent)
    if old is not None:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)  # what is left is swept by the next one
        else:
            old.unlink(missing_ok=True)
    return final_dir


def _put(new: Path, final: Path) -> Path | None:
    """Give `new` the name `final`; where what had it before is now, None where nothing had."""
    while True:
        if not os.path.lexists(final):
            try:
                os.rename(new, final)
                return None
            except OSError as error:  # another process has just put its own there
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
        try:
            if exchange(new, final):
                return new
            aside = temporary_sibling(final, ASIDE)
            os.rename(final, aside)
        except FileNotFoundError:
            if os.path.lexists(new):
                continue  # the final name was taken away meanwhile
            raise
        try:
            os.rename(new, final)
        except OSError:
            if os.path.lexists(final):  # by another process: ours comes after it
                shutil.rmtree(aside, ignore_errors=True)
                continue
            os.rename(aside, final)
            raise
        return aside


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places at once; False where this system cannot."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:  # an old C library
        return False
    sys.audit("os.rename", os.fspath(one), os.fspath(other), -1, -1)  # as os.rename does
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def library_errors() -> Iterator[None]:
    """Within: a disk that the safetensors library cannot write to is an OSError, as elsewhere."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number)) from error
        raise
