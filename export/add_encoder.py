"""A VAE encoder for a bundle that was exported without one, so that it takes images in.

Every other file of the bundle stays as it is; manifest.json gets the component.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.checks import DTYPES, need_extra
from runtime.bundle.directory import open_bundle
from runtime.files.atomic import replace_dir, temporary_dir

if TYPE_CHECKING:
    from export.checkpoint.pipeline import Component
    from runtime.bundle.directory import Bundle

Progress = Callable[[str, int, int], None]
NAME = "vae_encoder"


def add_vae_encoder(
    source: str | Path, bundle: str | Path, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Add the VAE encoder of the pipeline `source` to `bundle`; returns what `export_bundle` does.

    A signature no longer fits and is left out. Raises ValueError, FileNotFoundError, ImportError
    or OSError with one sentence; then the bundle is as it was.
    """
    need_extra()
    from export.bundle import (
        full_disk_named,
        graph_dtype,
        summary,
        torch_dtype,
        write_graphs,
        write_manifest,
    )
    from export.checkpoint.pipeline import open_components, open_pipeline
    from export.checkpoint.weights import place, write

    directory, final = Path(source), Path(bundle)
    family, _, sparse = open_pipeline(directory)
    opened = open_bundle(final)
    manifest = copy.deepcopy(opened.manifest)
    if NAME in manifest["components"]:
        raise ValueError(f"bundle {final} has a {NAME} already, expected one without.")
    if manifest["family"] != family.names.name:
        raise ValueError(
            f"bundle {final} is of the family {manifest['family']}, the pipeline {directory} of"
            f" {family.names.name}, expected the pipeline that it was exported from."
        )
    if manifest.get("plans"):
        raise ValueError(
            f"bundle {final} has plans, expected none: they would lack the encoder's; export the"
            " pipeline again."
        )
    components = open_components(directory, sparse, manifest["top_k_choices"])
    parts = {component.name: component for component in components}
    check_same_vae(opened, parts["vae_decoder"], directory)
    encoder = parts[NAME]
    dtype = next(name for name, each in DTYPES.items() if each == manifest["compute_dtype"])
    program = encoder.trace(torch_dtype(graph_dtype(NAME, dtype)))
    kind = stored_dtype(opened)
    with full_disk_named(final), temporary_dir(final) as folder:
        for name in manifest["files"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(opened.file(name), folder / name)
        weights = f"{NAME}.safetensors"
        hashes = {name: row["sha256"] for name, row in manifest["files"].items()}
        placed = place(program, lambda _: kind)
        hashes[weights] = write(folder / weights, placed, encoder.get, progress)
        manifest["components"][NAME] = write_graphs(folder, NAME, program, None)
        write_manifest(folder, manifest, hashes, progress)
        replace_dir(folder, final)
    return summary(final, manifest)


def stored_dtype(bundle: Bundle) -> Any:
    """What the bundle stores its VAE decoder in."""
    import torch

    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    rows = bundle.weights("vae_decoder").tensors.values()
    return kinds[max(rows, key=lambda row: row.size).dtype]


def check_same_vae(bundle: Bundle, decoder: Component, directory: Path) -> None:
    """ValueError unless the bundle's decoder has the convolutions of the pipeline's."""
    import numpy as np

    stored = bundle.weights("vae_decoder")
    kind = stored_dtype(bundle)
    for name, row in stored.tensors.items():
        if len(row.shape) < 4:
            continue
        own = decoder.get(name).detach().to(kind).float().numpy()
        if not np.array_equal(stored.array(name, "float32"), own):
            raise ValueError(
                f"bundle {bundle.path} has another VAE than the pipeline {directory} ({name}),"
                " expected the pipeline that it was exported from."
            )
