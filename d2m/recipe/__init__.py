"""The settings of a conversion, as data.

A recipe (JSON) enters, checked records leave. `presets/` holds the recipes for a model of any
depth; those for one depth lie with their family. Torch-free.

    recipe     The recipe of a conversion: how FFNs are split and how the student is distilled
    structure  What a sparse model does with whole blocks and with modulation, as data: groups
    records    JSON values that a person wrote, checked: unknown keys and wrong types are named
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from d2m.recipe.recipe import Recipe, SparseSpec, Stage, load, preset, presets
    from d2m.recipe.structure import AdaLN, Blocks

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "d2m.recipe.recipe": "Recipe SparseSpec Stage load preset presets",
        "d2m.recipe.structure": "AdaLN Blocks",
    },
)
