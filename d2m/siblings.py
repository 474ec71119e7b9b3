"""Temporary siblings: hidden names beside a final one, removed even where their maker was killed.

A maker holds a lock (flock) on what it makes, and the kernel lets go of it when the process ends,
however that is. So whoever makes the next one under the same final name can tell a dead one's
leftovers, which it removes, from what another process writes at this moment, whatever clocks say.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY, ASIDE = ".tmp", ".old"  # being made; a whole one that another takes the place of


def temporary_sibling(path: str | os.PathLike[str], kind: str = TEMPORARY) -> Path:
    """A fresh hidden name beside `path` (same file system, so that a rename is atomic)."""
    path = Path(path)
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}{kind}"


@contextmanager
def temporary_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """(open file, its name): a sibling of `path` that is gone afterwards, or renamed."""
    sweep(path)
    while True:
        temporary = temporary_sibling(path)
        file = open(temporary, "xb")  # noqa: SIM115 - closed below
        if _held(file.fileno(), temporary):
            break
        file.close()  # swept between its creation and its lock
    try:
        with file:
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_dir(path: Path) -> Iterator[Path]:
    """An empty sibling directory of `path` that is gone afterwards, or renamed."""
    sweep(path)
    while True:
        temporary = temporary_sibling(path)
        temporary.mkdir()
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue
        except PermissionError:  # Windows opens no directories, and knows no flock
            descriptor = None
        if descriptor is None or _held(descriptor, temporary):
            break
        os.close(descriptor)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def sweep(path: Path) -> None:
    """Remove temporary siblings of `path` that no living process holds.

    Where a killed one had moved `path` aside and nothing has come in its place, it comes back.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.(tmp|old)")
    try:
        with os.scandir(path.parent) as entries:
            found = sorted(entry.name for entry in entries if name.fullmatch(entry.name))
    except OSError:
        return  # no such directory yet
    for each in (path.parent / one for one in found):
        # OSError: another process was quicker, or it is not ours to remove
        with contextlib.suppress(OSError):
            if each.suffix == ASIDE and not os.path.lexists(path):
                os.rename(each, path)
            elif each.is_symlink():
                each.unlink()
            else:
                _remove_dead(each)


def _remove_dead(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        if _lock(descriptor):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
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
