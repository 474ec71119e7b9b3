"""A bundle directory: opened once, every file's size and hash checked, nothing executed.

A bundle is data: manifest.json, ONNX graphs, safetensors, plans, tokenizers. It may come from
anywhere, so a name that leaves the directory, by '..', by an absolute path or through a symbolic
link, is refused before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime import manifest as manifests
from runtime.weights import SafeTensors, unique

MAX_MANIFEST = 32 << 20  # bytes

# Hashes this process has already computed: (path, inode, modification time, size) -> hex.
_hashes: dict[tuple[str, int, int, int], str] = {}


@dataclass
class Bundle:
    """An opened bundle. `digest` is the SHA-256 of manifest.json, and so of every file in it."""

    path: Path
    manifest: dict[str, Any]
    digest: str
    _weights: dict[str, SafeTensors] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest["name"]

    def file(self, relative: str) -> Path:
        """The path of a file that the manifest lists."""
        if relative not in self.manifest["files"]:
            raise ValueError(f"bundle {self.path} lists no file {relative!r} in its manifest.json.")
        return self.path / relative

    def component(self, name: str) -> dict[str, Any]:
        """The manifest's record of a component: onnx, weights, inputs, types, program."""
        if name not in self.manifest["components"]:
            known = ", ".join(self.manifest["components"])
            raise ValueError(f"bundle {self.path} has no component {name!r}, only {known}.")
        return self.manifest["components"][name]

    def weights(self, component: str) -> SafeTensors:
        """The component's safetensors, mapped once."""
        if component not in self._weights:
            path = self.file(self.component(component)["weights"])
            self._weights[component] = SafeTensors(path)
        return self._weights[component]


def open_bundle(path: str | os.PathLike[str], check: str = "full") -> Bundle:
    """Open and check a bundle directory.

    `check` "full" compares every file's SHA-256 (about 30 ms for 20 MB; once per process for a
    file that does not change), "sizes" compares sizes only. Raises FileNotFoundError or
    ValueError with one sentence.
    """
    root = Path(path)
    source = root / "manifest.json"
    if not root.is_dir() or not source.is_file():
        what = "has no manifest.json" if root.is_dir() else "is not a directory"
        raise FileNotFoundError(
            f"{root} {what}, expected a bundle; make one with: d2m export SPARSE -o {root}"
        )
    size = source.stat().st_size
    if size > MAX_MANIFEST:
        raise broken(root, f"its manifest.json has {size} bytes, expected at most {MAX_MANIFEST}")
    data = source.read_bytes()
    try:
        manifest = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise broken(root, f"its manifest.json is no JSON ({str(error)[:80]})") from None
    try:
        manifests.check(manifest)
    except ValueError as error:
        raise broken(root, str(error)) from None
    for name, row in manifest["files"].items():
        check_file(root, name, row, full=check == "full")
    bundle = Bundle(root, manifest, hashlib.sha256(data).hexdigest())
    for component in manifest["components"]:
        check_weights(bundle, component)
    return bundle


def check_file(root: Path, name: str, row: dict[str, Any], *, full: bool) -> None:
    """One listed file: there, inside the bundle, of the stated size, with the stated hash."""
    path = root / name
    if not path.is_file():
        raise broken(root, f"its file {name} is missing")
    if not path.resolve().is_relative_to(root.resolve()):
        raise broken(root, f"its file {name} is a link that leaves the directory")
    size = path.stat().st_size
    if size != row["size"]:
        raise broken(root, f"its file {name} has {size} bytes, expected {row['size']}")
    if full and (found := sha256(path)) != row["sha256"]:
        raise broken(root, f"its file {name} has SHA-256 {found[:12]}..., expected another")


def check_weights(bundle: Bundle, component: str) -> None:
    """Every weight that the component's program names exists in its file, with that shape."""
    row = bundle.component(component)
    tensors = bundle.weights(component).tensors
    for call in (*row["program"], *row.get("groups", {}).values()):
        for local, expected in row["types"][call["type"]]["weights"].items():
            name = call["prefix"] + local
            found = tensors[name].shape if name in tensors else None
            if found is None:
                raise broken(bundle.path, f"{row['weights']} has no tensor {name[:80]}")
            if list(found) != expected["shape"]:
                what = f"tensor {name[:80]} has shape {list(found)}, expected {expected['shape']}"
                raise broken(bundle.path, f"in {row['weights']} {what}")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, remembered for as long as the file does not change."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_ino, stat.st_mtime_ns, stat.st_size)
    if key not in _hashes:
        with open(path, "rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def refuse(constant: str) -> Any:
    """json's hook for NaN and infinities, which JSON does not know."""
    raise ValueError(f"{constant} is no JSON number")


def broken(root: Path, what: str) -> ValueError:
    """The error for a bundle whose contents are wrong."""
    return ValueError(f"bundle {root} cannot be used: {what}; fetch it or export it again.")
