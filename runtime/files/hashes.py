"""SHA-256 of files, computed once for as long as a file stays: remembered between processes.

What is remembered lies in the user's cache directory, never in a bundle: one file a bundle
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.files.atomic import write_text
from runtime.files.checked_json import parse_json

log = logging.getLogger("runtime")
SETTLED = 2.0  # seconds since the last change; some file systems keep times to two seconds
MAX_BUNDLES = 256  # remembered
MAX_BYTES = 8 << 20  # of such a file
Stamp = list[int]


def cache_dir() -> Path | None:
    """$D2M_CACHE, else d2m in the user's cache directory; None where there is none, or for ""."""
    folder = os.environ.get("D2M_CACHE")
    if folder is not None:
        return Path(folder) if folder else None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "d2m") if os.path.isabs(base) else None


def stamp(path: str | os.PathLike[str] | int) -> Stamp:
    """What must stay the same for a file (a path, or a descriptor) to be the same."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file; ValueError where it changes while it is read."""
    now = stamp(path)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if stamp(path) != now:
        raise ValueError(f"{path} changed while it was read, expected a file that does not change.")
    return found


def first_mismatch(
    root: Path,
    wanted: Mapping[str, str],
    *,
    anew: bool = False,
    stamps: dict[str, Stamp] | None = None,
) -> tuple[str, str] | None:
    """(name, its hash) of the first file of a directory that has not the hash wanted; None: none.

    Hashes come from memory where files are the same, unless `anew`. What was computed is
    remembered, even where a later file is wrong. `stamps` is filled with those of the files whose
    hashes are right: a file of another stamp is another file.
    """
    before = recall(root)
    seen = {name: before[name] for name in wanted if name in before}
    try:
        for name, expected in wanted.items():
            now, row = stamp(root / name), seen.pop(name, None)
            same = isinstance(row, list) and row[:-1] == now and isinstance(row[-1], str)
            began = time.time()
            found: str = row[-1] if same and not anew else sha256(root / name)
            if same or max(now[1], now[2]) / 1e9 + SETTLED < began:
                seen[name] = [*now, found]
            if found != expected:
                return name, found
            if stamps is not None:
                stamps[name] = now
    finally:
        if seen != before:
            remember(root, seen)
    return None


def recall(root: Path) -> dict[str, Any]:
    """What is remembered of a directory's files: name -> stamp and hash; {} where nothing is."""
    return read_cached(cache_file(root), f"hashes of {root} are computed again")


def read_cached(place: Path | None, otherwise: str) -> dict[str, Any]:
    """A file of the cache, {} where there is none or it is not ours; `otherwise` is then logged."""
    try:
        if place is None or place.stat().st_uid != os.getuid() or place.is_symlink():
            return {}
        with open(place, "rb") as file:
            seen = parse_json(file.read(MAX_BYTES))
        return seen if isinstance(seen, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: Windows has no getuid
        log.info("%s (%s)", otherwise, error)
        return {}


def remember(root: Path, seen: dict[str, Any]) -> None:
    """Write what `recall` shall give; where that cannot be written, the log says so."""
    place = cache_file(root)
    if place is None:
        return
    try:
        write_cached(place, json.dumps(seen))
    except OSError as error:
        log.info("hashes of %s are not remembered (%s)", root, error)


def write_cached(place: Path, text: str) -> None:
    """Write a file of the cache, at once, and tidy its folder up; OSError."""
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text(place, text, lasting=False)  # what is lost is computed again
    tidy(place.parent)


def tidy(folder: Path) -> None:
    """Keep the newest files, and no temporary ones of bundles that nobody opens any more."""
    files = []
    for path in folder.iterdir():
        try:
            files.append((path.stat().st_mtime, path))
        except OSError:
            continue  # another process was quicker
    complete = sorted(pair for pair in files if pair[1].suffix == ".json")
    stale = [pair for pair in files if pair[1].suffix == ".tmp" and pair[0] < time.time() - 3600]
    for _, path in complete[:-MAX_BUNDLES] + stale:
        path.unlink(missing_ok=True)


def cache_file(root: Path) -> Path | None:
    """The file that remembers a directory's hashes; None where it would lie in the directory."""
    base, real = cache_dir(), root.resolve()
    if base is None or base.resolve().is_relative_to(real):
        return None
    return base / "hashes" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
