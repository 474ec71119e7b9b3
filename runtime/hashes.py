"""SHA-256 of files, computed once for as long as a file stays: remembered between processes too.

What is remembered lies in the user's cache directory, never in a bundle: a file for every bundle
directory. A hash is taken from there only where size, inode, modification and change time are
those of then. A program can set a modification time at will, a change time only by the system's
clock. A file that changed within the last seconds, or by its times will change in the future (a
clock that jumped), may change again without a trace and is not remembered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from runtime.fields import parse_json
from runtime.siblings import write_bytes

log = logging.getLogger("runtime")
SETTLED = 2.0  # seconds since the last change; some file systems keep times to two seconds
KEPT = 256  # bundles remembered
MAX_BYTES = 8 << 20  # of such a file
Stamp = list[int]

_known: dict[str, tuple[Stamp, str]] = {}  # of this process: path -> (stamp, hash)


def cache_dir() -> Path | None:
    """$D2M_CACHE, else d2m in the user's cache directory; None where there is none, or for ""."""
    asked = os.environ.get("D2M_CACHE")
    if asked is not None:
        return Path(asked) if asked else None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "d2m") if os.path.isabs(base) else None


def stamp(path: Path) -> Stamp:
    """What must stay the same for a file to be the same."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def sha256(path: Path, seen: dict[str, Any] | None = None, *, again: bool = False) -> str:
    """Hex SHA-256 of a file; from memory where it is the same file, unless `again`.

    `seen` is what `recall` gave, and takes what is worth remembering. ValueError where the file
    changes while it is read.
    """
    name, now = str(path.resolve()), stamp(path)
    if not again:
        if name in _known and _known[name][0] == now:
            return _known[name][1]
        row = seen.get(name) if seen else None
        if isinstance(row, list) and row[:-1] == now and isinstance(row[-1], str):
            return row[-1]
    began = time.time()
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if stamp(path) != now:
        raise ValueError(f"{path} changed while it was read, expected a file that stays.")
    if max(now[1], now[2]) / 1e9 + SETTLED < began:
        _known[name] = now, found
        if seen is not None:
            seen[name] = [*now, found]
    return found


def recall(root: Path) -> dict[str, Any]:
    """What is remembered of a directory's files: path -> stamp and hash; {} where nothing is."""
    place = place_of(root)
    try:
        if place is None or place.stat().st_uid != os.getuid() or place.is_symlink():
            return {}
        with open(place, "rb") as file:
            seen = parse_json(file.read(MAX_BYTES))
        return seen if isinstance(seen, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: Windows has no getuid
        log.info("hashes of %s are computed anew (%s)", root, error)
        return {}


def remember(root: Path, seen: dict[str, Any]) -> None:
    """Write what `recall` shall give; where that cannot be written, the log says so."""
    place = place_of(root)
    if place is None:
        return
    try:
        write_cached(place, json.dumps(seen))
    except OSError as error:
        log.info("hashes of %s are not remembered (%s)", root, error)


def write_cached(place: Path, text: str) -> None:
    """Write a file of the cache, at once, and tidy its folder up; OSError."""
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_bytes(place, text.encode("utf-8"), sync=False)  # what is lost is computed again
    tidy(place.parent)


def tidy(folder: Path) -> None:
    """Keep the newest files, and no temporary ones of bundles that nobody opens any more."""
    files = []
    for path in folder.iterdir():
        try:
            files.append((path.stat().st_mtime, path))
        except OSError:
            continue  # another process was quicker
    whole = sorted(pair for pair in files if pair[1].suffix == ".json")
    stale = [pair for pair in files if pair[1].suffix == ".tmp" and pair[0] < time.time() - 3600]
    for _, path in whole[:-KEPT] + stale:
        path.unlink(missing_ok=True)


def place_of(root: Path) -> Path | None:
    """The file that remembers a directory's hashes; None where it would lie in the directory."""
    base, real = cache_dir(), root.resolve()
    if base is None or base.resolve().is_relative_to(real):
        return None
    return base / "hashes" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
