"""A component as one ONNX model: a function per block type, a call per block.

Initializers are external data: an offset into a safetensors file of the component beside the model,
so there is no second copy of the weights. Blocks of a group are called inside an `If` (see
export.graph.block_choice). Where a tensor is stored in another type than the graph
computes in, a Cast follows it; ONNX Runtime folds these when a session opens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.graph.block_choice import CHOOSE, KAPPA, choice, choose_function, conditional
from export.graph.routers import LOGITS
from export.graph.trace import OUT, Spec
from export.op.schema import DOMAIN, OPSET

if TYPE_CHECKING:
    import onnx

    from export.graph.program import BlockType, Program

BLOCKS = "d2m.blocks"  # domain of the functions that are block types
STORED = {
    "F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16",
    "I8": "INT8", "U8": "UINT8", "F8_E4M3": "FLOAT8E4M3FN",
}  # fmt: skip


def compose(
    program: Program,
    weights: Path,
    top_k: int | None = None,
    kappa: int | None = None,
    shards: Sequence[Path] = (),
) -> onnx.ModelProto:
    """The model for `<component>.onnx`, to be saved in the directory that holds `weights`.

    `top_k` chooses the graph of routed types. With groups, `kappa` is the default of an optional
    input of that name (int64). `shards` are more files of weights, in the same directory. Only
    their headers are read.
    """
    # By onnx's helper: a model built in onnx_ir notes the type and shape of every weight once more
    # (27 kB of 145 for a small transformer), and its shared constants have other bytes.
    from onnx import TensorProto, helper

    from runtime.files.tensors import read_header

    header = {
        name: (tensor, file.name)
        for file in (weights, *shards)
        for name, tensor in read_header(file).items()
    }
    # Filled by `call` as the program is walked: functions once a type, weights once a name.
    functions: dict[str, Any] = {}
    nodes: list[Any] = []
    initializers: list[Any] = []
    cast: dict[str, str] = {}  # tensor -> the name under which blocks read it
    env = {name: name for name in program.inputs}
    inputs = [value_info(name, spec) for name, spec in program.inputs.items()]
    # The call that writes a tensor last, which gives the component's output its name.
    last = {name: index for index in range(len(program.calls)) for name in program.written(index)}
    opening = {group.calls[0]: name for name, group in program.groups.items()}
    member = {call: name for name, group in program.groups.items() for call in group.calls}

    # A block reads only what its graph for this top_k reads: experts that do not run are no weights
    # of the model. A weight that two calls share is one initializer, with one Cast.
    def call(kind: str, prefix: str, results: list[str]) -> onnx.NodeProto:
        row = program.types[kind]
        graph = row.graphs[str(top_k) if row.routed else ""]
        read = used_inputs(graph)
        for each in (*graph.functions, function(row, graph, read)):
            functions[f"{each.domain}:{each.name}"] = each
        arguments = [env[name] for name in row.inputs if name in read]
        for local, spec in row.weights.items():
            if local not in read:
                continue
            name = prefix + local
            if name not in cast:
                tensor = external(name, *header[name])
                initializers.append(tensor)
                cast[name] = name
                wanted = onnx_type(spec)
                if tensor.data_type != wanted:
                    cast[name] = f"{name}.cast"
                    nodes.append(
                        helper.make_node("Cast", [name], [cast[name]], name=cast[name], to=wanted)
                    )
            arguments.append(cast[name])
        return helper.make_node(kind, arguments, results, name=prefix or kind, domain=BLOCKS)

    for index, (kind, prefix) in enumerate(program.calls):
        # A group's router runs before the first of its blocks, on what enters that block.
        if group := opening.get(index):
            router, logits = program.groups[group], f"{group}.{LOGITS}"
            nodes.append(call(router.type, router.prefix, [logits]))
            nodes += choice(group, logits, BLOCKS)
        # Every call writes names of its own; the last writer of a program's output has that name.
        before, results = dict(env), []
        for name in program.written(index):
            closing = name in program.outputs and last[name] == index
            results.append(name if closing else f"{name}.{index}")
        made = call(kind, prefix, results)
        env |= zip(program.written(index), results, strict=True)
        if group := member.get(index):
            offset = index - program.groups[group].calls[0]
            specs = program.types[kind].outputs.items()
            old = {env[name]: before[name] for name, _ in specs}
            nodes += conditional(group, offset, made, old, [onnx_type(spec) for _, spec in specs])
        else:
            nodes.append(made)
    if program.groups:
        functions[CHOOSE] = choose_function(BLOCKS)
        inputs.append(helper.make_tensor_value_info(KAPPA, TensorProto.INT64, []))
        initializers.append(helper.make_tensor(KAPPA, TensorProto.INT64, [], [kappa]))
    graph = helper.make_graph(
        nodes,
        "program",
        inputs,
        [value_info(name, spec) for name, spec in program.outputs.items()],
        initializers,
    )
    model = helper.make_model(
        graph,
        functions=list(functions.values()),
        opset_imports=[helper.make_opsetid(d, v) for d, v in domains(functions.values())],
        ir_version=10,
        producer_name="d2m",
    )
    return model


def domains(functions: Collection[onnx.FunctionProto]) -> list[tuple[str, int]]:
    """Opset imports of the composed model."""
    versions = {DOMAIN: 1, BLOCKS: 1}
    own = {each.domain for each in functions}
    for each in functions:  # the newest version of the op that a block has
        for entry in each.opset_import:
            if entry.domain:
                versions[entry.domain] = max(versions.get(entry.domain, 1), entry.version)
                own.add(entry.domain)
    versions[""] = OPSET
    return [("", OPSET), *((name, versions[name]) for name in sorted(own - {""}))]


def function(row: BlockType, graph: onnx.ModelProto, read: set[str]) -> onnx.FunctionProto:
    """A block graph as a model-local function; its small initializers become Constant nodes.

    Inputs that the graph does not read (a routed type at top_k 0) are left out.
    """
    from onnx import helper

    constants = [
        helper.make_node("Constant", [], [tensor.name], name=tensor.name, value=tensor)
        for tensor in graph.graph.initializer
    ]
    return helper.make_function(
        BLOCKS,
        row.name,
        [name for name in (*row.inputs, *row.weights) if name in read],
        [OUT + name for name in row.outputs],
        [*constants, *graph.graph.node],
        list(graph.opset_import),
    )


def used_inputs(graph: onnx.ModelProto) -> set[str]:
    """Names that any node reads."""
    return {name for node in graph.graph.node for name in node.input}


def external(name: str, tensor: Any, location: str) -> onnx.TensorProto:
    """An initializer that lies in a safetensors file (`tensor` from its header)."""
    import onnx

    proto = onnx.TensorProto(
        name=name,
        data_type=onnx.TensorProto.DataType.Value(STORED[tensor.dtype]),
        dims=tensor.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (
        ("location", location),
        ("offset", tensor.start),
        ("length", tensor.end - tensor.start),
    ):
        proto.external_data.add(key=key, value=str(value))
    return proto


def onnx_type(spec: Spec) -> int:
    """The ONNX element type of a spec."""
    import onnx

    names = {
        "float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64",
        "int8": "INT8", "uint8": "UINT8", "float8_e4m3fn": "FLOAT8E4M3FN",
    }  # fmt: skip
    return int(onnx.TensorProto.DataType.Value(names[spec.json()["dtype"]]))


def value_info(name: str, spec: Spec) -> onnx.ValueInfoProto:
    """A graph input or output."""
    from onnx import helper

    return helper.make_tensor_value_info(name, onnx_type(spec), list(spec.shape))
