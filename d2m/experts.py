"""The op `d2m::routed_experts` and the modules that call it.

Shape letters: B batch, T tokens, D width, E experts, H expert hidden, S shared hidden, K chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m.realisation import realisation
from d2m.routing import routed_experts_reference, routing_dtype

__all__ = ["AttentionPlusFFN", "SparseFFN", "experts_op", "routed_experts_reference"]

# ---------------------------------------------------------------- the op


@torch.library.custom_op("d2m::routed_experts", mutates_args=())
def routed_experts(
    x: Tensor, logits: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, top_k: int
) -> Tensor:
    """The op itself; `experts_op` is the entry. `d2m.realisation` says what computes it.

    Forward and backward share nothing but the arguments, so each may be any realisation.
    """
    check_arguments(x, logits, w1, b1, w2, top_k)
    forward, _ = realisation(x, w1)
    return forward(x, logits, w1, b1, w2, top_k)


@torch.library.custom_op("d2m::routed_experts_backward", mutates_args=())
def routed_experts_backward(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    top_k: int,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `routed_experts`: an op of its own, so that a traced backward stays whole."""
    _, backward = realisation(x, w1)
    return backward(dy, x, logits, w1, b1, w2, top_k, need_x, need_weights)


@routed_experts.register_fake
def _(x: Tensor, logits: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, top_k: int) -> Tensor:
    check_arguments(x, logits, w1, b1, w2, top_k)
    return x.new_empty(x.shape)


@routed_experts_backward.register_fake
def _(dy, x, logits, w1, b1, w2, top_k, need_x, need_weights):  # type: ignore[no-untyped-def]
    dx = x.new_empty(x.shape if need_x else 0)
    dweights = (w.new_empty(w.shape if need_weights else 0) for w in (w1, b1, w2))
    return (dx, logits.new_empty(logits.shape), *dweights)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.top_k = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    need_x, need_logits, *need_w, _ = ctx.needs_input_grad
    dx, dlogits, *dweights = torch.ops.d2m.routed_experts_backward(
        dy, *ctx.saved_tensors, ctx.top_k, need_x, any(need_w)
    )
    weights = (dw if need else None for dw, need in zip(dweights, need_w))
    return dx if need_x else None, dlogits if need_logits else None, *weights, None


routed_experts.register_autograd(_backward, setup_context=_setup_context)


def check_arguments(
    x: Tensor, logits: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, top_k: int
) -> None:
    """Raise ValueError, in one sentence, unless shapes, dtypes and top_k fit together."""
    if x.ndim != 2 or w1.ndim != 3:
        raise ValueError(
            f"routed_experts got x {list(x.shape)} and w1 {list(w1.shape)}; expected [T, D] and "
            "[E, D, H]: flatten batch and tokens first."
        )
    (tokens, width), (experts, _, hidden) = x.shape, w1.shape
    expected = {
        "logits": (logits, (tokens, experts)),
        "w1": (w1, (experts, width, hidden)),
        "b1": (b1, (experts, hidden)),
        "w2": (w2, (experts, hidden, width)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.ndim != len(shape) or any(a != b for a, b in zip(tensor.shape, shape)):
            raise ValueError(
                f"routed_experts got {name} of shape {list(tensor.shape)}; expected {list(shape)} "
                "(logits [T, E], w1 [E, D, H], b1 [E, H], w2 [E, H, D])."
            )
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"routed_experts got top_k={top_k}; expected 1 to {experts} (leave the op out for 0)."
        )
    if any(w.dtype != x.dtype for w in (w1, b1, w2)):
        raise ValueError(
            f"routed_experts got x in {x.dtype} but weights in {w1.dtype}, {b1.dtype}, {w2.dtype}; "
            "expected one dtype: cast x or the weights."
        )


def experts_op(x: Tensor, logits: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, top_k: int) -> Tensor:
    """The one entry to `torch.ops.d2m.routed_experts`.

    x [T, D], logits [T, E] (float32, or float64 with float64 x), w1 [E, D, H], b1 [E, H],
    w2 [E, H, D], top_k 1..E -> y [T, D] in x's dtype. Under autocast x and the weights are cast
    to its dtype, the logits never. Raises ValueError for shapes or dtypes that do not fit.
    """
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, w1, b1, w2 = (tensor.to(dtype) for tensor in (x, w1, b1, w2))
    return torch.ops.d2m.routed_experts(x, logits, w1, b1, w2, top_k)


# ---------------------------------------------------------------- modules


class SharedExpert(nn.Module):
    """The expert every token uses: an ordinary FFN [.., D] -> [.., O] with tanh GELU."""

    def __init__(self, dim: int, hidden: int, out_dim: int, dtype=None, device=None):  # type: ignore[no-untyped-def]
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, dtype=dtype, device=device)
        self.fc2 = nn.Linear(hidden, out_dim, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Experts(nn.Module):
    """The normal experts' weights, matmul-ready; `SparseFFN` calls the op with them."""

    def __init__(self, dim: int, experts: int, hidden: int, out_dim: int, dtype=None, device=None):  # type: ignore[no-untyped-def]
        super().__init__()
        kind = {"dtype": dtype, "device": device}
        self.w1 = nn.Parameter(torch.empty(experts, dim, hidden, **kind))
        self.b1 = nn.Parameter(torch.empty(experts, hidden, **kind))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, out_dim, **kind))
        nn.init.normal_(self.w1, std=dim**-0.5)
        nn.init.zeros_(self.b1)
        nn.init.normal_(self.w2, std=hidden**-0.5)


