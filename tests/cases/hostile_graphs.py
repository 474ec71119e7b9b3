"""ONNX models made to harm: each with what must be said of it. Made with the onnx package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
from onnx import TensorProto as T
from onnx import helper as h


def model(
    nodes: Sequence[Any], initializers: Sequence[Any] = (), functions: Sequence[Any] = ()
) -> onnx.ModelProto:
    """A model of one input x [1] and one output y."""
    x, y = (h.make_tensor_value_info(name, T.FLOAT, None) for name in "xy")
    graph = h.make_graph(list(nodes), "g", [x], [y], initializer=list(initializers))
    sets = [h.make_opsetid("", 20), h.make_opsetid("d", 1), h.make_opsetid("com.microsoft", 1)]
    return h.make_model(graph, functions=list(functions), opset_imports=sets, ir_version=9)


def add(*inputs: str, out: str = "y") -> Any:
    return h.make_node("Add", inputs, [out])


def harmless() -> onnx.ModelProto:
    return model([add("x", "c")], [h.make_tensor("c", T.FLOAT, [1], [2.0])])


def outside(**row: str) -> onnx.ModelProto:
    """A weight of four floats in another file."""
    tensor = T(name="w", data_type=T.FLOAT, dims=[4], data_location=T.EXTERNAL)
    rows = {"location": "w.safetensors", "offset": "16", "length": "16"} | row
    for key, value in rows.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model([add("x", "w")], [tensor])


def huge_constant() -> onnx.ModelProto:
    """1 GiB that constant folding would compute: 150 bytes."""
    shape = h.make_tensor("s", T.INT64, [1], [1 << 28])
    nodes = [
        h.make_node("Constant", [], ["s"], value=shape),
        h.make_node("ConstantOfShape", ["s"], ["big"]),
        h.make_node("ReduceSum", ["big"], ["t"], keepdims=0),
        add("x", "t"),
    ]
    return model(nodes)


def doubling(levels: int) -> onnx.ModelProto:
    """A constant joined with itself again and again."""
    nodes = [h.make_node("Concat", [f"c{i}"] * 2, [f"c{i + 1}"], axis=0) for i in range(levels)]
    start = h.make_tensor("c0", T.FLOAT, [1024], [1.0] * 1024)
    return model([*nodes, add("x", f"c{levels}")], [start])


def laughs(levels: int) -> onnx.ModelProto:
    """Functions that call the one before twice: 2^levels nodes spelled out."""
    sets = [h.make_opsetid("", 20), h.make_opsetid("d", 1)]
    functions = [h.make_function("d", "f0", ["x"], ["y"], [add("x", "x")], sets)]
    for i in range(1, levels):
        calls = [
            h.make_node(f"f{i - 1}", ["x"], ["t"], domain="d"),
            h.make_node(f"f{i - 1}", ["t"], ["y"], domain="d"),
        ]
        functions.append(h.make_function("d", f"f{i}", ["x"], ["y"], calls, sets))
    return model([h.make_node(f"f{levels - 1}", ["x"], ["y"], domain="d")], (), functions)


def circle() -> onnx.ModelProto:
    """A function that calls itself."""
    sets = [h.make_opsetid("", 20), h.make_opsetid("d", 1)]
    call = h.make_node("f", ["x"], ["y"], domain="d")
    return model([call], (), [h.make_function("d", "f", ["x"], ["y"], [call], sets)])


def forever() -> onnx.ModelProto:
    """A loop that never ends."""
    condition = h.make_node("Identity", ["go"], ["again"])
    step = h.make_node("Identity", ["v"], ["w"])
    inputs = [
        h.make_tensor_value_info("i", T.INT64, []),
        h.make_tensor_value_info("go", T.BOOL, []),
        h.make_tensor_value_info("v", T.FLOAT, None),
    ]
    outputs = [
        h.make_tensor_value_info("again", T.BOOL, []),
        h.make_tensor_value_info("w", T.FLOAT, None),
    ]
    body = h.make_graph([condition, step], "body", inputs, outputs)
    true = h.make_tensor("true", T.BOOL, [], [True])
    return model([h.make_node("Loop", ["", "true", "x"], ["y"], body=body)], [true])


def nested(levels: int) -> onnx.ModelProto:
    """If in If in If."""
    true = h.make_tensor("true", T.BOOL, [], [True])
    node = h.make_node("Identity", ["x"], ["y0"])
    for i in range(levels):
        out = h.make_tensor_value_info(f"y{i}", T.FLOAT, None)
        branch = h.make_graph([node], "b", [], [out])
        node = h.make_node("If", ["true"], [f"y{i + 1}"], then_branch=branch, else_branch=branch)
    return model([node, h.make_node("Identity", [f"y{levels}"], ["y"])], [true])


def sparse() -> onnx.ModelProto:
    values = h.make_tensor("v", T.FLOAT, [1], [1.0])
    places = h.make_tensor("p", T.INT64, [1], [0])
    found = harmless()
    found.graph.sparse_initializer.append(h.make_sparse_tensor(values, places, [1 << 40]))
    return found


def lying(dims: list[int], **fields: Any) -> onnx.ModelProto:
    """A tensor that says it is larger than its bytes."""
    return model([add("x", "c")], [T(name="c", data_type=T.FLOAT, dims=dims, **fields)])


def operator(domain: str, name: str) -> onnx.ModelProto:
    return model([h.make_node(name, ["x"], ["y"], domain=domain)])


HOSTILE: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "up": (lambda: outside(location="../secret"), "lies in '../secret', expected one of: w.safe"),
    "absolute": (lambda: outside(location="/etc/passwd"), "lies in '/etc/passwd'"),
    "below": (lambda: outside(location="x/../w.safetensors"), "expected one of"),
    "unlisted": (lambda: outside(location="other.bin"), "expected one of"),
    "no location": (lambda: outside(location=""), "lies in ''"),
    "terminal": (lambda: outside(location="\x1b[2J"), r"\\x1b"),
    "past the end": (lambda: outside(offset="48", length="16"), "which has 56 bytes"),
    "negative": (lambda: outside(offset="-16"), "lies at"),
    "no number": (lambda: outside(offset="1e3"), "lies at"),
    "endless number": (lambda: outside(offset="9" * 900), "lies at"),
    "other length": (lambda: outside(length="8"), "of 4 elements lies at 16 to 24"),
    "Loop": (forever, "operator Loop, which may never end"),
    "circle": (circle, "call each other deeper than 16"),
    "laughs": (lambda: laughs(18), "deeper than 16"),
    "many calls": (lambda: laughs(14), "comes to 8190 function calls, expected at most 4096"),
    "deep": (lambda: nested(17), "deeper in each other than 16"),
    "sparse": (sparse, "sparse tensor"),
    "lying raw": (lambda: lying([1 << 30], raw_data=b"abcd"), "1073741824 elements fills 4 bytes"),
    "lying floats": (lambda: lying([1 << 30], float_data=[1.0]), "elements fills"),
    "lying nothing": (lambda: lying([1 << 30]), "fills 0 bytes"),
    "negative dims": (lambda: lying([-1], raw_data=b"abcd"), "has dimensions"),
    "many dims": (lambda: lying([1] * 99, raw_data=b"abcd"), "has dimensions"),
    "context": (lambda: operator("com.microsoft", "EPContext"), "microsoft::EPContext, expected"),
    "search": (lambda: operator("com.microsoft", "BeamSearch"), "expected one that is known"),
    "custom": (lambda: operator("evil", "Run"), "operator evil::Run, expected one that is known"),
}
