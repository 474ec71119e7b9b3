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
from d2m.model.block_group import BlockGroup, SkippedBlock
from export.graph.program import BODY, MODULATION, BlockType, Program, Row, Tracing
from export.graph.routers import ExportRouter, Group, placed_blocks
from export.graph.trace import Spec, linear_weights, trace, weight_specs
from export.op.bodies import routings, with_body
from export.op.body_lines import few
from export.op.top_k import with_top_k

log = logging.getLogger("export")
Progress = Callable[[str, int, int], None]
# Weight prefix, type's name, module, how to call it, what it reads, what it writes.
Step = tuple[str, str, nn.Module, Any, Mapping[str, Spec], Mapping[str, Spec]]


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
    steps: list[Step] = [("", "embed", embed, call_by_name, first, embedded)]
    members: dict[str, list[int]] = {}
    for _, blocks in family_of_model(model).blocks.kinds:
        for prefix, block, group in placed_blocks(model, blocks):
            row = tracing.row(block)
            written = {name: inner[name] for name in row.outputs}
            if group is not None:
                members.setdefault(group, []).append(len(steps))
            steps.append((prefix, row.type, block, row.call, reads(row, inner), written))
    steps.append(("", "final", final, call_by_name, last, outputs))

    types = Types(dtype, top_k)
    calls = types.calls(steps, "trace transformer", progress)
    groups = {}
    for name, indices in members.items():
        router = ExportRouter(model.get_submodule(name).router)
        kind = types.of("router", router, call_by_name, router.inputs(inner), router.outputs())
        groups[name] = Group(kind, f"{name}.", tuple(indices), router.alpha)
    depths = {
        kind: len(getattr(model, kind))
        for _, kind in family_of_model(model).blocks.kinds
        if left_out_last(getattr(model, kind))
    }
    beside = tracing.beside(model, dtype, top_k)
    return Program(types.known, calls, inputs, outputs, groups, depths=depths, beside=beside)


def left_out_last(blocks: Sequence[nn.Module]) -> bool:
    """Whether the last block of a list was left out for good: no program tells of it."""
    held = {i for block in blocks if isinstance(block, BlockGroup) for i in block.indices}
    last = len(blocks) - 1
    return bool(blocks) and isinstance(blocks[last], SkippedBlock) and last not in held


class Types:
    """Block types by name: modules of one structure share a type, which is traced once."""

    def __init__(self, dtype: torch.dtype, top_k: Sequence[int] = ()) -> None:
        self.dtype, self.top_k = dtype, top_k
        self.known: dict[str, BlockType] = {}
        self._names: dict[Any, str] = {}
        self._stems: Counter[str] = Counter()

    def of(self, stem: str, module: nn.Module, call: Any, read: Any, written: Any) -> str:
        """The name of a module's type: `stem`, numbered where that is another structure's."""
        key = structure(module, self.dtype)
        if key not in self._names:
            self._stems[stem] += 1
            name = stem if self._stems[stem] == 1 else f"{stem}_{self._stems[stem]}"
            self._names[key] = name
            made = block_type(name, module, call, read, written, self.dtype, self.top_k)
            self.known[name] = made
        return self._names[key]

    def calls(
        self, steps: Sequence[Step], phase: str, progress: Progress | None
    ) -> list[tuple[str, str]]:
        """(type, weight prefix) of every step."""
        report = progress or (lambda phase, done, total: None)
        made = []
        for done, (prefix, *step) in enumerate(steps):
            report(phase, done, len(steps))
            made.append((self.of(*step), prefix))
        report(phase, len(steps), len(steps))
        return made


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