class SparseFFN(nn.Module):
    """A dense FFN split into one shared expert and E routed ones: [.., D] -> [.., D].

    Args: dim D, shared_hidden S, experts E, expert_hidden H, top_k K in 0..E (0: shared only).
    out_dim must equal dim where the op is used (it sums into x's width).
    Attributes: `top_k` may be changed at any time; `record = True` keeps the router's logits of
    the last call, [.., E] with their graph, in `last_logits` (None where K = 0). `renormalise`
    makes the K gates sum to K / E for every token (a baseline; the paper's gates are as softmax
    leaves them): with K = E the two are the same.
    Buffer `neurons` [S + E*H] int64: the dense FFN's neuron behind every row, shared ones first.
    """

    neurons: Tensor

    def __init__(
        self,
        dim: int,
        shared_hidden: int,
        experts: int,
        expert_hidden: int,
        top_k: int,
        out_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if out_dim not in (None, dim):
            raise ValueError(f"out_dim={out_dim} is not supported; expected None or dim={dim}.")
        if not 0 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} is out of range; expected 0 to {experts}.")
        self.top_k = top_k
        self.num_experts = experts
        self.record = False
        self.renormalise = False
        self.last_logits: Tensor | None = None
        self.shared = SharedExpert(dim, shared_hidden, dim, dtype, device)
        # float32 whatever the rest is stored in: bf16 logits change the chosen experts.
        gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.gate = nn.Linear(dim, experts, bias=False, dtype=gate_dtype, device=device)
        self.experts = Experts(dim, experts, expert_hidden, dim, dtype, device)
        rows = torch.arange(shared_hidden + experts * expert_hidden, device=device)
        self.register_buffer("neurons", rows)

    def router_logits(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., E] in float32 (float64 for float64 x), autocast or not."""
        dtype = routing_dtype(x)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x.to(dtype), self.gate.weight.to(dtype))
        return F.linear(x.to(dtype), self.gate.weight.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x)
        if self.top_k == 0:
            self.last_logits = None
            return y
        logits = self.router_logits(x)
        if self.record:
            self.last_logits = logits
        if self.renormalise:  # the op's softmax over the chosen alone
            kept, chosen = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, chosen, kept)
        weights = self.experts
        routed = experts_op(
            x.reshape(-1, x.shape[-1]),
            logits.reshape(-1, self.num_experts),
            weights.w1,
            weights.b1,
            weights.w2,
            self.top_k,
        )
        routed = routed.reshape(y.shape)
        return y + (routed * (self.top_k / self.num_experts) if self.renormalise else routed)

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}"


class AttentionPlusFFN(nn.Module):
    """`proj_out` of a sparse single-stream block: cat[attention, FFN] [.., 2D] -> [.., D].

    The dense one is a linear map of cat[attention, hidden]; its FFN half and its bias have moved
    into the block's SparseFFN, so what remains is a projection of the attention and a sum.
    """

    def __init__(self, dim: int, dtype=None, device=None):  # type: ignore[no-untyped-def]
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        dim = self.linear.in_features
        return self.linear(x[..., :dim]) + x[..., dim:]
