"""A pipeline whose files are `*.fp16.safetensors` -> one of the same files without the variant.

Nothing is copied: the new directory holds links, and indexes with the plain names.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from d2m.plan.hub import UNPACKED
from runtime.files.atomic import replace_dir, temporary_dir, write_json
from runtime.files.checked_json import read_json

# `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`; the index has the variant last
# but one: `model.safetensors.index.fp16.json`.
WEIGHTS = re.compile(
    r"(?P<stem>[^.]+)\.(?P<variant>[A-Za-z][A-Za-z0-9_]*)(?P<part>-\d{5}-of-\d{5})?\.safetensors"
)
INDEX = re.compile(r"(?P<stem>[^.]+\.safetensors\.index)\.(?P<variant>[A-Za-z]\w*)\.json")
PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")


def variants_of(directory: Path) -> dict[str, set[str]]:
    """Component with weights -> the variants that it is stored as, "" for plain files."""
    found = {}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        names = [path.name for path in folder.iterdir()]
        stored = {match["variant"] for name in names if (match := WEIGHTS.fullmatch(name))}
        stored |= {""} if any(map(PLAIN.fullmatch, names)) else set()
        if stored:
            found[folder.name] = stored
    return found


def choose(directory: Path, variant: str | None) -> str:
    """The variant to take, "" for plain files; ValueError where there is none such or a choice.

    Without `variant` plain files go first, then the only variant.
    """
    stored = variants_of(directory)
    every = sorted(set().union(*stored.values()) - {""})
    if variant:
        if variant not in every:
            known = f"it has {', '.join(every)}" if every else "its files are of no variant"
            raise ValueError(f"{directory} has no files of the variant {variant!r}: {known}.")
        return variant
    if not every or all("" in names for names in stored.values()):
        return ""
    if len(every) > 1:
        raise ValueError(f"{directory} is stored as {', '.join(every)}; say which with --variant.")
    return every[0]


def plain_pipeline(directory: Path, variant: str | None, out: Path) -> Path:
    """`directory`, or where a variant is taken, `out` with links to its files by plain names.

    A component that has no file of the variant keeps its plain ones, as diffusers loads it.
    ValueError where that cannot be chosen.
    """
    chosen = choose(directory, variant)
    if not chosen:
        return directory
    stored = variants_of(directory)
    with temporary_dir(out) as temporary:
        for entry in sorted(directory.iterdir()):
            if chosen not in stored.get(entry.name, ()):
                (temporary / entry.name).symlink_to(entry.resolve())
                continue
            folder = temporary / entry.name
            folder.mkdir()
            for path in sorted(entry.iterdir()):
                link(path, chosen, folder)
        write_json(temporary / UNPACKED, {"base_model": str(directory), "variant": chosen})
        replace_dir(temporary, out)
    return out


def link(path: Path, variant: str, folder: Path) -> None:
    """One file of a component: the variant's by its plain name, other weights left out."""
    if (found := INDEX.fullmatch(path.name)) and found["variant"] == variant:
        index: Any = read_json(path)
        files = {name: plain_name(file, variant) for name, file in index["weight_map"].items()}
        write_json(folder / f"{found['stem']}.json", {**index, "weight_map": files})
    elif found or PLAIN.fullmatch(path.name) or other_variant(path.name, variant):
        return
    elif path.is_file():
        (folder / plain_name(path.name, variant)).symlink_to(path.resolve())
    else:
        shutil.copytree(path, folder / path.name)


def other_variant(name: str, variant: str) -> bool:
    """Whether these are weights of another variant."""
    found = WEIGHTS.fullmatch(name)
    return found is not None and found["variant"] != variant


def plain_name(name: str, variant: str) -> str:
    """`model.fp16.safetensors` -> `model.safetensors`; other names as they are."""
    found = WEIGHTS.fullmatch(name)
    if not found or found["variant"] != variant:
        return name
    return f"{found['stem']}{found['part'] or ''}.safetensors"
