"""Shared modulation in a program: the embed call writes it, blocks read it in place of temb."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from export.graph.program import MODULATION

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from export.graph.trace import Spec


def attach(model: Any, embed: nn.Module) -> None:
    """Give the module of what is before the blocks the model's shared modulation, if it has one."""
    if shared := getattr(model, MODULATION, None):
        embed.modulation = shared


def output(embed: nn.Module, temb: Tensor) -> tuple[Tensor, ...]:
    """The shared modulation of temb [B, D]: [B, 6 D] (single) or [B, r] (lowrank); else nothing."""
    import torch.nn.functional as F

    shared: Any = getattr(embed, MODULATION, None)
    return () if shared is None else (shared.linear(F.silu(temb)),)


def block_embedding(tensors: Mapping[str, Tensor]) -> Tensor:
    """What a block's norms read in place of temb, where a model shares modulation, else temb."""
    return tensors[MODULATION] if MODULATION in tensors else tensors["temb"]


def spec(model: Any, dtype: torch.dtype) -> dict[str, Spec]:
    """The tensor of the environment, where the model has one."""
    from export.graph.trace import Spec

    shared = getattr(model, MODULATION, None)
    return {MODULATION: Spec(dtype, ("batch", shared.linear.out_features))} if shared else {}
