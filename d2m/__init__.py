"""Dense2MoE: a dense diffusion transformer becomes a sparse one (conversion and distillation).

Importing this package is cheap: torch and diffusers are imported by what needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from d2m.model import SparseFluxTransformer2DModel

# Public name -> module that defines it. diffusers resolves the class that model_index.json names
# as ["d2m", "SparseFluxTransformer2DModel"] by getattr on this package.
# It also looks here for the base class that tells it how to load the component.
_LAZY = {"SparseFluxTransformer2DModel": "d2m.model", "ModelMixin": "diffusers"}

__all__ = ["SparseFluxTransformer2DModel", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `name` from its module at first use (PEP 562)."""
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'd2m' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
