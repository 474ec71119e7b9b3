"""Which recipe a name means for a model: groups are lists of block indices, so they fit one depth.

Presets are recipes. Those in `d2m/recipe/presets/` fit a model of any depth; those in
`d2m/families/FAMILY/presets/<x>d-<y>s/` are for models with x double and y single blocks and go
before the others of the same name. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from d2m.families import Family
from d2m.plan.hub import locate
from d2m.plan.model_config import subject_of
from d2m.recipe.recipe import Recipe, load

ANY_DEPTH = Path(__file__).parents[1] / "recipe" / "presets"
FAMILIES = Path(__file__).parents[1] / "families"


def presets_for(family: Family, depth: Mapping[str, int]) -> dict[str, Path]:
    """Preset name -> its file, for a model of `family`; `depth`: blocks by "double", "single"."""
    own = FAMILIES / family.names.name / "presets" / f"{depth['double']}d-{depth['single']}s"
    files = {path.stem: path for path in (*ANY_DEPTH.glob("*.json"), *own.glob("*.json"))}
    return dict(sorted(files.items()))


def preset_file(name: str, family: Family, depth: Mapping[str, int]) -> Path:
    """The file of preset `name` for such a model; ValueError names the presets there are for it."""
    files = presets_for(family, depth)
    name = match_case(name, files)
    if name not in files:
        raise ValueError(
            f"preset {name!r} is not known; expected one of {', '.join(files)} for "
            f"{family.names.title} with {depth['double']} double and {depth['single']} single "
            "blocks, or give a recipe file."
        )
    return files[name]


def match_case(name: str, names: Iterable[str]) -> str:
    """The one of `names` that differs from `name` at most in upper and lower case; else `name`."""
    return next((each for each in names if each.lower() == name.lower()), name)


def preset_of(name: str, dense: str | os.PathLike[str]) -> Path:
    """The file of preset `name` for the dense pipeline in a directory, or of a hub id.

    ValueError for a name that no model has, before anything is fetched; then as `locate`,
    `subject_of` and `preset_file`.
    """
    every = (*ANY_DEPTH.glob("*.json"), *FAMILIES.glob("*/presets/*/*.json"))
    names = sorted({path.stem for path in every})
    if match_case(name, names) not in names:
        raise ValueError(
            f"preset {name!r} is not known; expected one of {', '.join(names)}, or give a recipe "
            "file."
        )
    subject = subject_of(locate(dense))
    return preset_file(name, subject.family, subject.depth)


def recipe_named(recipe: Recipe | str | Path, dense: str | os.PathLike[str]) -> Recipe:
    """A recipe as it is, in a file (a Path, or text that ends in .json), or as a preset's name.

    Errors as `d2m.recipe.recipe.load` and `preset_of`.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path) or recipe.endswith(".json"):
        return load(recipe)
    return load(preset_of(recipe, dense))
