"""`d2m::routed_experts` by the Triton kernels: the plan of a call, run with torch tensors.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from d2m.kernels.configs import Tiles, tiles_for
from d2m.kernels.plan import (
    KERNELS,
    Plan,
    Shapes,
    Sizes,
    backward_plan,
    forward_plan,
    residual_plan,
)

DTYPES = {"i32": torch.int32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@cache
def kernel(name: str) -> Any:
    """The Triton function of that name; triton itself is imported here, at first use."""
    module, _, attribute = KERNELS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


@cache
def architecture(device: torch.device) -> int:
    """90 for sm_90; in the interpreter, on CPU tensors, that of the commonest target."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def allocate(shapes: Shapes, device: torch.device) -> dict[str, Tensor]:
    """Uninitialised tensors, none of which a kernel reads before another has written it."""
    return {
        name: torch.empty(shape, dtype=DTYPES[dtype], device=device)
        for name, (dtype, shape) in shapes.items()
    }


def execute(plan: Plan, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a plan's launches on the current stream; returns its outputs."""
    device = inputs["x"].device
    outputs = allocate(plan.outputs, device)
    tensors = {**inputs, **outputs, **allocate(plan.work, device)}
    with torch.cuda.device_of(inputs["x"]):
        for launch in plan.launches:
            arguments = {
                name: tensors[value] if isinstance(value, str) else value
                for name, value in launch.arguments
            }
            kernel(launch.kernel)[launch.grid](
                **arguments,
                **dict(launch.constants),
                num_warps=launch.warps,
                num_stages=launch.stages,
            )
    return outputs


def call_sizes(
    x: Tensor, b1: Tensor | None, w2: Tensor, top_k: int, activation: str
) -> tuple[Sizes, Tiles]:
    """The sizes of a call, and the tiles that its plan takes on x's device."""
    (tokens, width), (experts, hidden, _) = x.shape, w2.shape
    kind = (NAMES[x.dtype], activation, b1 is not None)
    sizes = Sizes(tokens, width, experts, hidden, top_k, *kind)
    sm = architecture(x.device)
    return sizes, tiles_for(sm, sizes.dtype, tokens, width, hidden, sizes.gated)


def contiguous(
    x: Tensor, logits: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor
) -> dict[str, Tensor]:
    """The inputs as the kernels read them: rows one after the other, logits in float32."""
    named = {"x": x, "logits": logits.float(), "w1": w1, "b1": b1, "w2": w2}
    return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}


def forward_triton(
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    top_k: int,
    tiles: Tiles | None = None,
    activation: str = "gelu_tanh",
) -> Tensor:
    """The op's value; arguments as `d2m.model.experts_op.experts_op`. `tiles` only to try
    others."""
    sizes, known = call_sizes(x, b1, w2, top_k, activation)
    plan = forward_plan(sizes, tiles or known)
    return execute(plan, contiguous(x, logits, w1, b1, w2))["y"]


def forward_residual(
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    top_k: int,
    shared: Tensor,
    residual: Tensor,
    scale: Tensor,
    activation: str = "gelu_tanh",
) -> Tensor:
    """residual + scale * (shared + routed) in one pass at the end; for inference, no gradients.

    shared, residual [T, D]; scale [S, D] with T a multiple of S: the gate of every sample.
    """
    tokens, samples = x.shape[0], scale.shape[0]
    if tokens == 0:
        return torch.empty_like(x)
    if tokens % samples:
        raise ValueError(
            f"forward_residual got {tokens} tokens and gates of {samples} samples; expected a "
            "multiple: one row of scale for every sample."
        )
    plan = residual_plan(*call_sizes(x, b1, w2, top_k, activation), tokens // samples)
    more = {"shared": shared, "residual": residual, "scale": scale}
    inputs = {name: tensor.to(x.dtype).contiguous() for name, tensor in more.items()}
    return execute(plan, contiguous(x, logits, w1, b1, w2) | inputs)["y"]


def backward_triton(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    top_k: int,
    need_x: bool,
    need_weights: bool,
    tiles: Tiles | None = None,
    activation: str = "gelu_tanh",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, logits, w1, b1, w2); empty tensors where not needed."""
    sizes, known = call_sizes(x, b1, w2, top_k, activation)
    plan = backward_plan(sizes, tiles or known, need_x, need_weights)
    inputs = {"dy": dy.to(x.dtype).contiguous(), **contiguous(x, logits, w1, b1, w2)}
    out = execute(plan, inputs)
    dx, *dweights = (out.get(name, x.new_empty(0)) for name in ("dx", "dw1", "db1", "dw2"))
    return dx, out["dlogits"].to(logits.dtype), *dweights
