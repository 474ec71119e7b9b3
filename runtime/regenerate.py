"""An image generated again from what its PNG says: same bundle, same settings, same batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.files.checked_json import printable, show
from runtime.image import MAX_SCALE, enlarge, settings_of
from runtime.pipeline import Pipeline
from runtime.request import check_request, whole_number

if TYPE_CHECKING:
    from PIL.Image import Image

ARGUMENTS = (
    *("prompt", "negative", "seed", "steps", "guidance"),
    *("height", "width", "top_k", "kappa", "sigmas", "cache", "strength"),
)
IMAGES = ("image", "mask", "control", "references")


def regenerate(
    path: str | os.PathLike[str],
    bundle: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    *,
    images: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> tuple[Image, dict[str, Any]]:
    """(the image, a comparison): generates what the PNG at `path` says that it is.

    `images`: of one that was made from others (IMAGES), those.
    `backend` "auto" takes the one that the image was generated on; `options` (threads, experts,
    offload) are those of runtime.load. The comparison holds `same`, `pixels_that_differ`, the
    `largest_difference` of a colour value (of 255), and the settings. Raises FileNotFoundError,
    ImportError or ValueError with one sentence: no PNG of ours, generated from latents that were
    given, from other images, or from another bundle than this one.
    """
    settings = settings_of(path)
    if not all(isinstance(settings.get(name), str) for name in ("bundle", "prompt")):
        raise ValueError(f"{path} does not say how it was made, expected a PNG that d2m generated.")
    if settings.get("seed") is None:
        raise ValueError(f"{path} was generated from given latents, expected from a seed.")
    rows = whole_number(settings.get("batch", 1), f"the batch that {path} names", 1, 1024)
    if backend == "auto":
        backend = str(settings.get("backend"))
    pipeline = Pipeline(bundle, backend, max_batch=rows, min_batch=rows, **options)
    digest = pipeline.bundle.digest
    if settings["bundle"] != digest:
        raise ValueError(
            f"{path} was generated from bundle {printable(settings['bundle'][:12])}... named"
            f" {str(settings.get('name'))[:60]!r}, but {pipeline.bundle.path} is {digest[:12]}...;"
            " name the bundle that it was generated from."
        )
    if settings.get("loras", []) != [each.row() for each in pipeline.loras]:
        listed = ", ".join(
            f"{str(each.get('file'))[:60]} at {each.get('strength')}"
            for each in settings.get("loras", [])
            if isinstance(each, dict)
        )
        raise ValueError(
            f"{path} was generated with {printable(listed) or 'no LoRA'}, expected the same files"
            " at the same strengths; name them with --lora FILE:STRENGTH."
        )
    arguments: dict[str, Any] = {name: settings[name] for name in ARGUMENTS if name in settings}
    given = dict(images or {})
    if "controlnets" in settings:
        arguments |= same_controls(path, settings, arguments, given, pipeline)
        given.pop("control", None)
    arguments |= same_images(path, settings, arguments, given, pipeline)
    scale = whole_number(settings.get("scale", 1), f"the scale that {path} names", 1, MAX_SCALE)
    image = pipeline(**arguments, progress=progress)
    assert not isinstance(image, list | np.ndarray)
    image = enlarge(image, scale) if scale > 1 else image
    return image, compare(path, image) | {"settings": settings, "backend": pipeline.backend}


def same_images(
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    given: Mapping[str, Any],
    pipeline: Pipeline,
) -> dict[str, Any]:
    """The images that were given; ValueError unless the file at `path` was generated from them."""
    found = {name: image for name, image in given.items() if image is not None}
    for name in IMAGES:
        if name in settings and name not in found:
            what = {"image": "an image", "references": "references"}.get(name, f"a {name}")
            many = name == "references"
            raise ValueError(
                f"{path} was generated from {what}, expected the same"
                f" {'files: name them' if many else 'file: name it'} with --{name.rstrip('s')}."
            )
        if name in found and name not in settings:
            raise ValueError(f"{path} was generated without {name}, expected none; leave it out.")
    if found:
        nets = pipeline.controlnets if "control" in arguments else ()
        said = check_request(pipeline.manifest, **arguments, **found, controlnets=nets).settings(0)
        other = [name for name in found if said[name] != settings[name]]
        if other:
            raise ValueError(
                f"{path} was generated from another {other[0].rstrip('s')} than the one that is"
                f" given: its pixels have SHA-256 {shown(settings[other[0]])}, these"
                f" {shown(said[other[0]])}; name the file that it was generated from."
            )
    return found


def shown(digests: Any) -> str:
    """The beginning of a digest, or of each of a list."""
    each = digests if isinstance(digests, list) else [digests]
    return ", ".join(f"{printable(str(value))[:12]}..." for value in each[:10])


def same_controls(
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    given: Mapping[str, Any],
    pipeline: Pipeline,
) -> dict[str, Any]:
    """The arguments about ControlNets; ValueError unless the file was generated with these."""
    rows = settings["controlnets"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} says controlnets {show(rows)}, expected a list of them.")
    named = printable(", ".join(str(row.get("name"))[:60] for row in rows))
    if given.get("control") is None or not pipeline.controlnets:
        raise ValueError(
            f"{path} was generated with the ControlNets {named}, expected the same and the same"
            " images: name them with --controlnet and --control, in this order."
        )
    found = {"control": given["control"]}
    for name in ("scale", "range", "mode"):
        values = [row.get(name) for row in rows]
        found[f"control_{name}"] = None if values == [None] * len(rows) else values
    asked = {**arguments, **given, **found, "controlnets": pipeline.controlnets}
    made = check_request(pipeline.manifest, **asked)
    if made.settings(0).get("controlnets") != rows:
        raise ValueError(
            f"{path} was generated with other ControlNets or images than those that are given,"
            f" expected {named} with their images in this order."
        )
    return found


def compare(path: str | os.PathLike[str], image: Image) -> dict[str, Any]:
    """How an image's pixels differ from a file's."""
    from PIL import Image as images

    with images.open(path) as opened:
        before = np.asarray(opened.convert("RGB"), np.int16)
    after = np.asarray(image, np.int16)
    if before.shape != after.shape:
        raise ValueError(
            f"{path} is {before.shape[1]} x {before.shape[0]} pixels but says that it is"
            f" {after.shape[1]} x {after.shape[0]}; it was changed after it was generated."
        )
    differences = np.abs(before - after).max(-1)
    return {
        "same": not differences.any(),
        "pixels_that_differ": int(np.count_nonzero(differences)),
        "largest_difference": int(differences.max()),
    }
