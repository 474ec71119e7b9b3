"""What is measured, section by section, as named cells: a cell is one number's worth of GPU time.

A section yields (name, work): the name is the cell's key in the results, `work()` its record. So a
run can stop after any cell, and a later one goes on with those that are missing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.gpu.ffn_cells import correctness, layers
from scripts.gpu.flux import Double, Single, Size, build, presets
from scripts.gpu.setting import Cells, Record, Setting
from scripts.gpu.timing import backend, measure, peak


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
        block: Any = next(m for m in model.modules() if isinstance(m, (Double, Single)))
        given = block_inputs(s)
        if compiled:
            block.compile(fullgraph=True, backend=backend(s.device))
        works.append(partial(block, *given))
    return measure(works, s.device, seconds=s.seconds)


def block_inputs(s: Setting) -> tuple[Any, ...]:
    """Random image and text streams, temb and rotary tables: one sample, as a block takes it."""
    width, angles = s.size.width, rotary_angles(s)
    streams = s.noise(1, s.image, width), s.noise(1, s.text, width)
    return *streams, s.noise(1, width), (angles.cos(), angles.sin())


def rotary_angles(s: Setting) -> Tensor:
    """Random angles [tokens, head_dim]."""
    return torch.rand(s.image + s.text, s.size.head_dim, device=s.device)


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
    model: Any = build(size, s.device, s.dtype)
    if preset:
        double, single = presets()[preset]
        whole = presets()["L"]
        model.active = (-(-double * size.double // whole[0]), -(-single * size.single // whole[1]))
    if compiled:
        for block in model.modules():
            if isinstance(block, (Double, Single)):
                block.compile(fullgraph=True, backend=backend(s.device))
    angles = rotary_angles(s)
    given: tuple[Any, ...] = (s.noise(1, s.image, size.channels),)
    given += (s.noise(1, s.text, size.text_width), s.noise(1, size.pooled))
    given += (torch.full((1,), 0.5, device=s.device),)
    given += (torch.full((1,), 3.5, device=s.device), angles.cos(), angles.sin())
    work = partial(model, *given)
    row = measure([work], s.device, seconds=2 * s.seconds, graph=compiled)
    return {**row, "active": list(model.active), "peak_bytes": peak(s.device, work)}


def shapes(s: Setting) -> Cells:
    """The shapes model end to end, its transformer in torch on the device, against ONNX Runtime."""
    for compiled in (False, True):
        tail = " compiled" if compiled else ""
        yield f"shapes/torch{tail}", partial(one_image, s, compiled)


def one_image(s: Setting, compiled: bool) -> Record:
    """Seconds an image, and the PSNR of the same image from ONNX Runtime on the CPU."""
    import time

    import numpy as np

    from runtime.pipeline import Pipeline
    from scripts.gpu.shapes import pipeline

    prompt = "a red circle above a blue square"
    generate = pipeline(s.device, s.dtype, compiled=compiled)
    first = np.asarray(generate(prompt, seed=0), np.float64)
    times = []
    for seed in range(1, 4):
        start = time.perf_counter()
        generate(prompt, seed=seed)
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
