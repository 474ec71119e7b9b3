"""A transformer as a program: its block types, each traced once, and the calls of them in order.

The block is the unit of compilation. Types are found by structure (class and parameter shapes), so
that a model with two variants of a block gets two types. The model may live on the meta device.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2m.families import family_of_model
from export.graph.program import BODY, MODULATION, BlockType, Program, Row, Tracing
from export.graph.routers import ExportRouter, Group, placed_blocks
from export.graph.trace import Spec, linear_weights, trace, weight_specs
from export.op.bodies import routings, with_body
from export.op.body_lines import few
from export.op.top_k import with_top_k

log = logging.getLogger("export")
Progress = Callable[[str, int, int], None]


def reads(row: Row, inner: Mapping[str, Spec]) -> dict[str, Spec]:
    """A block's inputs: shared modulation replaces temb, or comes in addition to it."""
    if MODULATION in row.inputs:
        return {name: inner[name] for name in row.inputs}
    names = [MODULATION if n == "temb" and MODULATION in inner else n for n in row.inputs]
    return {name: inner[name] for name in names}


def transformer_program(
    model: Any,
    tracing: Tracing,
    dtype: torch.dtype,
    top_k: Sequence[int] = (),
    progress: Progress | None = None,
) -> Program:
    """Trace every block type of a prepared transformer (dense, or sparse with `top_k`).

    A group of blocks becomes calls like any others and a router that says which of them run.
    """
    inputs, inner, outputs = tracing.environment(model, dtype)
    passed = {name for name in inputs if inner.get(name) is inputs[name]}  # to the blocks, as is
    first = {name: spec for name, spec in inputs.items() if name not in passed}
    embedded = {name: inner[name] for name in inner if name not in passed}
    last = {name: inner[name] for name in tracing.final_inputs}
    embed, final = tracing.embed(model), tracing.final(model)
    # A step: weight prefix, type's name, module, how to call it, what it reads, what it writes.
    steps: list[tuple[Any, ...]] = [("", "embed", embed, call_by_name, first, embedded)]
    members: dict[str, list[int]] = {}
    for _, blocks in family_of_model(model).blocks.kinds:
        for prefix, block, group in placed_blocks(model, blocks):
            row = tracing.row(block)
            written = {name: inner[name] for name in row.outputs}
            if group is not None:
                members.setdefault(group, []).append(len(steps))
            steps.append((prefix, row.type, block, row.call, reads(row, inner), written))
    steps.append(("", "final", final, call_by_name, last, outputs))

    # Steps of one structure share a type, which is traced once.
    types: dict[str, BlockType] = {}
    found: dict[Any, str] = {}
    stems: Counter[str] = Counter()
    calls: list[tuple[str, str]] = []

    def type_of(stem: str, module: nn.Module, call: Any, read: Any, written: Any) -> str:
        key = structure(module, dtype)
        if key not in found:
            stems[stem] += 1
            name = stem if stems[stem] == 1 else f"{stem}_{stems[stem]}"
            found[key] = name
            types[name] = block_type(name, module, call, read, written, dtype, top_k)
        return found[key]

    for done, (prefix, *step) in enumerate(steps):
        if progress is not None:
            progress("trace transformer", done, len(steps))
        calls.append((type_of(*step), prefix))
    groups = {}
    for name, indices in members.items():
        router = ExportRouter(model.get_submodule(name).router)
        kind = type_of("router", router, call_by_name, router.inputs(inner), router.outputs())
        groups[name] = Group(kind, f"{name}.", tuple(indices), router.alpha)
    if progress is not None:
        progress("trace transformer", len(steps), len(steps))
    beside = tracing.beside(model, dtype, top_k)
    return Program(types, calls, inputs, outputs, groups, beside)


def block_type(
    name: str,
    module: nn.Module,
    call: Any,
    inputs: Mapping[str, Spec],
    outputs: Mapping[str, Spec],
    dtype: torch.dtype,
    top_k: Sequence[int] = (),
) -> BlockType:
    """Trace one module, once for all top_k: the op's attribute is set afterwards."""
    from d2m.model.surgery import set_top_k, sparse_ffns

    if sparse_ffns(module):
        set_top_k(module, 1)
    log.info("tracing block type %s", name)
    graph = trace(module, call, inputs, outputs, dtype)
    if found := next(routings(graph), None):
        log.info("block type %s: body %s, every expert up to %d tokens", name, BODY, few(found))
        graphs = {str(k): with_body(with_top_k(graph, k), BODY) for k in top_k}
    else:
        graphs = {"": graph}
    weights = weight_specs(module, dtype)
    linears = frozenset(linear_weights(module)) & set(weights)
    return BlockType(name, dict(inputs), dict(outputs), weights, linears, graphs)


def call_by_name(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """Inputs are the forward's keywords."""
    return run(**tensors)


def structure(module: nn.Module, dtype: torch.dtype) -> tuple[Any, ...]:
    """What makes two blocks one type: class, parameter names and shapes, a router's alpha."""
    specs = weight_specs(module, dtype)
    shapes = tuple((name, spec.shape, spec.dtype) for name, spec in specs.items())
    return type(module).__name__, getattr(module, "alpha", None), shapes
