"""d2m::RoutedExperts alone as an ONNX model, and the same experts as com.microsoft.MoE."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from d2m.families.site import up_rows
from export.op.schema import DOMAIN, OP, inputs_of, version_of

# Its gelu is the tanh form, and it has no exact and no gated one.
MOE = {"gelu_tanh": "gelu", "silu": "silu", "swiglu": "swiglu"}


def bare_model(
    top_k: int,
    sizes: tuple[int, int, int],
    dtype: int = TensorProto.FLOAT,
    activation: str = "gelu_tanh",
    bias: bool = True,
) -> onnx.ModelProto:
    """One RoutedExperts node with everything as graph inputs, sizes (D, E, H); T is dynamic."""
    D, E, H = sizes
    wide = H * up_rows(activation)
    known = {
        "x": (dtype, ["T", D]),
        "logits": (TensorProto.FLOAT, ["T", E]),
        "w1": (dtype, [E, D, wide]),
        "b1": (dtype, [E, wide]),
        "w2": (dtype, [E, H, D]),
    }
    given = inputs_of(activation, bias)
    inputs = [helper.make_tensor_value_info(name, *known[name]) for name in given]
    version = version_of(activation, bias)
    own = {} if version == 1 else {"activation": activation}
    node = helper.make_node(OP, given, ["y"], domain=DOMAIN, top_k=top_k, **own)
    output = helper.make_tensor_value_info("y", dtype, ["T", D])
    graph = helper.make_graph([node], "g", inputs, [output])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, version)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def microsoft_model(
    activation: str, top_k: int, given: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """com.microsoft.MoE of x and logits; given: weights as RoutedExperts has them.

    Its SwiGLU is (value + beta) * gate * sigmoid(alpha * gate), from interleaved columns.
    """
    E, D, wide = given["w1"].shape
    w1, b1 = given["w1"].transpose(0, 2, 1), given.get("b1")
    fields = {"k": top_k, "activation_type": MOE[activation], "normalize_routing_weights": 0}
    if activation == "swiglu":
        fields |= {"activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_fusion": 1}
        w1 = w1.reshape(E, 2, wide // 2, D).transpose(0, 2, 1, 3).reshape(E, wide, D)
        if b1 is not None:
            b1 = b1.reshape(E, 2, wide // 2).transpose(0, 2, 1).reshape(E, wide)
    weights = {"w1": w1, "b1": b1, "w2": given["w2"].transpose(0, 2, 1)}
    names = [name if value is not None else "" for name, value in weights.items()]
    node = helper.make_node("MoE", ["x", "logits", *names], ["y"], domain="com.microsoft", **fields)
    infos = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", size])
        for name, size in (("x", D), ("logits", E), ("y", D))
    }
    arrays = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        for name, value in weights.items()
        if value is not None
    ]
    graph = helper.make_graph([node], "g", [infos["x"], infos["logits"]], [infos["y"]], arrays)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model: onnx.ModelProto, check: bool = True) -> ort.InferenceSession:
    """In ONNX Runtime on one thread; check: by onnx first, which knows standard operators alone."""
    if check:
        onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
