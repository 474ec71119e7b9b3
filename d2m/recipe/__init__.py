"""What a conversion is told, as data.

A recipe (JSON) enters, checked records leave. `presets/` holds the recipes for a model of any
depth; those for one depth lie with their family. Torch-free.

    recipe     The recipe of a conversion: how FFNs are split and how the student is distilled, as
               data
    structure  What a sparse model does with whole blocks and with modulation, as data: groups,
               drops, AdaLN
    records    JSON values that a person wrote, checked: unknown keys and wrong types are named,
               none guessed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from d2m.recipe.recipe import Recipe, SparseSpec, Stage, load, preset, presets
    from d2m.recipe.structure import AdaLN, Blocks

__all__ = ["AdaLN", "Blocks", "Recipe", "SparseSpec", "Stage", "load", "preset", "presets"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "AdaLN": "d2m.recipe.structure",
        "Blocks": "d2m.recipe.structure",
        "Recipe": "d2m.recipe.recipe",
        "SparseSpec": "d2m.recipe.recipe",
        "Stage": "d2m.recipe.recipe",
        "load": "d2m.recipe.recipe",
        "preset": "d2m.recipe.recipe",
        "presets": "d2m.recipe.recipe",
    },
)
