"""A ControlNet as a program: its ends, blocks as in its transformer, a residual behind each block.

The same block types as the transformer's, where sizes are equal. A residual is a Linear of what the
block hands on, times `scale`; the type ADD, which no call of the program is of, adds residuals to
the transformer's tokens (runtime.program.residuals).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.graph.blocks import Step, Types, call_by_name, reads
from export.graph.program import Program, Tracing
from export.graph.trace import Spec
from runtime.bundle.control_record import ADD, residual_name

SCALE = Spec(torch.float32, (1, 1, 1))  # as TensorRT's plans take what they multiply with
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Control:
    """How a class of ControlNets is exported.

    family: whose transformers it controls; cls: diffusers' class.
    stacks(model): list of blocks in the transformer -> the list of Linears of its residuals; blocks
        stand in a list of the same name as the transformer's.
    environment(model, dtype): inputs of the component, and tensors between its blocks.
    embed(model): what is before the blocks; tracing: of the family.
    check(config): ValueError (a sentence without its subject) for what export does not know.
    record(config): fields of the manifest's `control` beside `residuals`.
    """

    family: str
    cls: str
    stacks: Callable[[Any], Mapping[str, nn.ModuleList]]
    environment: Callable[[Any, torch.dtype], tuple[dict[str, Spec], dict[str, Spec]]]
    embed: Callable[[Any], nn.Module]
    tracing: Tracing
    check: Callable[[Mapping[str, Any]], None]
    record: Callable[[Mapping[str, Any]], dict[str, Any]]


class Add(nn.Module):
    """The addition of a residual."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        """[B, T, D], [B, T, D] -> [B, T, D]."""
        return hidden_states + residual


def call_residual(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """A Linear of a block's tokens, times the ControlNet's scale."""
    hidden = tensors["hidden_states"]
    return run(hidden) * tensors["scale"].to(hidden.dtype)


def control_program(
    model: Any, control: Control, dtype: torch.dtype, progress: Progress | None = None
) -> Program:
    """Trace a prepared ControlNet (it may live on the meta device)."""
    inputs, inner = control.environment(model, dtype)
    hidden = inner["hidden_states"]
    passed = {name for name in inputs if inner.get(name) is inputs[name]} | {"scale"}
    first = {name: spec for name, spec in inputs.items() if name not in passed}
    embedded = {name: spec for name, spec in inner.items() if name not in passed}
    steps: list[Step] = [("", "embed", control.embed(model), call_by_name, first, embedded)]
    names: dict[int, tuple[str, ...]] = {}
    scaled = {"hidden_states": hidden, "scale": SCALE}
    for stem, linears in control.stacks(model).items():
        for index, (block, linear) in enumerate(zip(getattr(model, stem), linears, strict=True)):
            row = control.tracing.row(block)
            written = {name: inner[name] for name in row.outputs}
            steps.append(
                (f"{stem}.{index}.", row.type, block, row.call, reads(row, inner), written)
            )
            prefix = f"{of(model, linears)}.{index}."
            names[len(steps)] = (residual_name(stem, index),)
            steps.append((prefix, "residual", linear, call_residual, scaled, {"residual": hidden}))
    types = Types(dtype)
    calls = types.calls(steps, "trace controlnet", progress)
    both = {"hidden_states": hidden, "residual": hidden}
    assert types.of(ADD, Add(), call_by_name, both, {"hidden_states": hidden}) == ADD
    outputs = {name: hidden for (name,) in names.values()}
    return Program(types.known, calls, {**inputs, "scale": SCALE}, outputs, names=names)


def of(model: nn.Module, child: nn.Module) -> str:
    """A child's name in the model."""
    return next(name for name, each in model.named_children() if each is child)
