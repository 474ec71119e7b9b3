"""Writing files and directories so that a crash leaves the old one or the new one, never half.

Every write goes to a temporary sibling, a hidden name beside the final one, is synced to disk and
then renamed. A maker holds a lock (flock) on what it makes, and the kernel lets go of it when the
process ends, however that is. So whoever makes the next one under the same final name can tell a
dead one's leftovers, which it removes, from what another process writes at this moment, whatever
clocks say.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

AT_FDCWD, RENAME_EXCHANGE = -100, 2
# What renameat2 says where kernel or file system cannot exchange.
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM)
TEMPORARY, ASIDE = ".tmp", ".old"  # being made; a whole one that another takes the place of


def write_bytes(
    path: str | os.PathLike[str], data: bytes, mode: int = 0o666, *, lasting: bool = True
) -> Path:
    """Write `data` to `path` at once, making parent directories; returns the path.

    The file has the rights `mode` from the beginning. Without `lasting` nothing waits for the
    disk: for what can be computed again after a power cut.
    """
    return write_chunks(path, [data], mode, lasting=lasting)


def write_chunks(
    path: str | os.PathLike[str],
    chunks: Iterable[bytes | memoryview],
    mode: int = 0o666,
    *,
    lasting: bool = True,
) -> Path:
    """The same of chunks that are made while the file is written, one in memory at a time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path, mode) as (file, temporary):
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        if lasting:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    if lasting:
        sync(path.parent)
    return path


def check_writable(path: str | os.PathLike[str]) -> None:
    """OSError now rather than after the work whose result `path` will hold.

    Its parents are made, and a file is written beside it and removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path):
        pass


def write_text(path: str | os.PathLike[str], text: str, *, lasting: bool = True) -> Path:
    """Write `text` as UTF-8 with the newlines it has."""
    return write_bytes(path, text.encode("utf-8"), lasting=lasting)


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
    hidden sibling, which `sweep` brings back. Of two processes the later wins.
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
    import ctypes

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


def temporary_sibling(path: str | os.PathLike[str], kind: str = TEMPORARY) -> Path:
    """A fresh hidden name beside `path` (same file system, so that a rename is atomic)."""
    path = Path(path)
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}{kind}"


@contextmanager
def temporary_file(path: Path, mode: int = 0o666) -> Iterator[tuple[BinaryIO, Path]]:
    """(open file, its name): a sibling of `path` that is gone afterwards, or renamed."""
    sweep(path)
    while True:
        temporary = temporary_sibling(path)
        opener = partial(os.open, mode=mode)
        file = open(temporary, "xb", opener=opener)  # noqa: SIM115 - closed below
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
