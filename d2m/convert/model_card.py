"""The model card of a sparse pipeline: README.md with the front matter the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2m.units import count_text, percent

TAGS = ("d2m", "dense2moe", "mixture-of-experts", "text-to-image")


def model_card(
    *,
    name: str,
    base_model: str,
    recipe: Mapping[str, Any],
    parameters: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    licence: str | None = None,
    family: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """README.md of a sparse pipeline directory.

    Args:
        base_model: what was converted, a hub id or a path.
        recipe: `recipe.to_dict`; parameters: {"dense", "sparse"} -> `parameters.count`.
        scores: {"dense", "sparse"} -> result of `calib.shapes.suite.evaluate`; either may be
            missing.
        defaults: keywords a pipeline call should get (`generation_defaults`).
        licence: the base model's, as the hub names it; None leaves it to the reader to look up.
        family: what the base model is, such as FLUX.1 [dev]; tags: the hub's words for it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence,
        tags=[*TAGS, *tags],
    )
    found = scores or {}
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md.j2")),
        name=name,
        family=family,
        recipe=recipe,
        groups=[g for each in recipe.get("blocks", {}).get("groups", {}).values() for g in each],
        dense=parameters["dense"],
        sparse=parameters["sparse"],
        scores={side: found[side] for side in ("dense", "sparse") if side in found},
        defaults=defaults or {},
        licence=licence,
        plain=_plain,
        count_text=count_text,
        percent=percent,
        repr=repr,
    )
    return f"{card}\n"


def _plain(text: str) -> str:
    """One line that breaks neither a table nor a code span."""
    return " ".join(text.split()).replace("`", "'").replace("|", "/")
