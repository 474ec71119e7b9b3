"""A transformer as a program: its block types, each traced once, and the calls of them in order.

The block is the unit of compilation. Types are found by structure (class and parameter shapes), so
that a model with two variants of a block gets two types. The model may live on the meta device.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from export.body import routings, with_body
from export.groups import ExportRouter, Group, placed_blocks
from export.lines import few
from export.prepare import Embed, Final
from export.rewrite import with_top_k
from export.trace import Spec, linear_weights, trace, weight_specs

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("export")
Progress = Callable[[str, int, int], None]
BODY = "either"  # what the block graphs and composed graphs carry: they are ONNX Runtime's


@dataclass
class BlockType:
    """A kind of block: what it reads, writes and needs, and its graph per top_k ("" if unrouted).

    `inputs` and `outputs` name entries of the program's environment; `weights` are local names,
    `linears` those of them that a checkpoint holds as [out, in].
    """

    name: str
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    weights: dict[str, Spec]
    linears: frozenset[str] = frozenset()
    graphs: dict[str, onnx.ModelProto] = field(default_factory=dict)

    @property
    def routed(self) -> bool:
        """Whether there is a graph per number of experts."""
        return "" not in self.graphs


@dataclass
class Program:
    """A component: block types by name and the calls (type, weight prefix) in order.

    `groups`: name in the model -> the calls of which a router chooses.
    """

    types: dict[str, BlockType]
    calls: list[tuple[str, str]]
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    groups: dict[str, Group] = field(default_factory=dict)

    @property
    def weighted(self) -> list[tuple[str, str]]:
        """(type, weight prefix) of everything that has weights: the calls and the routers."""
        return [*self.calls, *((group.type, group.prefix) for group in self.groups.values())]


@dataclass(frozen=True)
class Row:
    """How a class of blocks is called: its type's name, and `call(run, tensors) -> outputs`."""

    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    call: Callable[[Callable[..., Any], dict[str, Tensor]], Any]


def call_block(run: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """diffusers' Flux blocks, double and single, share one signature: -> (text, image).

    temb is what their norms read and nothing else: the shared modulation, where a model has one.
    """
    rotary = tensors["rope_cos"], tensors["rope_sin"]
    return run(
        hidden_states=tensors["hidden_states"],
        encoder_hidden_states=tensors["encoder_hidden_states"],
        temb=tensors[MODULATION] if MODULATION in tensors else tensors["temb"],
        image_rotary_emb=rotary,
    )


STREAMS = ("hidden_states", "encoder_hidden_states")
MODULATION = "modulation"  # of the norms of all blocks, computed by the embed call
READ = (*STREAMS, "temb", "rope_cos", "rope_sin")
ROWS = {
    "FluxTransformerBlock": Row("double", READ, STREAMS[::-1], call_block),
    "FluxSingleTransformerBlock": Row("single", READ, STREAMS[::-1], call_block),
}


def reads(row: Row, inner: Mapping[str, Spec]) -> dict[str, Spec]:
    """A block's inputs: with shared modulation that takes the place of temb."""
    names = [MODULATION if n == "temb" and MODULATION in inner else n for n in row.inputs]
    return {name: inner[name] for name in names}


def transformer_program(
    model: Any,
    dtype: torch.dtype,
    top_k: Sequence[int] = (),
    progress: Progress | None = None,
) -> Program:
    """Trace every block type of a prepared FLUX transformer (dense, or sparse with `top_k`).

    A group of blocks becomes calls like any others and a router that says which of them run.
    """
    inputs, inner, outputs = environment(model, dtype)
    first = {name: spec for name, spec in inputs.items() if not name.startswith("rope_")}
    opened = {name: inner[name] for name in inner if not name.startswith("rope_")}
    last = {name: inner[name] for name in ("hidden_states", "temb")}
    steps: list[tuple[Any, ...]] = [("", "embed", Embed(model), call_by_name, first, opened)]
    members: dict[str, list[int]] = {}
    for blocks in ("transformer_blocks", "single_transformer_blocks"):
        for prefix, block, group in placed_blocks(model, blocks):
            row = ROWS[type(block).__name__]
            written = {name: inner[name] for name in row.outputs}
            if group is not None:
                members.setdefault(group, []).append(len(steps))
            steps.append((prefix, row.type, block, row.call, reads(row, inner), written))
    steps.append(("", "final", Final(model), call_by_name, last, outputs))

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
    for name, places in members.items():
        router = ExportRouter(model.get_submodule(name).router)
        kind = type_of("router", router, call_by_name, router.inputs(inner), router.outputs())
        groups[name] = Group(kind, f"{name}.", tuple(places), router.alpha)
    if progress is not None:
        progress("trace transformer", len(steps), len(steps))
    return Program(types, calls, inputs, outputs, groups)


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
    from d2m.surgery import set_top_k, sparse_ffns

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
    shapes = tuple((name, spec.shape) for name, spec in specs.items())
    return type(module).__name__, getattr(module, "alpha", None), shapes


def environment(
    model: Any, dtype: torch.dtype
) -> tuple[dict[str, Spec], dict[str, Spec], dict[str, Spec]]:
    """The tensors of the program: the component's inputs, those between blocks, its outputs.

    timestep (sigma in [0, 1]), guidance and the rotary tables are float32 in any bundle. A model
    without guidance_embeds has no guidance, one in AdaLN mode full no shared modulation.
    """
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    image, text = ("batch", "image_tokens"), ("batch", "text_tokens")
    scalar = Spec(torch.float32, ("batch",))
    rotary = Spec(torch.float32, ("tokens", config.attention_head_dim))
    tables = {"rope_cos": rotary, "rope_sin": rotary}
    inputs = {
        "hidden_states": Spec(dtype, (*image, config.in_channels)),
        "encoder_hidden_states": Spec(dtype, (*text, config.joint_attention_dim)),
        "pooled_projections": Spec(dtype, ("batch", config.pooled_projection_dim)),
        "timestep": scalar,
    }
    if config.guidance_embeds:
        inputs["guidance"] = scalar
    inner = {
        "hidden_states": Spec(dtype, (*image, width)),
        "encoder_hidden_states": Spec(dtype, (*text, width)),
        "temb": Spec(dtype, ("batch", width)),
    }
    if shared := getattr(model, MODULATION, None):
        inner[MODULATION] = Spec(dtype, ("batch", shared.linear.out_features))
    sample = Spec(dtype, (*image, model.proj_out.out_features))
    return inputs | tables, inner | tables, {"sample": sample}
