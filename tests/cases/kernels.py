"""Cases of the Triton kernels, run in a process of their own (see tests/conftest.py).

TRITON_INTERPRET has to be set before triton is imported, and must not be set where kernels are
compiled; so tests hand these functions to one of two child processes and judge what comes back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def start_interpreter() -> None:
    """Initializer of the interpreter's process; also mends its bfloat16 products."""
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)

    def widened(handle: Any) -> Any:
        # The interpreter keeps bfloat16 as uint16 and would multiply the bit patterns.
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(widened(a), widened(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def start_compiler() -> None:
    """Initializer of the compiler's process."""
    os.environ.pop("TRITON_INTERPRET", None)


# ---------------------------------------------------------------- arguments


def make(
    sizes: tuple[int, int, int, int],
    dtype: str = "float32",
    routing: str = "random",
    seed=0,
    kind: tuple[str, bool] = ("gelu_tanh", True),
):
    """x, logits, w1, b1, w2, dy for sizes (T, D, E, H), one of the routings below, and a kind of
    experts: activation, and whether there is b1 (else None)."""
    import torch

    from d2m.families.site import up_rows

    T, D, E, H = sizes
    wide = H * up_rows(kind[0])
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = noise(T, E)
    if routing == "one expert":
        logits[:, E // 2] += 1e4
    elif routing == "skewed":
        logits += torch.linspace(0, 4, E, dtype=torch.float64)
    elif routing == "ties":
        logits = logits.sign() * 2.0
    elif routing == "all equal":
        logits[:] = -7.5
    elif routing == "huge":
        logits *= 1e30
    elif routing == "very negative":
        logits -= 1e30
    elif routing == "minus infinity":
        logits[:, ::2] = -float("inf")
    elif routing == "alternating":
        logits[:] = 0.0
        logits[torch.arange(T), torch.arange(T) % E] = 4.0
    tensors = [noise(T, D), logits, noise(E, D, wide) / D**0.5, noise(E, wide) / 2]
    tensors += [noise(E, H, D) / H**0.5, noise(T, D)]
    own = getattr(torch, dtype)
    made = [t.to(torch.float32 if i == 1 else own) for i, t in enumerate(tensors)]
    return made if kind[1] else [*made[:3], None, *made[4:]]


def relative(actual: Any, expected: Any) -> float:
    """|actual - expected| / |expected|; NaN anywhere gives NaN, which is below no limit."""
    a, b = actual.detach().double(), expected.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def small_tiles(rows: int = 16) -> Any:
    """Tiles so small that a few tokens fill several of everything."""
    from d2m.kernels.configs import Tile, Tiles

    tile = Tile(rows, 32, 32, 4, 2)
    return Tiles("small", 16, tile, tile, tile, tile, Tile(32, 32, 16, 4, 2))


@contextmanager
def poisoned() -> Iterator[list[tuple[str, Any]]]:
    """Scratch and outputs come filled with NaN (indices: far out of range), between guard bands.

    Gives the list of (name, whole buffer), for `bands_hold`.
    """
    import torch

    from d2m.kernels import op

    made: list[tuple[str, Any]] = []

    def allocate(shapes: Any, device: Any) -> dict[str, Any]:
        tensors = {}
        for name, (dtype, shape) in shapes.items():
            count = int(torch.Size(shape).numel())
            buffer = torch.empty(count + 128, dtype=op.DTYPES[dtype], device=device)
            buffer.fill_(float("nan") if buffer.is_floating_point() else -(2**20))
            buffer[:64] = buffer[-64:] = 77
            made.append((name, buffer))
            tensors[name] = buffer[64 : 64 + count].view(shape)
        return tensors

    kept, op.allocate = op.allocate, allocate
    try:
        yield made
    finally:
        op.allocate = kept


def bands_hold(made: list[tuple[str, Any]]) -> bool:
    return all(bool((b[:64] == 77).all() and (b[-64:] == 77).all()) for _, b in made)


# ---------------------------------------------------------------- cases for the interpreter


def check_values(
    sizes: tuple[int, int, int, int],
    top_k: int,
    dtype: str = "float32",
    routing: str = "random",
    small: bool = True,
    twice: bool = False,
    kind: tuple[str, bool] = ("gelu_tanh", True),
) -> dict[str, Any]:
    """Errors of y and of every gradient against the reference in float64, all poisoned."""
    from d2m.kernels.op import backward_triton, forward_triton
    from d2m.model.routing import route, routed_experts_reference

    *arguments, dy = make(sizes, dtype, routing, seed=sum(sizes) + top_k, kind=kind)
    tiles, activation = small_tiles() if small else None, kind[0]
    # The choice is the float32 gate's; the reference computes its values in float64 for it.
    wide = [None if a is None else a.double().requires_grad_() for a in arguments]
    expected = routed_experts_reference(*wide, top_k, activation)
    chosen = [route(logits, top_k)[2] for logits in (arguments[1], arguments[1].double())]
    expected.backward(dy.double())
    with poisoned() as made:
        y = forward_triton(*arguments, top_k, tiles, activation)
        result: dict[str, Any] = {"y": relative(y, expected)}
        found = backward_triton(dy, *arguments, top_k, True, True, tiles, activation)
        for name, grad, leaf in zip("x logits w1 b1 w2".split(), found, wide):
            if leaf is None:
                assert grad.numel() == 0
                continue
            assert leaf.grad is not None
            result[f"d{name}"] = relative(grad, leaf.grad)
        if twice:
            again = backward_triton(dy, *arguments, top_k, True, True, tiles, activation)
            assert all(a.equal(b) for a, b in zip(found, again)), "gradients differ between runs"
            again_y = forward_triton(*arguments, top_k, tiles, activation)
            assert y.equal(again_y), "y differs between runs"
        assert bands_hold(made), "a kernel wrote outside its tensors"
    assert y.dtype == arguments[0].dtype and y.shape == arguments[0].shape
    result["choice"] = bool(chosen[0].equal(chosen[1]))
    return result


def realise(arguments: list[Any], dy: Any, top_k: int, activation: str) -> tuple[Any, list[Any]]:
    """y and all gradients of given tensors, poisoned, and the same bits when asked again."""
    from d2m.kernels.op import backward_triton, forward_triton

    tiles = small_tiles()
    with poisoned() as made:
        y = forward_triton(*arguments, top_k, tiles, activation)
        found = backward_triton(dy, *arguments, top_k, True, True, tiles, activation)
        again = backward_triton(dy, *arguments, top_k, True, True, tiles, activation)
        assert all(a.equal(b) for a, b in zip(found, again)), "gradients differ between runs"
        assert y.equal(forward_triton(*arguments, top_k, tiles, activation)), "y differs"
        assert bands_hold(made), "a kernel wrote outside its tensors"
    return y.clone(), [gradient.clone() for gradient in found]


def check_no_tokens() -> dict[str, list[int]]:
    """Shapes of value and gradients for T = 0; weights' gradients must be zeros."""
    from d2m.model.experts_choice import use
    from d2m.model.experts_op import routed_experts, routed_experts_backward

    *arguments, dy = make((0, 32, 12, 16))
    with use("triton"):
        grads = routed_experts_backward(dy, *arguments, 2, True, True)
        values = [routed_experts(*arguments, 2), *grads]
    assert not any(bool(g.any()) for g in grads)
    return {"shapes": [list(v.shape) for v in values]}


def check_bad_numbers(where: str) -> dict[str, Any]:
    """One token (the first, whose rows padding reads) has NaN; all others must not notice."""
    import torch

    from d2m.kernels.op import forward_triton

    *arguments, _ = make((20, 32, 6, 16))
    clean = forward_triton(*arguments, 2, small_tiles())
    arguments[{"x": 0, "logits": 1}[where]][0] = float("nan")
    with poisoned() as made:
        y = forward_triton(*arguments, 2, small_tiles())
        assert bands_hold(made)
    return {"first": bool(torch.isnan(y[0]).all()), "others": relative(y[1:], clean[1:]) < 1e-6}


def check_placement(sizes: tuple[int, int], top_k: int, routing: str, rows: int) -> dict[str, Any]:
    """Every pair has a slot of its own in a tile of its expert; counts and order are right."""
    import torch

    from d2m.kernels import op
    from d2m.kernels.plan import Plan, Sizes, forward_plan, tiles_bound
    from d2m.model.routing import route

    T, E = sizes
    logits = make((T, 16, E, 16), routing=routing)[1]
    call = Sizes(T, 16, E, 16, top_k, "fp32")
    whole = forward_plan(call, small_tiles(rows))
    names = ("slots", "slot_token", "slot_gate", "tile_expert", "tile_rows", "expert_rows")
    seen = {name: whole.work[name] for name in ("gates", "chosen", *names)}
    work = {name: shape for name, shape in whole.work.items() if name not in seen}
    with poisoned() as made:
        plan = Plan(whole.inputs, seen, work, whole.launches[:2])
        out = op.execute(plan, {"logits": logits, "x": logits})
        assert bands_hold(made)
    _, gates, chosen = route(logits, top_k)
    slots, owner = out["slots"].long(), out["tile_expert"].long()
    assert out["chosen"].long().equal(chosen)
    assert torch.allclose(out["gates"], gates, rtol=1e-6, atol=1e-9)
    assert slots.unique().numel() == T * top_k
    assert owner[slots // rows].equal(chosen)
    assert bool((slots % rows < out["tile_rows"][slots // rows]).all())
    assert int(out["tile_rows"].sum()) == T * top_k
    assert out["slot_token"][slots].long().equal(torch.arange(T)[:, None].expand(T, top_k))
    assert out["slot_gate"][slots].equal(out["gates"])
    counts = torch.bincount(chosen.reshape(-1), minlength=E)
    assert out["expert_rows"][:E].long().equal(counts)
    for expert in range(E):
        mine = slots[chosen == expert]
        assert bool((mine[1:] > mine[:-1]).all()), "the order is not stable"
    used = int((out["tile_rows"] > 0).sum())
    return {"used": used, "bound": tiles_bound(call, rows)}


def check_residual() -> dict[str, float]:
    """The fused end of a block against its parts, two samples of 9 tokens."""
    import torch

    from d2m.kernels.op import forward_residual
    from d2m.model.routing import routed_experts_reference

    *arguments, shared = make((18, 40, 6, 16))
    residual, scale = torch.randn(18, 40), torch.randn(2, 40)
    with poisoned() as made:
        y = forward_residual(*arguments, 2, shared, residual, scale)
        assert bands_hold(made)
    routed = routed_experts_reference(*(a.double() for a in arguments), 2)
    rows = scale.double().repeat_interleave(9, 0)
    return {"y": relative(y, residual + rows * (shared + routed))}


def check_through_torch() -> dict[str, Any]:
    """The op under autograd, checkpointing and torch.compile, computed by the kernels."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from d2m.model.experts_choice import use
    from d2m.model.experts_op import experts_op
    from d2m.model.sparse_ffn import SparseFFN

    torch.manual_seed(0)
    ffn = SparseFFN(32, 32, 6, 16, top_k=2)
    x = torch.randn(2, 9, 32, requires_grad=True)

    def run(call: Any) -> list[Any]:
        ffn.zero_grad()
        x.grad = None
        y = call(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in ffn.parameters())]

    with use("sorted"):
        expected = run(ffn)
    compiled = torch.compile(ffn, backend="aot_eager", fullgraph=True)
    with use("triton"):
        plain = run(ffn)
        kept = run(lambda value: checkpoint(ffn, value, use_reentrant=False))
        traced = run(compiled)
        *arguments, _ = make((10, 16, 6, 16))
        arguments = [a.requires_grad_() for a in arguments]
        torch.library.opcheck(torch.ops.d2m.routed_experts.default, (*arguments, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = experts_op(*arguments, 2)
        strided = [a.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for a in arguments]
        same = experts_op(*strided, 2).equal(experts_op(*arguments, 2))
    return {
        "plain": max(relative(a, b) for a, b in zip(plain, expected)),
        "checkpoint": all(a.equal(b) for a, b in zip(kept, plain)),
        "compile": max(relative(a, b) for a, b in zip(traced, plain)),
        "autocast": str(half.dtype),
        "strided": same,
    }


# ---------------------------------------------------------------- cases for the compiler


def machine_code(
    sm: int,
    tokens: int,
    dtype: str = "bf16",
    labels: tuple[str, ...] = (),
    sizes: tuple[int, int, int, int] = (3072, 12, 768, 2),
    kind: tuple[str, bool] = ("gelu_tanh", True),
) -> dict[str, dict[str, Any]]:
    """What `d2m.kernels.compile.inspect` says of the kernels of one call, by label (all: ())."""
    from d2m.kernels.compile import compile_launch, inspect
    from d2m.kernels.configs import tiles_for
    from d2m.kernels.plan import Sizes, backward_plan, forward_plan, residual_plan

    width, experts, hidden, top_k = sizes
    call = Sizes(tokens, width, experts, hidden, top_k, dtype, *kind)
    tiles = tiles_for(sm, dtype, tokens, width, hidden, call.gated)
    found = {}
    plans = (residual_plan(call, tiles, tokens), forward_plan(call, tiles))
    for plan in (*plans, backward_plan(call, tiles, True, True)):
        for launch in plan.launches:
            if launch.label not in found and (not labels or launch.label in labels):
                found[launch.label] = inspect(compile_launch(plan, launch, sm))
    return found


def ptx_of_up(ptx_version: int) -> tuple[str, list[tuple[str, str]], int]:
    """(PTX, parameters, Triton's scratch pointers) of `up` for sm_90."""
    from d2m.kernels.compile import compile_launch
    from d2m.kernels.configs import tiles_for
    from d2m.kernels.plan import Sizes, forward_plan

    plan = forward_plan(Sizes(4096, 256, 12, 64, 2, "bf16"), tiles_for(90, "bf16", 4096, 256, 64))
    [launch] = [launch for launch in plan.launches if launch.label == "up"]
    done = compile_launch(plan, launch, 90, ptx_version)
    return done.ptx, list(done.parameters), done.scratch
