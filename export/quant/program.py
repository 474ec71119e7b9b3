"""A program with quantised weights: block types, what they hold, and their graphs.

The rewriting knows no family: it looks for products by a weight in a block's graph and calls the
functions of export/quant/products.py in their place. Blocks of one type that keep different weights
(`--keep`) become types of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from export.graph.program import BlockType, Part, Program
from export.graph.trace import Spec
from export.op.bodies import routings
from export.op.schema import DOMAIN, OP
from export.quant.experts import ATTRIBUTES, body
from export.quant.layers import experts, kept, products, quantisable
from export.quant.products import LEFT, PRODUCT, functions
from export.quant.weights import shapes

if TYPE_CHECKING:
    import onnx

    from export.op.body_lines import Routing
    from export.quant.formats import Format

FLOAT4 = 23  # onnx.TensorProto's number of float4_e2m1
ELEMENTS = {  # torch's types -> onnx.TensorProto's numbers
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 17,
}


@dataclass(frozen=True)
class Lowering:
    """What quantised block graphs become for a library.

    functions(format, routing): the functions that they call, `routing` of their experts, if any.
    plain: types as they are quantised, their graphs left as they are (for plans in 16 bits).
    plans: whether it is TensorRT's, which reads FP4 as such. ONNX Runtime has none on CPUs: there
    two of them are a byte. What is stored in FP8 is cast to float32 by the block itself then, for
    ONNX Runtime 1.32 lets no FP8 into a function that hands it on to another.
    """

    functions: Callable[[Format, Routing | None], list[onnx.FunctionProto]]
    plans: bool = False
    plain: bool = False


def for_onnx_runtime(kind: Format, routing: Routing | None) -> list[onnx.FunctionProto]:
    """The functions of a block's graph for ONNX Runtime."""
    return [*functions(kind), *([body(kind.of_experts, routing)] if routing is not None else [])]


ONNX_RUNTIME = Lowering(for_onnx_runtime)
SIXTEEN_BITS = Lowering(for_onnx_runtime, plain=True)


def quantised(
    program: Program, kind: Format, keep: Sequence[str] = (), lowering: Lowering = ONNX_RUNTIME
) -> Program:
    """The program with weights of the format `kind`, but for those that `keep` names.

    `lowering`: to ONNX Runtime's graphs or TensorRT's.
    """
    fitting = {name: quantisable(kind, row) for name, row in program.types.items()}
    types: dict[str, BlockType] = {}
    made: dict[tuple[str, frozenset[str]], str] = {}
    calls = []
    for name, prefix in program.calls:
        # What has no prefix is before or after the blocks.
        chosen = frozenset(w for w in fitting[name] if prefix and not kept(prefix + w, keep))
        chosen = chosen - half_experts(chosen)
        key = (name, chosen)
        if key not in made:
            taken = {*types, *(program.types.keys() - {name})}
            fresh = (each for each in (name, *(f"{name}_{i}" for i in range(2, 1000))))
            made[key] = next(each for each in fresh if each not in taken)
            row = program.types[name]
            types[made[key]] = quantised_type(made[key], row, kind, sorted(chosen), lowering)
        calls.append((made[key], prefix))
    types |= {group.type: program.types[group.type] for group in program.groups.values()}
    return replace(program, types=types, calls=calls)


def half_experts(chosen: frozenset[str]) -> set[str]:
    """w1 without its w2, or w2 without its w1: the op's body has both, or neither."""
    twins = {"w1": "w2", "w2": "w1"}
    found = set()
    for name in chosen:
        stem, _, last = name.rpartition(".")
        if last in twins and f"{stem}.{twins[last]}" not in chosen:
            found.add(name)
    return found


def quantised_type(
    name: str, row: BlockType, kind: Format, chosen: Sequence[str], lowering: Lowering
) -> BlockType:
    """A block type that holds `chosen` as `kind`."""
    if not chosen or lowering.plain:
        return replace(row, name=name)
    weights: dict[str, Spec] = {}
    parts: dict[str, Part] = {}
    for local, spec in row.weights.items():
        if local not in chosen:
            weights[local] = spec
            continue
        sides = tuple(int(side) for side in spec.shape)
        own = kind.of_experts if len(sides) > 2 else kind
        for suffix, shape in shapes(own, sides).items():
            stored = getattr(torch, own.parts[suffix])
            # Half types are for storage: a graph computes with scales in float32.
            read = torch.float32 if stored == torch.bfloat16 else stored
            weights[local + suffix] = Spec(read, shape)
            parts[local + suffix] = Part(local, suffix, own, sides, stored)
    graphs = {
        key: quantised_graph(graph, kind, chosen, weights, lowering)
        for key, graph in row.graphs.items()
    }
    return replace(row, name=name, weights=weights, graphs=graphs, parts=parts)


