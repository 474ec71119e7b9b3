"""Block graphs in the form from which TensorRT fuses most: the same function, fewer kernels.

A block's weights are graph inputs, so the builder knows no value of them and cannot reshape them
ahead of time. Measured on a FLUX double block (TensorRT-RTX 1.7.1, bfloat16): as exported 34
layers, every bias and GELU a kernel of its own; after the two rules below 26, all ten matmuls
with bias, and GELU where there is one, inside the kernel. The runtime binds the same memory: the
rules change declared shapes of weights (`[N]` to `[1, N]`), never their bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    import onnx_ir as ir

    copy = inferred(model)
    for rule in (drop_unread_inputs, flatten_linears, widen_vectors):
        rule(copy.graph)
    fused = ir.to_proto(copy)
    # TensorRT-RTX's plan follows the graph's bytes, not its meaning alone: without these fields, or
    # with other shapes noted, it writes other bytes. So what is no rule's stays as it was given.
    del fused.functions[:], fused.graph.value_info[:]
    fused.functions.extend(model.functions)
    fused.graph.value_info.extend(model.graph.value_info)
    return fused


def inferred(model: onnx.ModelProto) -> Any:
    """A copy as an onnx_ir model whose values have every shape that inference reaches."""
    import onnx
    import onnx_ir as ir

    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def drop_unread_inputs(graph: Any) -> None:
    """Before the rules: inputs that no node reads (experts, with top_k = 0) are no inputs.

    TensorRT would drop them silently, and a runtime that binds them would fail.
    """
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)


def flatten_linears(graph: Any) -> None:
    """Rule 1: x [B, T, K] @ W + b becomes two-dimensional, so that b joins the matmul's kernel.

    Applies where W [K, N] and b [N] are graph inputs; the result is reshaped to [B, T, N].
    """
    import onnx_ir as ir
    from onnx import helper

    def numbers(name: str, *values: int) -> Any:
        return ir.tensor(helper.make_tensor(name, ir.DataType.INT64, [len(values)], values))

    if graph.opset_imports.get("", 0) < 15:  # Shape has no start and end
        return
    for node in list(graph):
        add = biased(node) if node.op_type == "MatMul" else None
        if add is None:
            continue
        x, weight = node.inputs
        bias = next(value for value in add.inputs if value is not node.outputs[0])
        inner, outer = weight.shape
        tag = f"{add.outputs[0].name}_flat"
        made: list[Any] = []

        def op(kind: str, part: str, *inputs: Any, name: str = "", **attributes: Any) -> Any:
            value = ir.val(tag + part)  # noqa: B023 (called in this turn of the loop)
            name = name or value.name
            made.append(ir.node(kind, inputs, attributes, outputs=[value], name=name))  # noqa: B023
            return value

        rows = op("Constant", "_rows", value=numbers(f"{tag}_rows", -1, inner))
        columns = op("Constant", "_columns", value=numbers(f"{tag}_columns", outer))
        lead = op("Shape", "_lead", x, end=2, start=0)
        shape = op("Concat", "_shape", lead, columns, axis=0)
        flat = op("Reshape", "_x", x, rows)
        product = op("MatMul", "_product", flat, weight, name=node.name or f"{tag}_mm")
        product.type, product.shape = x.type, ir.Shape([None, outer])  # rule 2 takes its rank
        result = op("Reshape", "", op("Add", "_y", product, bias), shape)
        # The result takes the Add's name; all stands where the MatMul stood.
        ir.convenience.replace_nodes_and_values(
            graph, node, [node, add], made, add.outputs, [result]
        )


def biased(matmul: Any) -> Any:
    """The Add that follows a MatMul where both are a linear on a rank 3 tensor, or None."""
    x, weight = matmul.inputs
    result, after = matmul.outputs[0], matmul.outputs[0].uses()
    if not weight.is_graph_input() or (rank(x), rank(weight)) != (3, 2):
        return None
    if result.is_graph_output() or [use.node.op_type for use in after] != ["Add"]:
        return None
    (add,) = (use.node for use in after)
    bias = next(value for value in add.inputs if value is not result)
    return add if bias.is_graph_input() and rank(bias) == 1 else None


def widen_vectors(graph: Any) -> None:
    """Rule 2: a vector input [N] that is only added or multiplied takes its partner's rank.

    [N] becomes [1, ..., 1, N]: the broadcast is in the declared shape, and the builder adds no
    kernel that copies N numbers.
    """
    import onnx_ir as ir

    for value in graph.inputs:
        if rank(value) == 1 and isinstance(value.shape[0], int) and not value.is_graph_output():
            wanted = min((partner(value, use) for use in value.uses()), default=0)
            value.shape = ir.Shape([1] * (wanted - 1) + [value.shape[0]])


def partner(value: Any, use: Any) -> int:
    """Rank of what a vector is broadcast against where it is used; 0 where it is no broadcast."""
    if use.node.op_type == "Gemm" and use.idx == 2:
        return 2
    others = [other for other in use.node.inputs if other is not value]
    return rank(others[0]) if use.node.op_type in ELEMENTWISE and len(others) == 1 else 0


def rank(value: Any) -> int:
    """How many dimensions a value has; 0 where that is not known."""
    return 0 if value.shape is None else len(value.shape)


def attentions(model: onnx.ModelProto) -> int:
    """How many attentions of a graph can be fused: Attention nodes, and Softmax between matmuls.

    A router's softmax feeds no matmul and is not counted, nor is a head wider than WIDEST.
    """

    def multiplied(value: Any) -> bool:
        """Whether a matmul wrote it."""
        node = value.producer()
        while node is not None and node.op_type in _BETWEEN:
            before = (each.producer() for each in node.inputs if each is not None)
            node = next((each for each in before if each is not None), None)
        return node is not None and node.op_type == "MatMul"

    def factor(weights: Any, depth: int = 6) -> Any:
        """What attention's weights are multiplied with."""
        for node, index in weights.uses():
            if node.op_type == "MatMul" and index == 0:
                return node.inputs[1]
            if depth and node.op_type in _BETWEEN and (found := factor(node.outputs[0], depth - 1)):
                return found
        return None

    def fusable(softmax: Any) -> bool:
        value = factor(softmax.outputs[0])
        if value is None or not multiplied(softmax.inputs[0]):
            return False
        width = value.shape[-1] if rank(value) else 0
        return not isinstance(width, int) or width <= WIDEST

    return sum(
        node.op_type == "Attention" or (node.op_type == "Softmax" and fusable(node))
        for node in inferred(model).graph
    )
