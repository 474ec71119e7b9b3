"""What is measured, section by section, as named cells: a cell is one number's worth of GPU time.

A section yields (name, work): the name is the cell's key in the results, `work()` its record. So a
run can stop after any cell, and a later one goes on with those that are missing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gpubench import layer
from gpubench.flux import Double, Single, Size, build, presets
from gpubench.timing import backend, measure, peak, rotations

Record = dict[str, Any]
Cells = Iterator[tuple[str, Callable[[], Record]]]


@dataclass(frozen=True)
class Setting:
    """Sizes of a run: FLUX.1 [dev] at 1024 x 1024, or toy ones for a machine without a GPU."""

    device: torch.device
    dtype: torch.dtype
    size: Size
    image: int
    text: int
    batches: tuple[int, ...]
    square: int  # of the matrix product that measures the ceiling
    seconds: float  # per measurement
    checks: tuple[tuple[int, int, int, int], ...]  # (T, D, E, H) of the correctness runs


def real(device: torch.device) -> Setting:
    checks = ((1, 3072, 12, 768), (77, 256, 12, 64), (512, 3072, 12, 768), (4608, 3072, 12, 768))
    size = Size(experts=12)
    return Setting(device, torch.bfloat16, size, 4096, 512, (1, 4, 8), 8192, 1.0, checks)


def toy(device: torch.device) -> Setting:
    size = Size(2, 16, 2, 3, 8, 24, 12, experts=12)
    return Setting(
        device, torch.float32, size, 16, 4, (1, 2), 64, 0.01, ((1, 32, 12, 8), (40, 32, 12, 8))
    )


def ceilings(s: Setting) -> Cells:
    """Bytes a second of a large copy, operations a second of a large product, on random data."""

    def copy() -> Record:
        numbers = s.square * s.square * 8
        a = torch.randn(numbers, device=s.device).to(s.dtype)
        b = torch.empty_like(a)
        row = measure([lambda: b.copy_(a)], s.device, seconds=s.seconds)
        return {**row, "gb_s": round(2 * a.nbytes / row["ms"] / 1e6, 1)}

    def product() -> Record:
        n = s.square
        a, b = (torch.randn(n, n, device=s.device, dtype=s.dtype) for _ in range(2))
        row = measure([lambda: a @ b], s.device, seconds=s.seconds)
        return {**row, "tflops": float(f"{2 * n**3 / row['ms'] / 1e9:.4g}")}

    yield "ceilings/copy", copy
    yield "ceilings/matmul", product


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


def one_layer(s: Setting, batch: int, routing: str, mode: str, name: str) -> Record:
    """Milliseconds and TFLOP/s of one contender (a backward counts twice a forward)."""
    tokens, width, experts = batch * (s.image + s.text), s.size.width, s.size.experts
    probe = layer.make(name, width, experts, s.size.top_k, routing, s.device, s.dtype, 0)
    x = torch.randn(tokens, width, device=s.device, dtype=s.dtype)
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
    x = torch.randn(tokens, width, device=s.device, dtype=s.dtype)
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


def blocks(s: Setting) -> Cells:
    """One double and one single block, dense and sparse, eager and compiled."""
    for kind in ("double", "single"):
        for experts in (0, s.size.experts):
            for compiled in (False, True):
                name = ("sparse" if experts else "dense") + (" compiled" if compiled else "")
                size = replace(s.size, experts=experts)
                yield f"blocks/{kind}/{name}", partial(one_block, s, kind, size, compiled)


@torch.no_grad()
def one_block(s: Setting, kind: str, size: Size, compiled: bool) -> Record:
    """Milliseconds of a block on B = 1 at 1024 x 1024, two sets of weights in turn."""
    works = []
    for seed in range(2 if s.device.type == "cuda" else 1):
        one = replace(size, double=int(kind == "double"), single=int(kind == "single"))
        model = build(one, s.device, s.dtype, seed)
        block = next(m for m in model.modules() if isinstance(m, (Double, Single)))
        image, text, rest = block_inputs(s)
        if compiled:
            block.compile(fullgraph=True, backend=backend(s.device))
        given = (image, text, *rest) if kind == "double" else (torch.cat([text, image], 1), *rest)
        works.append(partial(block, *given))
    return measure(works, s.device, seconds=s.seconds)


def block_inputs(s: Setting) -> tuple[Any, ...]:
    """Random image and text streams, temb and rotary tables of one sample."""
    width, dim, tokens = s.size.width, s.size.head_dim, s.image + s.text

    def noise(*shape: int) -> Any:
        return torch.randn(shape, device=s.device, dtype=s.dtype)

    angles = torch.rand(tokens, dim, device=s.device)
    rest = (noise(1, width), angles.cos(), angles.sin())
    return noise(1, s.image, width), noise(1, s.text, width), rest


def step(s: Setting) -> Cells:
    """A whole step of the transformer, B = 1: dense, then L, M, S, XS, eager and compiled."""
    for compiled in (True, False):
        tail = " compiled" if compiled else ""
        yield f"step/dense{tail}", partial(one_step, s, None, compiled)
        for preset in presets():
            yield f"step/{preset}{tail}", partial(one_step, s, preset, compiled)


@torch.no_grad()
def one_step(s: Setting, preset: str | None, compiled: bool) -> Record:
    """Milliseconds and peak memory; compiled: per block, so a type is compiled once."""
    size = s.size if preset else replace(s.size, experts=0)
    model = build(size, s.device, s.dtype)
    if preset:
        double, single = presets()[preset]
        whole = presets()["L"]
        model.active = (
            -(-double * size.double // whole[0]),
            -(-single * size.single // whole[1]),
        )
    if compiled:
        for block in model.modules():
            if isinstance(block, (Double, Single)):
                block.compile(fullgraph=True, backend=backend(s.device))
    tokens = s.image + s.text

    def noise(*shape: int) -> Any:
        return torch.randn(shape, device=s.device, dtype=s.dtype)

    angles = torch.rand(tokens, size.head_dim, device=s.device)
    given = (noise(1, s.image, size.channels), noise(1, s.text, size.text_width))
    given += (noise(1, size.pooled), torch.full((1,), 0.5, device=s.device))
    given += (torch.full((1,), 3.5, device=s.device), angles.cos(), angles.sin())
    work = partial(model, *given)
    row = measure([work], s.device, seconds=2 * s.seconds, graph=compiled)
    return {**row, "active": list(model.active), "peak_bytes": peak(s.device, work)}


def shapes(s: Setting) -> Cells:
    """The shapes model end to end, its transformer in torch on the device, against ONNX Runtime."""
    for compiled in (False, True):
        tail = " compiled" if compiled else ""
        yield f"shapes/torch{tail}", partial(one_picture, s, compiled)


def one_picture(s: Setting, compiled: bool) -> Record:
    """Seconds a picture, and the PSNR of the same picture drawn by ONNX Runtime on the CPU."""
    import time

    import numpy as np

    from gpubench.shapes import pipeline
    from runtime.pipeline import Pipeline

    prompt = "a red circle above a blue square"
    drawn = pipeline(s.device, s.dtype, compiled=compiled)
    first = np.asarray(drawn(prompt, seed=0), np.float64)
    times = []
    for seed in range(1, 4):
        start = time.perf_counter()
        drawn(prompt, seed=seed)
        times.append(time.perf_counter() - start)
    other = np.asarray(Pipeline(None, "ort")(prompt, seed=0), np.float64)
    error = float(((first - other) ** 2).mean())
    psnr = None if error == 0 else round(10 * np.log10(255**2 / error), 2)
    return {"seconds": round(sorted(times)[1], 4), "psnr_to_ort": psnr}


SECTIONS: dict[str, Callable[[Setting], Cells]] = {
    "ceilings": ceilings,
    "correctness": correctness,
    "layer": layers,
    "blocks": blocks,
    "step": step,
    "shapes": shapes,
}


def clean(device: torch.device) -> None:
    """Between cells: what one held must not be in the next one's peak."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
