"""A realisation of the routed experts with `torch.nn.functional.grouped_mm`: no count on the host.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen. For CUDA from sm_90 up where
Triton is missing; on older GPUs and on a CPU grouped_mm is itself a loop over experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from d2m.model.routing import activate, activate_backward, route, route_backward, routing_dtype
from d2m.model.sorted_loop import sum_pairs


def group_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """chosen [T, K] -> order [T*K] (pairs sorted by expert), its inverse, expert of every sorted
    pair, and the experts' ends [E] int32. All stay on the device."""
    flat = chosen.reshape(-1)
    owner, order = torch.sort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    boundaries = torch.arange(experts, device=owner.device)
    ends = torch.searchsorted(owner, boundaries, right=True).to(torch.int32)
    return order, inverse, owner, ends


def laid_out(weights: Tensor) -> Tensor:
    """[E, a, b] as grouped_mm reads it: each expert's rows, or its columns, in one piece."""
    return weights if 1 in weights.stride()[1:] else weights.contiguous()


def before_activation(
    rows: Tensor, w1: Tensor, b1: Tensor | None, owner: Tensor, ends: Tensor
) -> Tensor:
    """rows [n, D], sorted by their owners, through the up-projections: [n, H], or [n, 2 H]."""
    before = F.grouped_mm(rows, laid_out(w1), offs=ends)
    return before if b1 is None else before + b1.index_select(0, owner)


def forward_grouped(
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    top_k: int,
    activation: str = "gelu_tanh",
) -> Tensor:
    """The op's value; arguments as `d2m.model.experts_op.experts_op`."""
    _, gates, chosen = route(logits.to(routing_dtype(x)), top_k)
    order, inverse, owner, ends = group_by_expert(chosen, w1.shape[0])
    rows = x.index_select(0, order // top_k)
    scale = gates.reshape(-1)[order].to(x.dtype)[:, None]
    hidden = activate(before_activation(rows, w1, b1, owner, ends), activation) * scale
    return sum_pairs(F.grouped_mm(hidden, laid_out(w2), offs=ends), inverse, x.shape[0], top_k)


def backward_grouped(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    top_k: int,
    need_x: bool,
    need_weights: bool,
    activation: str = "gelu_tanh",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, logits, w1, b1, w2); empty where not needed or not there. Recomputes
    hidden."""
    probabilities, gates, chosen = route(logits.to(routing_dtype(x)), top_k)
    order, inverse, owner, ends = group_by_expert(chosen, w1.shape[0])
    tokens = order // top_k
    rows, drows = x.index_select(0, tokens), dy.to(x.dtype).index_select(0, tokens)
    scale = gates.reshape(-1)[order].to(x.dtype)[:, None]
    before = before_activation(rows, w1, b1, owner, ends)
    hidden = activate(before, activation)
    dhidden = F.grouped_mm(drows, laid_out(w2).transpose(1, 2), offs=ends)
    dgates = (dhidden * hidden).sum(1, dtype=probabilities.dtype)
    dbefore = activate_backward(dhidden * scale, before, activation)
    dw1, db1, dw2 = (w1.new_empty(0) for _ in range(3))
    if need_weights:
        dw1 = F.grouped_mm(rows.T, dbefore, offs=ends)
        dw2 = F.grouped_mm((hidden * scale).T, drows, offs=ends)
        if b1 is not None:
            # A matmul with the experts' indicator rows: index_add would need atomics on CUDA.
            experts = torch.arange(w1.shape[0], device=owner.device)[:, None]
            db1 = (experts == owner[None, :]).to(dbefore.dtype) @ dbefore
    dx = x.new_empty(0)
    if need_x:
        dpairs = F.grouped_mm(dbefore, laid_out(w1).transpose(1, 2), offs=ends)
        dx = sum_pairs(dpairs, inverse, x.shape[0], top_k)
    dlogits = route_backward(dgates.index_select(0, inverse), probabilities, chosen)
    return dx, dlogits.to(logits.dtype), dw1, db1, dw2
