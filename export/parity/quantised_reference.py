"""Torch doing the arithmetic of a quantised bundle: its weights, and what they are multiplied with.

The pipeline's own modules stay: Linears get the weights that the bundle's stand for and round what
they are given, as their format says; experts do the same per expert. So nothing of the graphs'
arithmetic in integers or FP8 is used, and it must come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from d2m.model.routing import activate, route
from export.checkpoint.weights import sources_of
from export.quant.activations import rounded
from export.quant.formats import Format, stored_as
from export.quant.weights import unpack

if TYPE_CHECKING:
    from torch import Tensor, nn

    from runtime.bundle.directory import Bundle
    from runtime.files.tensors import SafeTensors


def quantise(model: nn.Module, bundle: Bundle) -> None:
    """Give a transformer, in place, the quantised weights and products of a bundle."""
    component = bundle.component("transformer")
    tensors = bundle.weights("transformer")
    for call in component["program"]:
        weights = component["types"][call["type"]]["weights"]
        for local in weights:
            if f"{local}_scale" in weights:
                name = call["prefix"] + local
                kind = stored_as(tensors.find(name).dtype, f"{local}_scale_2" in weights)
                quantise_one(model, name, parts_of(kind, tensors, name), kind)


def parts_of(kind: Format, tensors: SafeTensors, name: str) -> dict[str, Tensor]:
    """A quantised weight's tensors, as the bundle's file has them."""
    import torch

    found = {}
    for suffix, dtype in kind.parts.items():
        raw = torch.from_numpy(tensors.raw(name + suffix).copy())
        found[suffix] = (
            raw if raw.dtype == getattr(torch, dtype) else raw.view(getattr(torch, dtype))
        )
    return found


def quantise_one(model: nn.Module, name: str, parts: Mapping[str, Tensor], kind: Format) -> None:
    """One weight of the bundle, in the module or modules that have it."""
    stem, _, last = name.rpartition(".")
    if last in ("w1", "w2"):
        experts: Any = model.get_submodule(stem)
        own = getattr(experts, last)
        own.data.copy_(unpack(kind, parts))
        experts.forward = lambda *given: experts_of(experts, kind, *given)
        return
    row = 0
    for source in sources_of(name) if name not in dict(model.named_parameters()) else (name,):
        linear: Any = model.get_submodule(source.rpartition(".")[0])
        columns = linear.out_features
        whole = unpack(kind, parts).t()
        linear.weight.data.copy_(whole[row : row + columns])
        linear.register_forward_pre_hook(lambda module, args: (rounded(kind, args[0]), *args[1:]))
        row += columns


def experts_of(experts: Any, kind: Format, x: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """Routed experts, plainly: x [T, D], logits [T, E] -> [T, D].

    The gate weighs the hidden rows before they are rounded, as in the graphs.
    """
    import torch

    _, gates, chosen = route(logits, top_k)
    y, left = torch.zeros_like(x), rounded(kind, x)
    for expert in range(experts.w1.shape[0]):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        m = left[token] @ experts.w1[expert]
        m = m if experts.b1 is None else m + experts.b1[expert]
        h = activate(m, experts.activation) * gates[token, place].unsqueeze(-1)
        y.index_add_(0, token, rounded(kind, h) @ experts.w2[expert])
    return y
