"""Files of a bundle read as data of unknown origin: inside its directory, of the stated size."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from runtime.files.checked_json import printable
from runtime.files.hashes import sha256

MAX_MANIFEST = 8 << 20  # bytes; that of FLUX.1 has some 200,000


def read_small(root: Path, name: str, most: int = MAX_MANIFEST) -> bytes:
    """A file of the bundle, of at most `most` bytes, that is no link out of it."""
    path = root / name
    if not path.is_file():
        raise broken(root, f"its {name} is no file of it")
    check_inside(root, name)
    with open(path, "rb") as file:
        # Its stated size may be 0, in /proc; a read of `most` would take that memory at once.
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size or MAX_MANIFEST, most) + 1)
    if len(data) > most:
        raise broken(root, f"its {name} has more than {most} bytes")
    return data


def check_inside(root: Path, name: str) -> None:
    """ValueError where a name of the bundle is a link that leaves it, as in a hub's cache."""
    if not (root / name).resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"bundle {printable(str(root))} cannot be used: its file {printable(name)} is a link "
            "that leaves the directory; if this is a download in a hub's cache, copy it with: "
            f"cp -rL {shlex.quote(printable(str(root)))} NEW (or download it with --local-dir)."
        )


def check_file(root: Path, name: str, row: dict[str, Any], *, full: bool) -> None:
    """One listed file: there, inside the bundle, of the stated size, with the stated hash."""
    path = root / name
    if not path.is_file():
        raise broken(root, f"its file {name} is missing")
    check_inside(root, name)
    size = path.stat().st_size
    if size != row["size"]:
        raise broken(root, f"its file {name} has {size} bytes, expected {row['size']}")
    if full and (found := sha256(path)) != row["sha256"]:
        raise wrong_hash(root, name, found)


def wrong_hash(root: Path, name: str, found: str) -> ValueError:
    """The error for a file of which the manifest states another hash."""
    return broken(root, f"its file {name} has SHA-256 {found[:12]}..., expected another")


def broken(root: Path, what: str) -> ValueError:
    """The error for a bundle whose contents are wrong."""
    what = printable(what)
    return ValueError(f"bundle {root} cannot be used: {what}; fetch it or export it again.")
