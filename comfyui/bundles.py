"""Bundles and LoRAs by the names that ComfyUI's folders give them.

A workflow names them and never a path, so that a workflow from elsewhere opens nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHIPPED = "(the bundle that ships with d2m)"


def folders() -> Any:
    """ComfyUI's folder_paths, which knows the folder models/d2m from then on."""
    import folder_paths

    known = Path(folder_paths.models_dir, "d2m")
    folder_paths.add_model_folder_path("d2m", str(known))
    return folder_paths


def bundle_names() -> dict[str, Path | None]:
    """Name -> directory of every bundle in models/d2m; None: the one that ships."""
    found: dict[str, Path | None] = {SHIPPED: None}
    for folder in map(Path, folders().get_folder_paths("d2m")):
        for manifest in sorted(folder.glob("*/manifest.json")):
            found.setdefault(manifest.parent.name, manifest.parent)
    return found


def bundle_path(name: str) -> Path | None:
    """A bundle's directory; ValueError for a name that is none."""
    known = bundle_names()
    if name not in known:
        raise ValueError(f"the bundle is {name!r}, expected one of {', '.join(known)}.")
    return known[name]


def lora_names() -> list[str]:
    """LoRAs in safetensors of ComfyUI's models/loras."""
    names = folders().get_filename_list("loras")
    return sorted(name for name in names if name.endswith(".safetensors"))


def lora_path(name: str) -> Path:
    """A LoRA's file; ValueError for a name that is none."""
    path = folders().get_full_path("loras", name) if name in lora_names() else None
    if path is None:
        raise ValueError(f"the LoRA is {name!r}, expected one of models/loras in safetensors.")
    return Path(path)


def stamp(path: Path) -> str:
    """What changes when a file does."""
    facts = path.stat()
    return f"{facts.st_mtime_ns} {facts.st_size}"