def quantised_graph(
    model: onnx.ModelProto,
    kind: Format,
    chosen: Sequence[str],
    weights: Mapping[str, Spec],
    lowering: Lowering,
) -> onnx.ModelProto:
    """A block graph whose products by `chosen` are calls of the format's functions."""
    import onnx_ir as ir

    routing = next(routings(model), None)
    copy = ir.from_proto(model)
    graph = copy.graph
    new = part_inputs(graph, kind, chosen, weights, lowering.plans)
    given = new if lowering.plans else floats(graph, new)
    lefts: dict[str, list[Any]] = {}  # x's name -> what Quantize gives for it
    quantised_experts = False
    for node in list(graph):
        names = [name for _, name in products([node]) if name in chosen]
        if (node.domain, node.op_type) == (DOMAIN, OP) and names:
            replace_experts(graph, node, kind.of_experts, given)
            quantised_experts = True
        elif names:
            replace_product(graph, node, kind, given[names[0]], lefts)
    inputs = [value for old in graph.inputs for value in new.get(old.name, [old])]
    graph.inputs.clear()
    graph.inputs.extend(inputs)
    left_over = any((node.domain, node.op_type) == (DOMAIN, OP) for node in graph)
    proto = ir.to_proto(copy)
    own = [
        each for each in proto.functions if (each.domain, each.name) != (DOMAIN, OP) or left_over
    ]
    used = {(node.domain, node.op_type) for node in proto.graph.node}
    made = lowering.functions(kind, routing if quantised_experts else None)
    own += [each for each in made if (each.domain, each.name) in used]
    del proto.functions[:]
    proto.functions.extend(own)
    imported = {entry.domain for entry in proto.opset_import}
    for domain in sorted(
        {DOMAIN, *(each.domain for f in own for each in f.opset_import)} - imported
    ):
        proto.opset_import.add(domain=domain, version=1)
    return proto


def part_inputs(
    graph: Any, kind: Format, chosen: Sequence[str], weights: Mapping[str, Spec], plans: bool
) -> dict[str, list[Any]]:
    """Weight -> the graph inputs that take its place; `plans`: FP4 by its type."""
    import onnx_ir as ir

    def part(name: str, spec: Spec, fp4: bool) -> Any:
        element, shape = ELEMENTS[spec.dtype], list(spec.shape)
        if fp4:
            element, shape[-1] = FLOAT4, shape[-1] * 2
        kind = ir.TensorType(ir.DataType(element))
        return ir.Value(name=name, type=kind, shape=ir.Shape(shape))

    made = {}
    for value in graph.inputs:
        if value.name not in chosen:
            continue
        own = kind.of_experts if len(value.shape) > 2 else kind
        made[value.name] = [
            part(
                value.name + suffix,
                weights[value.name + suffix],
                plans and own.name == "nvfp4" and suffix == "",
            )
            for suffix in own.parts
        ]
    return made


def floats(graph: Any, given: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The inputs with those in FP8 cast to float32, by nodes at the graph's beginning."""
    import onnx_ir as ir

    float8 = ir.DataType.FLOAT8E4M3FN
    cast = {
        value: ir.node("Cast", [value], {"to": 1}, name=f"{value.name}_float")
        for values in given.values()
        for value in values
        if value.dtype == float8
    }
    for node in cast.values():
        node.outputs[0].name = node.name
        graph.insert_before(graph[0], node)
    return {
        name: [cast[value].outputs[0] if value in cast else value for value in values]
        for name, values in given.items()
    }


def replace_product(
    graph: Any, node: Any, kind: Format, weight: list[Any], lefts: dict[str, list[Any]]
) -> None:
    """x @ W, or x @ W + b, becomes calls of Quantize (once for every x) and Product."""
    import onnx_ir as ir

    x, old = node.inputs[0], node.inputs[1]
    new = []
    if kind.name == "int4":
        left = [x]
        sizes = {"k": int(old.shape[0]), "n": int(old.shape[1])}
    else:
        sizes = {}
        if x.name not in lefts:
            count = 1 if kind.name == "nvfp4" else 2
            call = ir.node(f"{LEFT}_{kind.name}", [x], num_outputs=count, domain=DOMAIN)
            for value, suffix in zip(call.outputs, ("", "_scale")):
                value.name = f"{x.name}_{kind.name}{suffix}"
            call.name = call.outputs[0].name
            lefts[x.name] = list(call.outputs)
            new.append(call)
        left = lefts[x.name]
    product = ir.node(f"{PRODUCT}_{kind.name}", [*left, *weight], sizes, domain=DOMAIN)
    product.name = node.name
    new.append(product)
    if node.op_type == "Gemm" and len(node.inputs) > 2:
        product.outputs[0].name = f"{node.outputs[0].name}_product"
        new.append(ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{node.name}_bias"))
    result = new[-1].outputs[0]
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, [result])


def replace_experts(graph: Any, node: Any, kind: Format, given: Mapping[str, list[Any]]) -> None:
    """A RoutedExperts node becomes RoutedExperts_<format>, its bias last."""
    import onnx_ir as ir

    w1, w2 = (value.name for value in experts(node))
    x, logits, *rest = node.inputs
    bias = [value for value in rest if value is not None and value.name not in (w1, w2)]
    attributes = dict(node.attributes)
    if kind.name == "int4":
        sides = [int(side) for value in experts(node) for side in value.shape[1:]]
        attributes |= {name: ir.AttrInt64(name, side) for name, side in zip(ATTRIBUTES, sides)}
    values = [x, logits, *given[w1], *given[w2], *bias]
    made = ir.node(f"{OP}_{kind.name}", values, attributes, domain=DOMAIN)
    made.name = node.name
    result = made.outputs[0]
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made], node.outputs, [result])
