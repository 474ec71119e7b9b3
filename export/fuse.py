"""Block graphs in the form from which TensorRT fuses most: the same function, fewer kernels.

A block's weights are graph inputs, so the builder knows no value of them and cannot reshape them
ahead of time. Measured on a FLUX double block (TensorRT-RTX 1.7.1, bfloat16): as exported 34
layers, every bias and GELU a kernel of its own; after the two rules below 26, all ten matmuls
with bias, and GELU where there is one, inside the kernel. The runtime binds the same memory: the
rules change declared shapes of weights (`[N]` to `[1, N]`), never their bytes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

ELEMENTWISE = {"Add", "Mul", "Sub", "Div"}
# What may stand between the two matmuls of an attention and its softmax.
_BETWEEN = {"Cast", "Mul", "Div", "Add", "Where", "IsNaN", "Reshape", "Transpose", "Identity"}
# The widest head that is fused (measured: 256 is, 264 is not, in TensorRT-RTX 1.7.1). The VAEs of
# published models have one head of 384 or 512 channels.
WIDEST = 256


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a block graph, rewritten by both rules; what is read and written keeps its name."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    drop_unread_inputs(copy)
    flatten_linears(copy)
    widen_vectors(copy)
    return copy


def drop_unread_inputs(model: onnx.ModelProto) -> int:
    """Before the rules: inputs that no node reads (experts, with top_k = 0) are no inputs.

    TensorRT would drop them silently, and a runtime that binds them would fail.
    """
    graph = model.graph
    uses = consumers(graph)
    read = [value for value in graph.input if uses[value.name]]
    dropped = len(graph.input) - len(read)
    kept = [type(value).FromString(value.SerializeToString()) for value in read]
    del graph.input[:]
    graph.input.extend(kept)
    return dropped


def flatten_linears(model: onnx.ModelProto) -> int:
    """Rule 1: x [B, T, K] @ W + b becomes two-dimensional, so that b joins the matmul's kernel.

    Applies where W [K, N] and b [N] are graph inputs; the result is reshaped to [B, T, N].
    Returns how many linears were rewritten.
    """
    from onnx import helper

    graph = model.graph
    ranks, sizes = shapes(model)
    inputs = {value.name for value in graph.input}
    uses = consumers(graph)
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if opset < 15:  # Shape has no start and end
        return 0
    nodes: list[onnx.NodeProto] = []
    merged: set[str] = set()  # outputs of the Adds that were taken into a linear
    for node in graph.node:
        if merged.intersection(node.output):
            continue
        add = linear(node, uses, inputs, ranks) if node.op_type == "MatMul" else None
        if add is None:
            nodes.append(node)
            continue
        x, weight = node.input
        bias = next(name for name in add.input if name != node.output[0])
        tag = f"{add.output[0]}_flat"
        inner, outer = sizes[weight]
        nodes += [
            constant(f"{tag}_rows", [-1, inner]),
            constant(f"{tag}_columns", [outer]),
            helper.make_node("Shape", [x], [f"{tag}_lead"], name=f"{tag}_lead", start=0, end=2),
            helper.make_node(
                "Concat", [f"{tag}_lead", f"{tag}_columns"], [f"{tag}_shape"],
                name=f"{tag}_shape", axis=0,
            ),
            helper.make_node("Reshape", [x, f"{tag}_rows"], [f"{tag}_x"], name=f"{tag}_x"),
            helper.make_node(
                "MatMul", [f"{tag}_x", weight], [f"{tag}_product"], name=node.name or f"{tag}_mm"
            ),
            helper.make_node("Add", [f"{tag}_product", bias], [f"{tag}_y"], name=f"{tag}_y"),
            helper.make_node("Reshape", [f"{tag}_y", f"{tag}_shape"], list(add.output), name=tag),
        ]  # fmt: skip
        merged.update(add.output)
    if merged:
        ordered = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(ordered)
    return len(merged)


def widen_vectors(model: onnx.ModelProto) -> int:
    """Rule 2: a vector input [N] that is only added or multiplied takes its partner's rank.

    [N] becomes [1, ..., 1, N]: the broadcast is in the declared shape, and the builder adds no
    kernel that copies N numbers. Returns how many inputs were changed.
    """
    graph = model.graph
    ranks, sizes = shapes(model)
    uses = consumers(graph)
    done = 0
    for value in graph.input:
        size = sizes.get(value.name)
        if size is None or len(size) != 1 or not isinstance(size[0], int):
            continue
        rank = min((partner(value.name, node, ranks) for node in uses[value.name]), default=0)
        if rank < 2:
            continue
        dims = value.type.tensor_type.shape.dim
        del dims[:]
        for number in [1] * (rank - 1) + [size[0]]:
            dims.add().dim_value = number
        done += 1
    return done


def partner(name: str, node: onnx.NodeProto, ranks: dict[str, int]) -> int:
    """Rank of what a vector is broadcast against in `node`; 0 where it is no broadcast."""
    if node.op_type == "Gemm" and list(node.input).index(name) == 2:
        return 2
    others = [other for other in node.input if other != name]
    return ranks.get(others[0], 0) if node.op_type in ELEMENTWISE and len(others) == 1 else 0


def attentions(model: onnx.ModelProto) -> int:
    """How many attentions of a graph can be fused: Attention nodes, and Softmax between matmuls.

    A router's softmax feeds no matmul and is not counted, nor is a head wider than WIDEST.
    """
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    uses = consumers(graph)
    _, sizes = shapes(model)

    def before(name: str) -> bool:
        node = producer.get(name)
        while node is not None and node.op_type in _BETWEEN:
            node = next((producer[i] for i in node.input if i in producer), None)
        return node is not None and node.op_type == "MatMul"

    def values(name: str, depth: int = 6) -> str | None:
        """What the weights `name` are multiplied with."""
        for node in uses[name]:
            if node.op_type == "MatMul" and node.input[0] == name:
                return str(node.input[1])
            if depth and node.op_type in _BETWEEN and (found := values(node.output[0], depth - 1)):
                return found
        return None

    def fusable(softmax: onnx.NodeProto) -> bool:
        value = values(softmax.output[0])
        if value is None or not before(softmax.input[0]):
            return False
        width = sizes.get(value, (0,))[-1]
        return not isinstance(width, int) or width <= WIDEST

    return sum(
        node.op_type == "Attention" or (node.op_type == "Softmax" and fusable(node))
        for node in graph.node
    )


def linear(
    node: onnx.NodeProto,
    uses: dict[str, list[onnx.NodeProto]],
    inputs: set[str],
    ranks: dict[str, int],
) -> onnx.NodeProto | None:
    """The Add that follows `node` where both are a biased linear on a rank 3 tensor."""
    x, weight = node.input
    if weight not in inputs or ranks.get(weight) != 2 or ranks.get(x) != 3:
        return None
    after = uses[node.output[0]]
    if len(after) != 1 or after[0].op_type != "Add":
        return None
    others = [name for name in after[0].input if name != node.output[0]]
    biased = len(others) == 1 and others[0] in inputs and ranks.get(others[0]) == 1
    return after[0] if biased else None


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Which nodes read each name; a graph output counts as a reader of its own."""
    import onnx

    uses: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            uses[name].append(node)
    for value in graph.output:
        uses[value.name].append(onnx.NodeProto(op_type="<output>", input=[value.name]))
    return uses


def shapes(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, tuple[int | str, ...]]]:
    """Ranks and sizes (number, or a dimension's name) of every tensor that inference reaches."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    sizes: dict[str, tuple[int | str, ...]] = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            sizes[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims
            )
    for tensor in graph.initializer:
        sizes[tensor.name] = tuple(tensor.dims)
    return {name: len(size) for name, size in sizes.items()}, sizes


def constant(name: str, numbers: list[int | str]) -> onnx.NodeProto:
    """A Constant node holding int64 `numbers`, called as its output."""
    import onnx
    from onnx import helper

    tensor = helper.make_tensor(name, onnx.TensorProto.INT64, [len(numbers)], numbers)
    return helper.make_node("Constant", [], [name], name=name, value=tensor)
