"""The op `d2m::routed_experts`.

Shape letters: B batch, T tokens, D width, E experts, H expert hidden, S shared hidden, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2m.families.site import ACTIVATIONS, GATED, up_rows
from d2m.model.experts_choice import realisation
from d2m.model.sorted_loop import zero_gradients


@torch.library.custom_op("d2m::routed_experts", mutates_args=())
def routed_experts(
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    top_k: int,
    activation: str = "gelu_tanh",
) -> Tensor:
    """The op itself; `experts_op` is the entry. `d2m.model.experts_choice` says what computes it.

    Forward and backward share nothing but the arguments, so each may be any realisation.
    """
    check_arguments(x, logits, w1, b1, w2, top_k, activation)
    if x.shape[0] == 0:
        return torch.empty_like(x)
    forward, _ = realisation(x, w2, activation)
    return forward(x, logits, w1, b1, w2, top_k, activation=activation)


@torch.library.custom_op("d2m::routed_experts_backward", mutates_args=())
def routed_experts_backward(
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
    """Gradients of `routed_experts`: an op of its own, so that a traced backward stays whole."""
    if x.shape[0] == 0:
        zeros = zero_gradients(w1, b1, w2, need_weights)
        return x.new_empty(x.shape if need_x else 0), torch.empty_like(logits), *zeros
    _, backward = realisation(x, w2, activation)
    return backward(dy, x, logits, w1, b1, w2, top_k, need_x, need_weights, activation=activation)


@routed_experts.register_fake
def _(x, logits, w1, b1, w2, top_k, activation="gelu_tanh"):  # type: ignore[no-untyped-def]
    check_arguments(x, logits, w1, b1, w2, top_k, activation)
    return x.new_empty(x.shape)


@routed_experts_backward.register_fake
def _(dy, x, logits, w1, b1, w2, top_k, need_x, need_weights, activation="gelu_tanh"):  # type: ignore[no-untyped-def]
    dx = x.new_empty(x.shape if need_x else 0)
    return (dx, logits.new_empty(logits.shape), *zero_gradients(w1, b1, w2, need_weights))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.top_k, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    # The five tensors: torch leaves out a last argument that has its default value.
    need_x, need_logits, *need_w = ctx.needs_input_grad[:5]
    dx, dlogits, *dweights = torch.ops.d2m.routed_experts_backward(
        dy, *ctx.saved_tensors, ctx.top_k, need_x, any(need_w), ctx.activation
    )
    weights = (dw if need else None for dw, need in zip(dweights, need_w))
    return dx if need_x else None, dlogits if need_logits else None, *weights, None, None


routed_experts.register_autograd(_backward, setup_context=_setup_context)


def check_arguments(
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    top_k: int,
    activation: str = "gelu_tanh",
) -> None:
    """Raise ValueError, in one sentence, unless shapes, dtypes, devices and top_k fit together."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"routed_experts got the activation {activation!r}; expected one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    if x.ndim != 2 or w1.ndim != 3:
        raise ValueError(
            f"routed_experts got x {list(x.shape)} and w1 {list(w1.shape)}; expected [T, D] and "
            "[E, D, H]: flatten batch and tokens first."
        )
    (tokens, width), (experts, _, rows) = x.shape, w1.shape
    hidden = rows // up_rows(activation)
    expected = {
        "logits": (logits, (tokens, experts)),
        "w1": (w1, (experts, width, hidden * up_rows(activation))),
        "w2": (w2, (experts, hidden, width)),
    }
    if b1 is not None:
        expected["b1"] = b1, (experts, rows)
    twice = ", w1 and b1 with 2 H for gates and values" if activation in GATED else ""
    for name, (tensor, shape) in expected.items():
        if tensor.ndim != len(shape) or any(a != b for a, b in zip(tensor.shape, shape)):
            raise ValueError(
                f"routed_experts got {name} of shape {list(tensor.shape)}; expected {list(shape)} "
                f"(logits [T, E], w1 [E, D, H], b1 [E, H], w2 [E, H, D]{twice})."
            )
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"routed_experts got top_k={top_k}; expected 1 to {experts} (leave the op out for 0)."
        )
    weights = [w for w in (w1, b1, w2) if w is not None]
    if any(w.dtype != x.dtype for w in weights):
        raise ValueError(
            f"routed_experts got x in {x.dtype} but weights in "
            f"{', '.join(str(w.dtype) for w in weights)}; expected one dtype: cast x or the "
            "weights."
        )
    # Some on the meta device would go to the fake implementation, whose answer is no number.
    every = {"x": x, "logits": logits, "w1": w1, "b1": b1, "w2": w2}
    places = {name: tensor for name, tensor in every.items() if tensor is not None}
    if any(tensor.device != x.device for tensor in places.values()):
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in places.items())
        raise ValueError(
            f"routed_experts got {found}; expected one device: move the model there, or call the "
            "module that owns the weights, whose hooks load offloaded ones."
        )


def experts_op(
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    top_k: int,
    activation: str = "gelu_tanh",
) -> Tensor:
    """The one entry to `torch.ops.d2m.routed_experts`.

    x [T, D], logits [T, E] (float32, or float64 with float64 x), w1 [E, D, H], b1 [E, H] or None,
    w2 [E, H, D], top_k 1..E -> y [T, D] in x's dtype. activation: one of
    d2m.families.site.ACTIVATIONS; of a gated one w1 and b1 have 2 H columns, the gates' first.
    Under autocast x and the weights are cast to its dtype, the logits never. Raises ValueError for
    shapes or dtypes that do not fit.
    """
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, w1, w2 = (tensor.to(dtype) for tensor in (x, w1, w2))
        b1 = None if b1 is None else b1.to(dtype)
    return torch.ops.d2m.routed_experts(x, logits, w1, b1, w2, top_k, activation)
