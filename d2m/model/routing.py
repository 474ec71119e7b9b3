"""What routing means: the gate, the choice of experts, activations, and the op's reference.

Shape letters: B batch, T tokens, D width, E experts, H expert hidden, K chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m.families.site import GATED


def routing_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 activations, float32 for all others: the gate never runs in bf16."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Gate(nn.Linear):
    """A router's Linear without bias: [.., D] -> [.., out] in float32, autocast or not.

    float64 for float64 inputs and weights of such models. Whatever dtype the rest is stored in:
    bf16 logits change the chosen experts. It is called, never read, so that hooks which move its
    weight at its forward (offloading) find it.
    """

    def __init__(self, dim: int, out: int, dtype=None, device=None):  # type: ignore[no-untyped-def]
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        super().__init__(dim, out, bias=False, device=device, dtype=kind)

    def forward(self, x: Tensor) -> Tensor:
        dtype = routing_dtype(x)
        # Only where autocast is on: the context is a node of traced graphs.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x.to(dtype), self.weight.to(dtype))
        return F.linear(x.to(dtype), self.weight.to(dtype))


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the experts, then the K largest, not renormalised (ours, see the paper notes).

    logits [T, E] -> probabilities [T, E], gates [T, K] (largest first), chosen experts [T, K].
    Equal gates go to the lowest expert: a stable sort, since topk promises no order.
    """
    probabilities = torch.softmax(logits, dim=-1)
    ranked, experts = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    return probabilities, ranked[:, :top_k], experts[:, :top_k]


def route_backward(dgates: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Gradient of the logits [T, E] from the gradients of the chosen gates, T*K numbers by token.

    Through the softmax over all E, of which only the chosen K reach the output.
    """
    dchosen = dgates.view(chosen.shape)
    dprobabilities = torch.zeros_like(probabilities).scatter_(1, chosen, dchosen)
    dot = (dprobabilities * probabilities).sum(-1, keepdim=True)
    return probabilities * (dprobabilities - dot)


def activate(rows: Tensor, activation: str) -> Tensor:
    """What an FFN does between its matrices (one of d2m.families.site.ACTIVATIONS).

    [.., H] -> [.., H]; of the gated ones [.., 2 H] -> [.., H], the first half being the gates:
    swiglu silu(gate) * value, geglu gelu(gate) * value with the exact GELU.
    """
    if activation in GATED:
        gates, values = rows.chunk(2, dim=-1)
        return activate(gates, GATE_OF[activation]) * values
    if activation == "silu":
        return F.silu(rows)
    return F.gelu(rows, approximate=GELU[activation])


def activate_backward(dhidden: Tensor, rows: Tensor, activation: str) -> Tensor:
    """Gradient of `activate`'s rows from that of its result."""
    if activation in GATED:
        gates, values = rows.chunk(2, dim=-1)
        own = GATE_OF[activation]
        dgates = activate_backward(dhidden * values, gates, own)
        return torch.cat([dgates, dhidden * activate(gates, own)], dim=-1)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dhidden, rows)
    return torch.ops.aten.gelu_backward(dhidden, rows, approximate=GELU[activation])


GELU = {"gelu_tanh": "tanh", "gelu": "none"}
GATE_OF = {"swiglu": "silu", "geglu": "gelu"}


def routed_experts_reference(
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    top_k: int,
    activation: str = "gelu_tanh",
) -> Tensor:
    """What the op means, in the plainest form: y = sum of gate_i * (act(x W1_i + b1_i) W2_i).

    Args and result as `experts_op`. An expert sees the tokens that chose it and no others, so what
    it would make of them, NaN even, has no say. Computed in float32, or float64 if x is float64.
    Differentiable by autograd.
    """
    dtype = routing_dtype(x)
    _, gates, experts = route(logits.to(dtype), top_k)
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for i in range(w1.shape[0]):
        token, rank = torch.nonzero(experts == i, as_tuple=True)
        rows = x[token].to(dtype) @ w1[i].to(dtype)
        if b1 is not None:
            rows = rows + b1[i].to(dtype)
        hidden = activate(rows, activation)
        y = y.index_add(0, token, gates[token, rank, None] * (hidden @ w2[i].to(dtype)))
    return y.to(x.dtype)
