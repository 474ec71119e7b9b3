"""Modulation that blocks share: modules that take the place of diffusers' AdaLayerNormZero.

`full` keeps a Linear(D, 6D) in every norm. `single` (PixArt's) has one for all and a table a norm,
`lowrank` one Linear(D, r) for all and a Linear(r, 6D) a norm (ours). B batch, T tokens, D width.
The final norm (AdaLayerNormContinuous) stays as it is.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m.families import Family, family_of_model
from d2m.recipe.structure import AdaLN, lowrank_default

# Of width D: what a norm modulates. The last modulates for two attentions.
CHUNKS = {"AdaLayerNormZero": 6, "AdaLayerNormZeroSingle": 3, "SD35AdaLayerNormZeroX": 9}


class SharedModulation(nn.Module):
    """What all norms read: `linear(silu(temb))`, [B, D] -> [B, n D] (single) or [B, r] (lowrank).

    n is 6, or 9 where a norm has as many chunks.


    Without gradients the last answer is kept with the tensor it belongs to, since every norm asks
    with the same one: FLUX.1 has 76 norms, and the matrix would be read from memory 76 times.
    """

    def __init__(self, dim: int, out: int, bias: bool, dtype=None, device=None):  # type: ignore[no-untyped-def]
        super().__init__()
        self.linear = nn.Linear(dim, out, bias=bias, dtype=dtype, device=device)
        self._last: tuple[Tensor, int, Tensor] | None = None

    def forward(self, temb: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._last = None  # a kept graph would be walked twice
            return self.linear(F.silu(temb))
        weight = self.linear.weight
        version = 0 if weight.is_inference() else weight._version
        if self._last is None or self._last[0] is not temb or self._last[1] != version:
            self._last = (temb, version, self.linear(F.silu(temb)))
        return self._last[2]


class SharedAdaLN(nn.Module):
    """A norm of CHUNKS on shared modulation.

    Takes and returns what they do: (x [B, T, D], emb [B, D]) -> the modulated x and, with 3 chunks,
    the gate, with 6 gate_msa, shift_mlp, scale_mlp, gate_mlp, each [B, D], with 9 these, x
    modulated for the second attention, and its gate.
    Parameters: `table` [chunks * D] (single) or `up`, Linear(r, chunks * D) (lowrank). The shared
    module is the model's `modulation`; here it is only referred to, so a checkpoint holds it once.
    """

    def __init__(self, shared: SharedModulation, dim: int, chunks: int, rank: int | None):
        super().__init__()
        weight = shared.linear.weight
        kind: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.chunks = chunks
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        if rank is None:
            self.table = nn.Parameter(torch.zeros(chunks * dim, **kind))
        else:
            self.up = nn.Linear(rank, chunks * dim, **kind)
        self._shared = (shared,)  # in a tuple, or it would be a submodule of every norm

    def modulation(self, emb: Tensor) -> Tensor:
        """[B, D] -> [B, chunks * D]; in mode single the first so many of the shared."""
        shared = self._shared[0](emb)
        if hasattr(self, "up"):
            return self.up(shared)
        return shared[:, : len(self.table)] + self.table

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if emb is None:
            raise ValueError("SharedAdaLN got no emb; expected the model's temb [B, D].")
        shift, scale, *rest = self.modulation(emb).chunk(self.chunks, dim=1)
        x = self.norm(x)
        first = x * (1 + scale[:, None]) + shift[:, None]
        if self.chunks < 9:
            return first, *rest
        *gates, shift, scale, gate = rest
        return first, *gates, x * (1 + scale[:, None]) + shift[:, None], gate

    def extra_repr(self) -> str:
        return f"chunks={self.chunks}"


class SharedModulator(SharedAdaLN):
    """As SharedAdaLN for a block that norms by itself: emb [B, D] -> its modulation [B, n D]."""

    def forward(self, emb: Tensor) -> Tensor:  # type: ignore[override]
        return self.modulation(emb)


def modulator(module: nn.Module) -> bool:
    """Whether a module is modulation alone: SiLU and Linear(D, n D), as in Qwen-Image's blocks."""
    found = list(module) if isinstance(module, nn.Sequential) else []
    if [type(each) for each in found] != [nn.SiLU, nn.Linear]:
        return False
    return found[1].out_features % found[1].in_features == 0


def norms(model: nn.Module) -> dict[str, int]:
    """Every block norm with modulation of its own or a shared one: name -> chunks of width D.

    Modulation that stands alone (`modulator`) counts as one.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, SharedAdaLN):
            found[name] = module.chunks
        elif type(module).__name__ in CHUNKS:
            found[name] = CHUNKS[type(module).__name__]
        elif modulator(module):
            linear: Any = module[1]  # type: ignore[index]
            found[name] = linear.out_features // linear.in_features
    return found


def own_linear(names: Container[str], norm: str) -> str:
    """The name of a dense norm's own Linear, of all parameters' names."""
    return f"{norm}.linear" if f"{norm}.linear.weight" in names else f"{norm}.1"


def rank_of(adaln: AdaLN, dim: int, chunks: int) -> int | None:
    """The rank that `adaln` means at width D with that many chunks over all norms, None for none.

    ValueError for a rank over D, which would be more than full.
    """
    if adaln.mode != "lowrank":
        return None
    rank = adaln.rank or min(dim, lowrank_default(dim, chunks))
    if rank > dim:
        raise ValueError(f"adaln.rank is {rank}; expected 1 to {dim}, the model's width.")
    return rank


def share_adaln(model: nn.Module, adaln: AdaLN, family: Family | None = None) -> nn.Module:
    """Replace every block's norm for the mode of `adaln`, in place; returns the model.

    Only structure; `d2m.convert.modulation_fit` has values. With mode full nothing changes.
    """
    if adaln.mode == "full":
        return model
    lists = [name for _, name in (family or family_of_model(model)).blocks.kinds]
    found = {n: c for n, c in norms(model).items() if n.split(".")[0] in lists}
    if not found:
        raise ValueError(
            f"adaln.mode is {adaln.mode}, but this model's blocks have no modulation of their own; "
            "expected full: take `adaln` out of the recipe."
        )
    dim = int(model.inner_dim)  # type: ignore[arg-type]
    rank = rank_of(adaln, dim, sum(found.values()))
    weight = next(model.get_submodule(next(iter(found))).parameters())
    kind: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    shared = SharedModulation(dim, rank or max(found.values()) * dim, rank is None, **kind)
    model.modulation = shared  # not `adaln`: diffusers finds fields of the config before modules
    for name, chunks in found.items():
        parent, _, child = name.rpartition(".")
        cls = SharedModulator if modulator(model.get_submodule(name)) else SharedAdaLN
        setattr(model.get_submodule(parent), child, cls(shared, dim, chunks, rank))
    return model
