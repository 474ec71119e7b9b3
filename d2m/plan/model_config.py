"""What a plan is made for: a model's config and image size, from a directory or shipped as JSON.

Reads JSON only, never a weight, and needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2m.families import FLUX, Family, family_of
from d2m.families.encoders import EncoderSize
from d2m.families.generation_defaults import generation_defaults
from d2m.recipe.structure import KINDS
from runtime.files.checked_json import read_json
from runtime.files.kinds import kind, not_a

PIXELS = 16  # read: the VAEs are f8 and a token is a patch of 2 x 2 latents
EXPERTS = ("num_experts", "shared_ratio", "expert_ratio", "top_k", "shares")
BLOCKS = ("groups", "kappa", "alpha", "drop")


@dataclass(frozen=True)
class Subject:
    """A transformer to plan for.

    config: diffusers' fields, none missing; sparse: for a sparse model its structure under a
    recipe's keys, None for a dense one; height, width: of its images, in pixels; pixels: the side
    of what one image token shows; text_tokens: length of the text.
    """

    title: str
    family: Family
    config: Mapping[str, Any]
    sparse: Mapping[str, Any] | None = None
    height: int = 1024
    width: int = 1024
    text_tokens: int = 512
    pixels: int = PIXELS

    @property
    def depth(self) -> dict[str, int]:
        """Blocks by kind."""
        found = {kind: self.config[field] for kind, field in self.family.blocks.depths}
        return {kind: found.get(kind, 0) for kind in KINDS}

    @property
    def encoders(self) -> Mapping[str, EncoderSize]:
        """Folder of a component beside the transformer -> its size in the published model."""
        found = self.family.plan.encoders
        return found(self.config) if callable(found) else found


def shipped_configs() -> dict[str, Path]:
    """The models whose config comes with d2m, without weights: name -> its file."""
    found = Path(__file__).parents[1].glob("families/*/configs/*.json")
    return {path.stem: path for path in sorted(found, key=lambda path: path.stem)}


def subject_of(model: str | os.PathLike[str]) -> Subject:
    """The model that MODEL names: shipped config, pipeline directory or transformer directory.

    FileNotFoundError where it is nothing of these, ValueError where its JSON is broken or of a
    class that is not known; in one sentence.
    """
    if file := shipped_configs().get(str(model)):
        row = read_json(file)
        config = row.pop("transformer")
        return Subject(row.pop("title"), family_of(config), sizes(config, str(model)), **row)
    root = Path(model)
    if (root / "model_index.json").is_file():
        return _of_transformer(root / "transformer", root, family_of(root))
    if (root / "config.json").is_file():
        family = family_of(read_json(root / "config.json"))
        inside = (root.parent / "model_index.json").is_file() and root.name == "transformer"
        return _of_transformer(root, root.parent if inside else None, family)
    if kind(root)[1]:
        raise FileNotFoundError(not_a("a pipeline or transformer directory", root, ""))
    what = "has neither model_index.json nor config.json" if root.is_dir() else "is no directory"
    raise FileNotFoundError(
        f"{str(model)!r} {what}; expected a pipeline or transformer directory, dense or sparse, or "
        f"one of the shipped configs: {', '.join(shipped_configs())}."
    )


def _of_transformer(folder: Path, pipeline: Path | None, family: Family) -> Subject:
    """A transformer's directory, and the pipeline around it where there is one."""
    file = folder / "config.json"
    raw = read_json(file)
    if family_of(raw) is not family:
        raise ValueError(f"{str(file)!r} is of another family than its pipeline; copy it again.")
    sparse: dict[str, Any] | None = None
    if raw.get("_class_name") == family.names.sparse_class:
        recipe = pipeline / "recipe.json" if pipeline else None
        record = read_json(recipe) if recipe and recipe.is_file() else {}
        # The keys of a recipe that are structure, from the model's own config.
        blocks = {key: raw[key] for key in BLOCKS if raw.get(key) is not None}
        adaln = {"mode": raw.get("adaln", "full"), "rank": raw.get("adaln_rank")}
        sparse = {"name": record.get("name", "of its own"), "blocks": blocks, "adaln": adaln}
        sparse |= {key: raw[key] for key in EXPERTS if raw.get(key) is not None}
    image: dict[str, int] = {}
    if pipeline is not None:
        values = generation_defaults(pipeline)
        image = {key: values[key] for key in ("height", "width")}
        image["text_tokens"] = family.plan.text_before + values["max_sequence_length"]
        image["pixels"] = _pixels(pipeline / "vae" / "config.json", family)
    return Subject(str(pipeline or folder), family, sizes(raw, str(file)), sparse, **image)


def _pixels(vae: Path, family: Family) -> int:
    """The side of an image token in pixels: a patch of 2 x 2 latents, halved by the VAE."""
    return 2 * 2 ** family.plan.halvings(read_json(vae)) if vae.is_file() else PIXELS


def sizes(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A config's fields that decide sizes; ValueError names one that is no whole number.

    A config that names no class counts as FLUX's. The family's `others` are kept as they are.
    """
    family = family_of(raw) if "_class_name" in raw else FLUX
    config = {name: raw.get(name, default) for name, default in family.plan.sizes.items()}
    out = raw.get("out_channels")
    for name, value in (*config.items(), ("out_channels", 1 if out is None else out)):
        low = 0 if name.endswith("layers") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{source}: {name} is {value!r:.60}; expected {low} or more.")
    config |= {name: raw.get(name) for name in family.plan.others}
    return config | {"out_channels": out}
