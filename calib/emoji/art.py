"""The pictures of the emoji world: found, checked, or fetched; never committed.

They are those of the npm package emoji-datasource-google (names and categories by its authors, MIT;
pictures of Noto Emoji, Apache 2.0 and OFL). A folder of the same layout with other pictures serves
as well:

    FOLDER/emoji.json            [{"name", "short_names", "image", "category", "added_in",
                                   "sort_order"}, ...], what the package says of every emoji
    FOLDER/img/google/64/IMAGE   64 x 64 pixels with transparency, PNG; `img/*/64` of any vendor
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.files.atomic import write_bytes
from runtime.files.hashes import cache_dir

PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"
# Of the package's .tgz, whoever hands it out.
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
SIDE = 64  # pixels
LARGEST = 8 << 20  # bytes of one unpacked file; emoji.json has 1.5 million
COMMAND = "python -m calib.emoji"
VARIABLE = "D2M_EMOJI"


@dataclass(frozen=True)
class Entry:
    """What emoji.json says of one emoji, and its picture's file."""

    name: str  # Unicode's, in capitals or not
    short_names: tuple[str, ...]
    category: str
    age: tuple[int, ...]  # version of Emoji that added it, (0, 6) for 0.6
    order: int  # place in Unicode's list
    image: Path


def default_folder() -> Path:
    """$D2M_EMOJI, else the package's place among d2m's caches."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return (cache_dir() or Path("runs")) / f"{PACKAGE}-{VERSION}"


def find_art(folder: Path | None = None) -> Path:
    """The folder of the pictures; FileNotFoundError, with the command that gets them."""
    where = folder or default_folder()
    if not (where / "emoji.json").is_file():
        raise FileNotFoundError(
            f"the emoji world's pictures are not in {where}; get them with `{COMMAND} --get` (npm, "
            f"74 MB) or `{COMMAND} --tgz FILE`, or name a folder of emoji.json and img/*/64/*.png "
            f"in ${VARIABLE}"
        )
    return where


def get(folder: Path) -> None:
    """Fetch the package by `npm pack` and unpack it into `folder`.

    FileNotFoundError where there is no npm, RuntimeError where it fails, ValueError for a file that
    is not the package.
    """
    with tempfile.TemporaryDirectory() as place:
        try:
            done = subprocess.run(
                ["npm", "pack", f"{PACKAGE}@{VERSION}"], cwd=place, capture_output=True, text=True
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"npm is not installed; install it, or fetch {PACKAGE}-{VERSION}.tgz elsewhere and "
                f"run `{COMMAND} --tgz FILE`"
            ) from error
        found = list(Path(place).glob("*.tgz"))
        if done.returncode or not found:
            reason = done.stderr.strip().splitlines()[-1:] or ["it wrote no .tgz"]
            raise RuntimeError(f"npm pack {PACKAGE}@{VERSION} failed: {reason[0]}")
        unpack(found[0], folder)


def unpack(tgz: Path, folder: Path, sha256: str = SHA256) -> None:
    """Unpack emoji.json and the pictures of 64 pixels from the package's file into `folder`.

    No path of the archive is used: a member counts only if its whole name is one of those expected,
    and only what regular files hold is read. emoji.json is written last. ValueError where the
    file's SHA-256 is another.
    """
    with open(tgz, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{tgz} is not {PACKAGE}-{VERSION}.tgz: its SHA-256 is {found}, expected {sha256}"
        )
    head, pictures = "package/img/google/64/", folder / "img/google/64"
    pictures.mkdir(parents=True, exist_ok=True)
    index = b""
    with tarfile.open(tgz, "r:gz") as archive:
        for member in archive:
            plain = member.isreg() and member.size <= LARGEST
            name = member.name.removeprefix(head)
            picture = member.name == head + name and _is_picture(name)
            if not plain or not (picture or member.name == "package/emoji.json"):
                continue
            data = archive.extractfile(member)
            assert data is not None  # a regular file
            if picture:
                write_bytes(pictures / name, data.read())
            else:
                index = data.read()
    if not index:
        raise ValueError(f"{tgz} holds no package/emoji.json")
    write_bytes(folder / "emoji.json", index)


def _is_picture(name: str) -> bool:
    """Whether a file is named as Unicode numbers are: 1f355.png, 0023-fe0f-20e3.png."""
    stem = name.removesuffix(".png")
    return stem != name and bool(stem) and set(stem) <= set("0123456789abcdef-")


@lru_cache(maxsize=4)
def read_entries(folder: Path) -> tuple[Entry, ...]:
    """The folder's emoji that have a picture, skin tones themselves left out.

    ValueError where emoji.json is none.
    """
    index = folder / "emoji.json"
    try:
        rows: list[dict[str, Any]] = json.loads(index.read_text(encoding="utf-8"))
        found = []
        for row in rows:
            name = str(row["image"])
            images = [p / name for p in _picture_folders(folder)] if _is_picture(name) else []
            image = next((path for path in images if path.is_file()), None)
            if image is None or row["category"] == "Component":
                continue
            age = tuple(int(part) for part in str(row["added_in"]).split("."))
            short = tuple(map(str, row["short_names"]))
            order = int(row["sort_order"])
            found.append(Entry(str(row["name"]), short, str(row["category"]), age, order, image))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} is not as {PACKAGE}'s ({type(error).__name__}: {error}); get it with "
            f"`{COMMAND} --get`"
        ) from error
    if not found:
        raise ValueError(f"{folder} holds no picture that {index} names, in img/*/64")
    return tuple(found)


@lru_cache(maxsize=4)
def _picture_folders(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob("img/*/64")))


def read_picture(path: Path) -> np.ndarray:
    """Red, green, blue and cover of a picture, uint8 [64, 64, 4]; ValueError for another size."""
    with Image.open(path) as image:
        if image.size != (SIDE, SIDE):
            raise ValueError(f"{path} has {image.size[0]} x {image.size[1]} pixels, expected 64")
        return np.asarray(image.convert("RGBA"))
