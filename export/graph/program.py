"""What a component is to export: block types, and the calls of them in order.

Names of tensors are those of a program's environment; `hidden_states` and `temb` are among them in
every family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import Tensor, nn

    from export.graph.routers import Group
    from export.graph.trace import Spec

Environment = tuple[dict[str, "Spec"], dict[str, "Spec"], dict[str, "Spec"]]
MODULATION = "modulation"  # the tensor's name, and the dense model's submodule that writes it
BODY = "either"  # what the block graphs and composed graphs carry: they are ONNX Runtime's


@dataclass(frozen=True)
class Part:
    """One of the tensors that a quantised weight becomes (export/quant): the `weight`'s local name
    and `shape` as products read it, which part of it, in which format, and the type it is stored
    in."""

    weight: str
    suffix: str
    format: Any
    shape: tuple[int, ...]
    stored: torch.dtype


@dataclass
class BlockType:
    """A kind of block: what it reads, writes and needs, and its graph per top_k ("" if unrouted).

    `inputs` and `outputs` name entries of the program's environment; `weights` are local names,
    `linears` those of them that a checkpoint holds as [out, in]; `parts`: those of `weights` that
    belong to a quantised one.
    """

    name: str
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    weights: dict[str, Spec]
    linears: frozenset[str] = frozenset()
    graphs: dict[str, onnx.ModelProto] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def routed(self) -> bool:
        """Whether there is a graph per number of experts."""
        return "" not in self.graphs


@dataclass
class Program:
    """A component: block types by name and the calls (type, weight prefix) in order.

    `groups`: name in the model -> the calls of which a router chooses. `names`: calls whose outputs
    have other names than their type's, so that a later call of the type does not replace them.
    `depths`: list of blocks -> its length in the dense model, where its last was left out for good.
    `beside`: name of a component -> its program, which has this one's weights.
    """

    types: dict[str, BlockType]
    calls: list[tuple[str, str]]
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    groups: dict[str, Group] = field(default_factory=dict)
    names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    beside: dict[str, Program] = field(default_factory=dict)

    def written(self, index: int) -> tuple[str, ...]:
        """The tensors that a call writes, in its type's order."""
        return self.names.get(index) or tuple(self.types[self.calls[index][0]].outputs)

    @property
    def weighted(self) -> list[tuple[str, str]]:
        """(type, weight prefix) of everything that has weights: the calls and the routers."""
        return [*self.calls, *((group.type, group.prefix) for group in self.groups.values())]


@dataclass(frozen=True)
class Row:
    """How a block is called: its type's name, and `call(run, tensors) -> outputs`."""

    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    call: Callable[[Callable[..., Any], dict[str, Tensor]], Any]


@dataclass(frozen=True)
class Tracing:
    """How a family's transformer is made ready for tracing and cut into blocks.

    environment(model, dtype): the component's inputs, the tensors between blocks, its outputs.
    embed(model), final(model): modules of what is before and after the blocks, parameters under the
        model's names. `embed` reads all inputs that are not passed on to the blocks as they are;
        `final` reads `final_inputs`.
    row(block): how a block is called. `temb` among its inputs becomes `modulation` where a model
        has shared modulation, unless the row names that too.
    processor(): the attention processor that blocks are traced with.
    prepare(model): what else is changed, in place, in a model that is about to be traced.
    beside(prepared model, dtype, top_k): other programs that have its weights.
    """

    environment: Callable[[Any, torch.dtype], Environment]
    embed: Callable[[Any], nn.Module]
    final: Callable[[Any], nn.Module]
    row: Callable[[nn.Module], Row]
    processor: Callable[[], Any]
    prepare: Callable[[Any], None] = lambda model: None
    beside: Callable[[Any, torch.dtype, Sequence[int]], dict[str, Program]] = (
        lambda model, dtype, top_k: {}
    )
    final_inputs: tuple[str, ...] = ("hidden_states", "temb")
