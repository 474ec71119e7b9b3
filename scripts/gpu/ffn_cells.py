"""The cells of one FFN: every realisation's correctness, and the time of every contender."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from d2m.model.experts_choice import use
from scripts.gpu import layer
from scripts.gpu.setting import Cells, Record, Setting
from scripts.gpu.timing import backend, measure, rotations


def correctness(s: Setting) -> Cells:
    """Every realisation, dtype, size, number of experts and routing against float64."""
    dtypes = (s.dtype, torch.float32) if s.dtype != torch.float32 else (s.dtype,)
    for name in ("triton", "grouped_mm", "sorted"):
        for dtype in dtypes:
            for sizes in s.checks:
                for k, routing in ((2, "uniform"), (4, "skewed"), (1, "one expert")):
                    shape = "x".join(map(str, sizes))
                    key = f"correctness/{name}/{str(dtype)[6:]}/{shape}/k{k}/{routing}"
                    yield key, partial(layer.verify, name, sizes, k, routing, s.device, dtype)
    for dtype in dtypes:
        for sizes in s.checks:
            key = f"correctness/triton end/{str(dtype)[6:]}/{'x'.join(map(str, sizes))}/k2"
            yield key, partial(layer.verify_end, sizes, 2, s.device, dtype)


def layers(s: Setting) -> Cells:
    """One FFN: every contender, forward and forward with backward, uniform and skewed routing."""
    for batch in s.batches:
        for routing in ("uniform", "skewed"):
            for mode in ("forward", "training"):
                for name in layer.CONTENDERS:
                    if name.startswith("dense") and routing != "uniform":
                        continue  # routing means nothing there
                    key = f"layer/B{batch}/{routing}/{mode}/{name}"
                    yield key, partial(one_layer, s, batch, routing, mode, name)
        for routing in ("uniform", "skewed"):
            yield f"layer/B{batch}/{routing}/routed/triton", partial(routed, s, batch, routing)
        for name in ("apart", "apart compiled", "fused"):
            yield f"layer/B{batch}/uniform/end/{name}", partial(block_end, s, batch, name)


def one_layer(s: Setting, batch: int, routing: str, mode: str, name: str) -> Record:
    """Milliseconds and TFLOP/s of one contender (a backward counts twice a forward)."""
    tokens, width, experts = batch * (s.image + s.text), s.size.width, s.size.experts
    probe = layer.make(name, width, experts, s.size.top_k, routing, s.device, s.dtype, 0)
    x = s.noise(tokens, width)
    if reason := layer.obstacle(name, x, probe):
        return {"skipped": reason}
    each = x.nbytes + sum(p.nbytes for p in probe.parameters())
    works, train = [], mode == "training"
    for seed in range(rotations(each, s.device)):
        ffn = probe if seed == 0 else layer.make(
            name, width, experts, s.size.top_k, routing, s.device, s.dtype, seed
        )  # fmt: skip
        given = torch.randn_like(x).requires_grad_(train)
        if train:
            run = layer.training(name, ffn, torch.randn_like(x))
        else:
            run = layer.forward(name, ffn.requires_grad_(False))
        works.append(partial(run, given))
    # The loop waits for its counts on the host, which no graph can hold.
    row = measure(works, s.device, seconds=s.seconds, graph=name != "sorted")
    work = layer.flops(name, tokens, width, experts, s.size.top_k) * (3 if train else 1)
    return {**row, "rotations": len(works), "tflops": float(f"{work / row['ms'] / 1e9:.4g}")}


def routed(s: Setting, batch: int, routing: str) -> Record:
    """The routed part alone, `forward_triton` with its routing, placement and combine."""
    from d2m.kernels.op import forward_triton

    tokens, width, k = batch * (s.image + s.text), s.size.width, s.size.top_k
    works, hidden = [], 3 * width // s.size.experts
    x = s.noise(tokens, width)
    probe = layer.make("triton", width, s.size.experts, k, routing, s.device, s.dtype, 0)
    if reason := layer.obstacle("triton", x, probe):
        return {"skipped": reason}
    each = x.nbytes + sum(p.nbytes for p in probe.experts.parameters())
    for seed in range(rotations(each, s.device)):
        ffn = layer.make("triton", width, s.size.experts, k, routing, s.device, s.dtype, seed)
        e, given = ffn.experts.requires_grad_(False), torch.randn_like(x)
        with torch.no_grad():
            logits = ffn.router_logits(given)
        works.append(partial(forward_triton, given, logits, e.w1, e.b1, e.w2, k))
    row = measure(works, s.device, seconds=s.seconds)
    tflops = 4 * tokens * k * width * hidden / row["ms"] / 1e9
    return {**row, "rotations": len(works), "tflops": float(f"{tflops:.4g}")}


@torch.no_grad()
def block_end(s: Setting, batch: int, name: str) -> Record:
    """residual + gate * FFN(x): the FFN and what follows apart, or in the kernels' last pass."""
    from d2m.kernels.op import forward_residual

    tokens, width, k = batch * (s.image + s.text), s.size.width, s.size.top_k
    x = s.noise(tokens, width)
    works = []
    for seed in range(2 if s.device.type == "cuda" else 1):
        ffn = layer.make("triton", width, s.size.experts, k, "uniform", s.device, s.dtype, seed)
        if reason := layer.obstacle("triton", x, ffn):
            return {"skipped": reason}
        given, residual = torch.randn_like(x), torch.randn_like(x)
        scale, e = s.noise(batch, width), ffn.experts
        rows = tokens // batch

        def apart(ffn: Any, given: Any, residual: Any, scale: Any, rows: int = rows) -> Any:
            return residual + scale.repeat_interleave(rows, 0) * ffn(given)

        def fused(ffn: Any, given: Any, residual: Any, scale: Any, e: Any = e) -> Any:
            logits, shared = ffn.router_logits(given), ffn.shared(given)
            return forward_residual(given, logits, e.w1, e.b1, e.w2, k, shared, residual, scale)

        run = fused if name == "fused" else apart
        if name.endswith("compiled"):
            run = torch.compile(apart, fullgraph=True, backend=backend(s.device))
        works.append(partial(with_kernels, run, ffn, given, residual, scale))
    return measure(works, s.device, seconds=s.seconds)


def with_kernels(run: Callable[..., Any], *arguments: Any) -> Any:
    """A call whose routed experts are ours."""
    with use("triton"):
        return run(*arguments)
