"""One FFN of a block: what it is compared with, and whether each contender is right.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen. `contenders` names them; a
contender that cannot run here says why instead of becoming another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2m.model.experts_choice import case_of, impossible, use
from d2m.model.experts_op import experts_op
from d2m.model.routing import routed_experts_reference
from d2m.model.sparse_ffn import SparseFFN
from scripts.gpu.flux import DenseFFN
from scripts.gpu.timing import backend

ROUTINGS = ("uniform", "skewed", "one expert")
# Relative error allowed against float64: 16-bit operands, hidden rows and expert sums rounded.
LIMITS = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
CONTENDERS = (
    "dense",  # hidden 4 D: what FLUX has
    "dense equal",  # hidden 1.5 D: the sparse layer's operations in two dense products
    "sorted",
    "grouped_mm",
    "grouped_mm compiled",
    "triton",
    "triton compiled",
)


class RoutedFFN(SparseFFN):
    """A SparseFFN whose router leans: `lean` [E] is added to the logits."""

    lean: Tensor

    def router_logits(self, x: Tensor) -> Tensor:
        return super().router_logits(x) + self.lean


def lean(routing: str, experts: int, device: torch.device) -> Tensor:
    """uniform: nothing; skewed: the last expert gets about 55 times the first's weight."""
    if routing == "uniform":
        return torch.zeros(experts, device=device)
    if routing == "skewed":
        return torch.linspace(0, 4, experts, device=device)
    return 1e4 * torch.nn.functional.one_hot(torch.tensor(experts // 2), experts).to(device)


def make(
    name: str,
    width: int,
    experts: int,
    top_k: int,
    routing: str,
    device: Any,
    dtype: Any,
    seed: int,
) -> nn.Module:
    """One contender with random weights of its own."""
    torch.manual_seed(seed)
    if name.startswith("dense"):
        equal = width + top_k * (3 * width // experts)
        hidden = 4 * width if name == "dense" else equal
        return DenseFFN(width, hidden).to(device, dtype)
    ffn = RoutedFFN(width, width, experts, 3 * width // experts, top_k, dtype=dtype, device=device)
    ffn.register_buffer("lean", lean(routing, experts, torch.device(device)))
    return ffn


def obstacle(name: str, x: Tensor, ffn: nn.Module) -> str | None:
    """Why a contender cannot run on these tensors, or None."""
    if name.startswith("dense"):
        return None
    return impossible(name.split()[0], case_of(x, ffn.experts.w2, ffn.experts.activation))


def forward(name: str, ffn: nn.Module) -> Callable[[Tensor], Tensor]:
    """The contender as a function of x [T, D]."""
    if name.startswith("dense"):
        return ffn
    run: Callable[[Tensor], Tensor] = ffn
    if name.endswith("compiled"):
        kind = backend(next(ffn.parameters()).device)
        run = torch.compile(ffn, fullgraph=True, backend=kind)

    def call(x: Tensor) -> Tensor:
        with use(name.split()[0]):
            return run(x)

    return call


def training(name: str, ffn: nn.Module, dy: Tensor) -> Callable[[Tensor], Any]:
    """Forward and backward: gradients of x and of every weight."""
    run, weights = forward(name, ffn), list(ffn.parameters())

    def call(x: Tensor) -> Any:
        with use(name.split()[0]) if not name.startswith("dense") else torch.enable_grad():
            y = run(x)
            return torch.autograd.grad(y, [x, *weights], dy)

    return call


def flops(name: str, tokens: int, width: int, experts: int, top_k: int) -> int:
    """Two for every multiply-add of the matmuls, the router left out; forward only."""
    if name == "dense":
        return 4 * tokens * width * 4 * width
    hidden = width + top_k * (3 * width // experts)
    return 4 * tokens * width * hidden


# ---------------------------------------------------------------- correctness


def error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in float64; NaN stays NaN and passes no comparison."""
    found, wanted = found.detach(), wanted.detach()
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp_min(1e-30))


def operands(
    sizes: tuple[int, int, int, int], seed: int, device: Any
) -> tuple[Callable[..., Tensor], Tensor, list[Tensor]]:
    """noise(*shape), and made of it logits [T, E] and [x, w1, b1, w2], float32."""
    T, D, E, H = sizes
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    logits = noise(T, E)
    return (
        noise,
        logits,
        [noise(T, D), noise(E, D, H) / D**0.5, noise(E, H) / 2, noise(E, H, D) / H**0.5],
    )


def verify_end(sizes: tuple[int, int, int, int], top_k: int, device: Any, dtype: Any) -> Any:
    """As `verify`, for the forward whose last kernel adds shared expert, gate and residual."""
    from d2m.kernels.op import forward_residual

    T, D = sizes[:2]
    noise, logits, exact = operands(sizes, T, device)
    x, w1, b1, w2 = (t.to(dtype) for t in exact)
    shared, residual, scale = (t.to(dtype) for t in (noise(T, D), noise(T, D), noise(1, D)))
    if reason := impossible("triton", case_of(x, w2)):
        return {"skipped": reason}
    with poisoned("triton"):
        y, again = (
            forward_residual(x, logits, w1, b1, w2, top_k, shared, residual, scale)
            for _ in range(2)
        )
    routed = routed_experts_reference(
        x.double(), logits.double(), w1.double(), b1.double(), w2.double(), top_k=top_k
    )
    wanted = residual.double() + scale.double() * (shared.double() + routed)
    found: dict[str, Any] = {"error": error(y, wanted), "repeats": bool(torch.equal(y, again))}
    limit = LIMITS[dtype]
    return {**found, "limit": limit, "ok": found["error"] <= limit and found["repeats"]}


def verify(
    name: str, sizes: tuple[int, int, int, int], top_k: int, routing: str, device: Any, dtype: Any
) -> dict[str, Any]:
    """A realisation's value and gradients against float64, twice, on fresh numbers.

    sizes (T, D, E, H). Answers {"error", "gradients": {...}, "repeats", "limit", "ok"}, or
    {"skipped": reason}. Scratch and outputs of the kernels are filled with NaN first.
    """
    T, D, E, _ = sizes
    noise, logits, exact = operands(sizes, T + top_k, device)
    logits += lean(routing, E, torch.device(device))
    x, w1, b1, w2 = (t.to(dtype).requires_grad_() for t in exact)
    logits.requires_grad_()
    if reason := impossible(name, case_of(x, w2)):
        return {"skipped": reason}
    tensors = (x, logits, w1, b1, w2)
    dy = noise(T, D).to(dtype)
    with use(name), poisoned(name):
        y = experts_op(*tensors, top_k)
        gradients = torch.autograd.grad(y, tensors, dy)
        again = experts_op(*tensors, top_k)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    names = ("x", "logits", "w1", "b1", "w2")
    wanted = routed_experts_reference(**dict(zip(names, wide)), top_k=top_k)
    expected = torch.autograd.grad(wanted, wide, dy.double())
    limit = LIMITS[dtype]
    rows = {n: error(g, e) for n, g, e in zip(names, gradients, expected)}
    found: dict[str, Any] = {
        "error": error(y, wanted),
        "gradients": rows,
        "repeats": bool(torch.equal(y, again)),
    }
    ok = found["error"] <= limit and all(value <= 2 * limit for value in rows.values())
    return {**found, "limit": limit, "ok": ok and found["repeats"]}


@contextmanager
def poisoned(name: str) -> Iterator[None]:
    """Inside, what the kernels allocate holds NaN, indices far out of range: unwritten shows."""
    if name != "triton":
        yield
        return
    from d2m.kernels import op

    original = op.allocate

    def allocate(shapes: Any, device: torch.device) -> dict[str, Tensor]:
        made = original(shapes, device)
        for tensor in made.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**20))
        return made

    op.allocate = allocate
    try:
        yield
    finally:
        op.allocate = original
