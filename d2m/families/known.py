"""Families of diffusion transformers: which there are, and which one a model is of.

A family is a row (d2m/families/family.py) in a file of its own; supporting another model is another
row, not another branch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.families.chroma import CHROMA
from d2m.families.family import Family
from d2m.families.flux import FLUX
from d2m.families.flux2 import FLUX2
from d2m.families.pixart import PIXART
from d2m.families.qwen import QWEN
from d2m.families.sd3 import SD3
from d2m.families.zimage import ZIMAGE
from runtime.files.checked_json import read_json
from runtime.files.kinds import not_a

if TYPE_CHECKING:
    from torch import nn

FAMILIES = (FLUX, FLUX2, SD3, PIXART, QWEN, ZIMAGE, CHROMA)

_VISION = (
    "whose text encoder sees the images by its vision part, which d2m does not export; expected"
    " QwenImagePipeline, which changes an image too (d2m run --image)"
)
# Pipelines of known families that cannot be taken, and why.
REFUSED = {
    "QwenImageEditPipeline": _VISION,
    "QwenImageEditPlusPipeline": _VISION,
    "QwenImageEditInpaintPipeline": _VISION,
}


def _known() -> str:
    rows = ((f.names.title, (*f.names.pipelines, *f.names.editors)) for f in FAMILIES)
    return ", ".join(f"{' or '.join(classes)} ({title})" for title, classes in rows)


def pairs_for(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """Which of `family.PAIRS` a pipeline directory of a known family can learn from.

    None unless it is given an image besides the prompt.
    """
    editors = family_of(directory).names.editors
    return editors.get(str(read_json(Path(directory) / "model_index.json")["_class_name"]), ())


def family_of(source: str | os.PathLike[str] | Mapping[str, Any]) -> Family:
    """The family of a pipeline directory, or of a model_index.json or transformer config dict.

    Raises FileNotFoundError if the directory or its model_index.json is missing, ValueError if it
    is no pipeline or of a class that is not known; the sentence says which are.
    """
    if isinstance(source, Mapping):
        return _by_class(str(source.get("_class_name")), "this config")
    index = Path(source) / "model_index.json"
    if not index.is_file():
        cure = "diffusers' save_pretrained writes one"
        raise FileNotFoundError(not_a("a diffusers pipeline directory", source, cure))
    name = read_json(index).get("_class_name")
    if not isinstance(name, str):
        raise ValueError(
            f"{index} is not a diffusers pipeline index; expected JSON with a _class_name."
        )
    return _by_class(name, str(source))


def _by_class(name: str, what: str) -> Family:
    for family in FAMILIES:
        own = family.names
        if name in (*own.pipelines, *own.editors, own.dense_class, own.sparse_class, *own.aliases):
            return family
    if name in REFUSED:
        raise ValueError(f"{what} is of class {name}, {REFUSED[name]}.")
    raise ValueError(f"{what} is of class {name}, which d2m does not know; known are {_known()}.")


def family_of_model(model: nn.Module) -> Family:
    """The family of a transformer in memory, by its class or a base class of it."""
    return _by_object(model, "this model")


def family_of_pipeline(pipe: Any) -> Family:
    """The family of a pipeline in memory, by its class or a base class of it."""
    return _by_object(pipe, "this pipeline")


def _by_object(found: Any, what: str) -> Family:
    for cls in type(found).__mro__:
        for family in FAMILIES:
            own = family.names
            if cls.__name__ in (*own.pipelines, *own.editors, own.dense_class, own.sparse_class):
                return family
    return _by_class(type(found).__name__, what)
