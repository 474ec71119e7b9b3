"""A small ONNX graph for tests of graph rewriting and plans, made without torch."""

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

D, HEADS = 64, 2  # heads of 8 channels would not fuse, of 16 and more they do
WEIGHTS = {
    "qkv.weight": [D, 3 * D],
    "qkv.bias": [3 * D],
    "scale": [D // HEADS],
    "out.weight": [D, D],
    "out.bias": [D],
}


def attention(dtype: int = TensorProto.FLOAT, opset: int = 20) -> onnx.ModelProto:
    """Self-attention with residual; hidden_states [batch, image_tokens, D], weights as inputs."""

    def vector(name: str, *numbers: int) -> onnx.NodeProto:
        tensor = helper.make_tensor(name, TensorProto.INT64, [len(numbers)], numbers)
        return helper.make_node("Constant", [], [name], value=tensor)

    nodes = [
        vector("split_heads", 0, 0, 3, HEADS, D // HEADS),
        vector("join_heads", 0, 0, D),
        helper.make_node("MatMul", ["hidden_states", "qkv.weight"], ["m"]),
        helper.make_node("Add", ["m", "qkv.bias"], ["qkv"]),
        helper.make_node("Reshape", ["qkv", "split_heads"], ["five"]),
        helper.make_node("Transpose", ["five"], ["heads"], perm=[2, 0, 3, 1, 4]),
        helper.make_node("Split", ["heads"], ["q1", "k1", "v1"], axis=0, num_outputs=3),
        *(
            node
            for name in "qkv"
            for node in (
                vector(f"axis_{name}", 0),
                helper.make_node("Squeeze", [f"{name}1", f"axis_{name}"], [name]),
            )
        ),
        helper.make_node("Mul", ["q", "scale"], ["q_scaled"]),
        helper.make_node("Transpose", ["k"], ["k_t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q_scaled", "k_t"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=-1),
        helper.make_node("MatMul", ["probabilities", "v"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["mixed_t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["mixed_t", "join_heads"], ["joined"]),
        helper.make_node("MatMul", ["joined", "out.weight"], ["o"]),
        helper.make_node("Add", ["out.bias", "o"], ["projected"]),
        helper.make_node("Add", ["hidden_states", "projected"], ["out_hidden_states"]),
    ]
    shape = ["batch", "image_tokens", D]
    inputs = [info("hidden_states", shape, dtype)]
    inputs += [info(name, size, dtype) for name, size in WEIGHTS.items()]
    graph = helper.make_graph(nodes, "attention", inputs, [info("out_hidden_states", shape, dtype)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """Any graph at opset 20."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("d2m", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def info(
    name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    """An input's or output's name, shape and type."""
    return helper.make_tensor_value_info(name, dtype, shape)
