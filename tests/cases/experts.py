"""Experts of every activation: their tensors, and what the reference makes of them."""

from __future__ import annotations

from typing import Any

import torch

from d2m.families.site import ACTIVATIONS, up_rows
from d2m.model.routing import routed_experts_reference

KINDS = [(name, bias) for name in ACTIVATIONS for bias in (True, False)]
NAMES = ("x", "logits", "w1", "b1", "w2")


def make(
    activation: str,
    bias: bool,
    tokens: int = 23,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    sizes: tuple[int, int, int] = (16, 12, 8),
) -> list[Any]:
    """x, logits, w1, b1 (or None), w2 for sizes (D, E, H)."""
    D, E, H = sizes
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = H * up_rows(activation)
    made: list[Any] = [noise(tokens, D), noise(tokens, E), noise(E, D, wide) / 4]
    made += [noise(E, wide) / 4 if bias else None, noise(E, H, D) / 3]
    logits = torch.float64 if dtype == torch.float64 else torch.float32
    return [None if t is None else t.to(logits if i == 1 else dtype) for i, t in enumerate(made)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|; NaN anywhere gives NaN, which is below no limit."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def reference(
    arguments: list[Any], top_k: int, activation: str, dy: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[Any]]:
    """y in float64, and with dy the gradients of all arguments (None where there is none)."""
    leaves = [None if a is None else a.double().clone().requires_grad_() for a in arguments]
    y = routed_experts_reference(*leaves, top_k, activation)
    if dy is not None:
        y.backward(dy.double())
    return y.detach(), [None if leaf is None else leaf.grad for leaf in leaves]
