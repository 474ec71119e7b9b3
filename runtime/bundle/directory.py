"""A bundle directory: opened once, every file's size and hash checked, nothing executed.

A bundle is data: manifest.json, ONNX graphs, safetensors, plans, tokenizers. It may come from
anywhere, so a name that leaves the directory, by '..', by an absolute path or through a symbolic
link, is refused before anything is read. Plans and cubins are machine code all the same: take
them from whom you would take a program, require a signature, or use the backend "ort".
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.bundle import manifest as manifests
from runtime.bundle.control_record import KIND as CONTROLNET
from runtime.bundle.reading import broken, check_file, read_small, wrong_hash
from runtime.files.checked_json import parse_json
from runtime.files.hashes import Stamp, first_mismatch
from runtime.files.kinds import not_a
from runtime.files.tensors import SafeTensors

MAX_TENSORS = 1_000_000  # that the calls of a component may name
CHECKS = ("cached", "full", "sizes")


@dataclass
class Bundle:
    """An opened bundle. `digest` is the SHA-256 of manifest.json, and so of every file in it.

    `trusted`: why its graphs need no trial (runtime.bundle.trial); None where that is not known.

    What was hashed is what is used, even where files are replaced meanwhile: `read` hashes what it
    gives, and `weights` opens the files of `stamps`, those of the hashes (empty: unchecked).
    """

    path: Path
    manifest: dict[str, Any]
    digest: str
    stamps: dict[str, Stamp] = field(default_factory=dict, repr=False)
    trusted: str | None = None
    _weights: dict[str, SafeTensors] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest["name"]

    def file(self, relative: str) -> Path:
        """The path of a file that the manifest lists."""
        if relative not in self.manifest["files"]:
            raise ValueError(f"the manifest.json of bundle {self.path} lists no file {relative!r}.")
        return self.path / relative

    def read(self, relative: str, most: int = 1 << 32) -> bytes:
        """The bytes of a listed file; ValueError where it has over `most`, or another hash."""
        self.file(relative)
        data = read_small(self.path, relative, most)
        if self.stamps:
            row = self.manifest["files"][relative]
            found = hashlib.sha256(data).hexdigest()
            if found != row["sha256"]:
                raise wrong_hash(self.path, relative, found)
        return data

    def component(self, name: str) -> dict[str, Any]:
        """The manifest's record of a component: onnx, weights, inputs, types, program."""
        if name not in self.manifest["components"]:
            known = ", ".join(self.manifest["components"])
            raise ValueError(f"bundle {self.path} has no component {name!r}, only {known}.")
        return self.manifest["components"][name]

    def weights(self, component: str) -> SafeTensors:
        """The component's safetensors, mapped once."""
        if component not in self._weights:
            row = self.component(component)
            files = (row["weights"], *row.get("shards", ()))
            stamps = {self.path / name: stamp for name, stamp in self.stamps.items()}
            self._weights[component] = SafeTensors(*map(self.file, files), stamps=stamps or None)
        return self._weights[component]


def open_bundle(
    path: str | os.PathLike[str],
    check: str = "cached",
    key: str | os.PathLike[str] | None = None,
    controlnet: bool | None = False,
) -> Bundle:
    """Open and check a bundle directory.

    `check` "cached" compares every file's SHA-256, computed once for as long as the file stays
    (see runtime.files.hashes), "full" computes all of them anew, "sizes" compares sizes only: for
    looking, not for generating. With `key`, a public key's file, the manifest must be signed by it.
    `controlnet`: whether it must be a ControlNet's; None: either will do.
    Raises FileNotFoundError, ValueError or ImportError with one sentence.
    """
    if check not in CHECKS:
        raise ValueError(f"the check is {check!r}, expected one of {', '.join(CHECKS)}.")
    root = Path(path)
    source = root / "manifest.json"
    if not root.is_dir() or not source.is_file():
        cure = "make one with: d2m export PIPELINE -o NEW"
        raise FileNotFoundError(not_a("a bundle", root, cure))
    data = read_small(root, "manifest.json")
    digest = hashlib.sha256(data).hexdigest()
    if key is not None:
        from runtime.bundle.signature import check_signature  # needs cryptography

        check_signature(root, digest, key)
    try:
        manifest = parse_json(data)
    except ValueError as error:
        raise broken(root, f"its manifest.json is no JSON ({error})") from None
    try:
        manifests.check(manifest)
    except ValueError as error:
        raise broken(root, str(error)) from None
    if controlnet is not None and controlnet != (manifest["kind"] == CONTROLNET):
        raise ValueError(
            f"{root} holds no ControlNet but a whole model, expected the bundle of a ControlNet;"
            " make one with: d2m export CONTROLNET --base BUNDLE -o NEW"
            if controlnet
            else f"{root} holds a ControlNet, expected a bundle that generates images; name that"
            f" one, and this with --controlnet {root}."
        )
    files = manifest["files"]
    for name, row in files.items():
        check_file(root, name, row, full=False)  # sizes first: they are known at once
    bundle = Bundle(root, manifest, digest, trusted="signed" if key is not None else None)
    if check != "sizes":
        wanted = {name: row["sha256"] for name, row in files.items()}
        if wrong := first_mismatch(root, wanted, anew=check == "full", stamps=bundle.stamps):
            raise wrong_hash(root, *wrong)
    for component in manifest["components"]:
        check_weights(bundle, component)
    return bundle


def required_key() -> str | None:
    """The public key by which a bundle must be signed to generate from it; $D2M_PUBLIC_KEY."""
    return os.environ.get("D2M_PUBLIC_KEY") or None


def check_weights(bundle: Bundle, component: str) -> None:
    """Every weight that the component's program names exists in its file, with that shape."""
    row = bundle.component(component)
    if sum(len(row["types"][call["type"]]["weights"]) for call in row["program"]) > MAX_TENSORS:
        raise broken(bundle.path, f"the program of {component} names over {MAX_TENSORS} tensors")
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
