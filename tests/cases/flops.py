"""FLOPs of `d2m::routed_experts` for torch's FlopCounterMode, which cannot look into a custom op.

A file of its own: torch's flop counter imports triton where it is installed, .2 s that training and
drawing do not need.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import d2m.model.experts_op  # noqa: F401 (defines the op)


def routed_experts_flop(  # type: ignore[no-untyped-def]
    x_shape, logits_shape, w1_shape, b1_shape, w2_shape, top_k: int, *args, out_shape=None, **kwargs
) -> int:
    """What FlopCounterMode counts: 2 products of T K rows (a gated w1 is twice as wide)."""
    tokens, dim = x_shape
    return 2 * tokens * top_k * dim * (w1_shape[2] + w2_shape[1])


@cache
def register() -> None:
    """Make every FlopCounterMode of this process that is made from now on count the op."""
    from torch.utils.flop_counter import register_flop_formula

    formula: Any = register_flop_formula(torch.ops.d2m.routed_experts)
    formula(routed_experts_flop)
