"""LoRAs that requests may name: the .safetensors files of one folder, by their names without it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runtime.files.checked_json import show

SUFFIX = ".safetensors"
MOST = 8  # of one request


def lora_names(folder: Path) -> dict[str, Path]:
    """Name -> file; what is added to the folder later is there too. ValueError for no folder."""
    if not folder.is_dir():
        raise ValueError(f"--loras is {folder}, expected a folder of .safetensors files.")
    files = (path for path in folder.iterdir() if path.suffix == SUFFIX and path.is_file())
    return {path.stem: path for path in files}


def read_loras(asked: Mapping[str, float], folder: Path | None) -> tuple[tuple[Path, float], ...]:
    """A request's LoRAs as files, in the order of their names; ValueError, one sentence."""
    if not asked:
        return ()
    if folder is None:
        raise ValueError("lora is given, expected none: this server allows none; leave it out.")
    if len(asked) > MOST:
        raise ValueError(f"lora names {len(asked)} files, expected at most {MOST}.")
    known = lora_names(folder)
    for name, strength in asked.items():
        if name not in known:
            listed = ", ".join(sorted(known)[:20]) or "none"
            raise ValueError(f"lora names {show(name)}, expected one of {listed}.")
        if not -100 <= strength <= 100:
            raise ValueError(f"lora has the strength {strength}, expected -100 to 100.")
    return tuple((known[name], float(by)) for name, by in sorted(asked.items()))
