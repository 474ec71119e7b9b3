"""An image made again from what its PNG says: same bundle, same settings, same batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.files.checked_json import printable
from runtime.image import settings_of
from runtime.pipeline import Pipeline
from runtime.request import whole

if TYPE_CHECKING:
    from PIL.Image import Image

KNOBS = (
    *("prompt", "negative", "seed", "steps", "guidance"),
    *("height", "width", "top_k", "kappa", "sigmas"),
)


def draw_again(
    path: str | os.PathLike[str],
    bundle: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    *,
    threads: int | None = None,
    experts: str = "auto",
    offload: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Image, dict[str, Any]]:
    """(the image, how it compares): draws what the PNG at `path` says that it is.

    `backend` "auto" takes the one that the image was drawn on. The comparison holds `same`,
    `pixels_that_differ`, the `largest_difference` of a colour value (of 255), and the settings.
    Raises FileNotFoundError, ImportError or ValueError with one sentence: no PNG of ours, drawn
    from latents that were given, or from another bundle than this one.
    """
    said = settings_of(path)
    if not all(isinstance(said.get(name), str) for name in ("bundle", "prompt")):
        raise ValueError(f"{path} does not say how it was made, expected a PNG that d2m has drawn.")
    if said.get("seed") is None:
        raise ValueError(f"{path} was drawn from latents that were given, expected from a seed.")
    rows = whole(said.get("batch", 1), f"the batch that {path} names", 1, 1024)
    if backend == "auto":
        backend = str(said.get("backend"))
    pipeline = Pipeline(
        bundle,
        backend,
        threads=threads,
        experts=experts,
        offload=offload,
        max_batch=rows,
        min_batch=rows,
    )
    digest = pipeline.bundle.digest
    if said["bundle"] != digest:
        raise ValueError(
            f"{path} was drawn from bundle {printable(said['bundle'][:12])}... named"
            f" {str(said.get('name'))[:60]!r}, but {pipeline.bundle.path} is {digest[:12]}...;"
            f" name the bundle that it was drawn from."
        )
    knobs: dict[str, Any] = {name: said[name] for name in KNOBS if name in said}
    image = pipeline(**knobs, progress=progress)
    assert not isinstance(image, list)
    return image, compare(path, image) | {"settings": said, "backend": pipeline.backend}


def compare(path: str | os.PathLike[str], image: Image) -> dict[str, Any]:
    """How an image's pixels differ from a file's."""
    from PIL import Image as images

    with images.open(path) as opened:
        before = np.asarray(opened.convert("RGB"), np.int16)
    after = np.asarray(image, np.int16)
    if before.shape != after.shape:
        raise ValueError(
            f"{path} is {before.shape[1]} x {before.shape[0]} pixels but says that it is"
            f" {after.shape[1]} x {after.shape[0]}; it was changed after it was drawn."
        )
    differences = np.abs(before - after).max(-1)
    return {
        "same": not differences.any(),
        "pixels_that_differ": int(np.count_nonzero(differences)),
        "largest_difference": int(differences.max()),
    }
