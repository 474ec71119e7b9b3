"""A temporary file beside its final name, removed even where its maker was killed.

What d2m.siblings does for files and directories, for files alone: the runtime imports nothing of
d2m. A maker holds a lock (flock) on what it writes, which the kernel lets go of when the process
ends; whoever writes the same name next removes what nobody holds, whatever clocks say.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_bytes(path: Path, data: bytes, mode: int = 0o666, sync: bool = True) -> None:
    """Write a file at once, with these rights from the beginning: a reader sees all or nothing."""
    with temporary_file(path, mode) as (file, temporary):
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def temporary_file(path: Path, mode: int = 0o666) -> Iterator[tuple[BinaryIO, Path]]:
    """(open file, its name): a sibling of `path` that is gone afterwards, or renamed."""
    sweep(path)
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        if _held(descriptor, temporary):
            break
        os.close(descriptor)  # swept between its creation and its lock
    try:
        with open(descriptor, "wb") as file:
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove temporary siblings of `path` that no living process holds."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.tmp")
    try:
        with os.scandir(path.parent) as entries:
            found = [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]
    except OSError:
        return  # no such directory yet
    for each in found:
        with contextlib.suppress(OSError):  # another process was quicker, or it is not ours
            descriptor = os.open(each, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                if _lock(descriptor):
                    each.unlink()
            finally:
                os.close(descriptor)


def _held(descriptor: int, path: Path) -> bool:
    """Lock what was just made; False where a sweeper has it or has removed it already."""
    if _lock(descriptor) is False:
        return False
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool | None:
    """Whether it is ours now; None where there are no locks, and so nothing is ever swept."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
