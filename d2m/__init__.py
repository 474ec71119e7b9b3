"""Dense2MoE: a dense diffusion transformer becomes a sparse one (conversion and distillation).

Importing this package is cheap: torch and diffusers are imported by what needs them. Folders, from
the ground up; each one's docstring is its map:

    recipe/    the settings of a conversion, as data
    families/  one folder a family of models: row, weights, published configs, presets
    model/     the sparse transformer: op, FFN, groups of blocks, shared modulation, surgery
    kernels/   Triton kernels of the routed experts
    distill/   the student learns from the dense teacher
    plan/      before it is made: parameters, FLOPs, memory, what fits this machine
    report/    report.html and its charts
    lora/      a LoRA fused
    convert/   dense to sparse, in memory or streamed
    cli/       the command line

Files: `units` quantities as people read them, `shards` checkpoints larger than memory,
`components` the models of a pipeline directory and whether their weights fit, `generate` images
from one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel

# diffusers resolves the class that model_index.json names as ["d2m", "SparseFlux..."] by getattr on
# this package, and looks here for the base class that tells it how to load the component.
__all__ = ["SparseFluxTransformer2DModel", "__version__"]


def __getattr__(name: str) -> Any:
    """A family's sparse transformer class, or diffusers' ModelMixin, at first use (PEP 562)."""
    if name == "ModelMixin":
        from diffusers import ModelMixin

        value: Any = ModelMixin
    elif family := _classes().get(name):
        from d2m.model.sparse_transformer import sparse_class

        value = sparse_class(family)
    else:
        raise AttributeError(f"module 'd2m' has no attribute {name!r}")
    globals()[name] = value
    return value


def _classes() -> dict[str, Any]:
    """Name of a sparse class -> its family."""
    from d2m.families import FAMILIES

    return {family.names.sparse_class: family for family in FAMILIES}


def __dir__() -> list[str]:
    return sorted({*globals(), *_classes(), "ModelMixin"})
