"""fuse(): the same numbers in ONNX Runtime, linears in two dimensions, vectors at their rank."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from export.plans.fuse import attentions, fuse
from tests.tiny.graph import HEADS, WEIGHTS, D, attention


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    shapes = {value.name: value.shape for value in session.get_inputs()}
    shaped = {
        name: array if name == "hidden_states" else array.reshape(shapes[name])
        for name, array in feed.items()
    }
    (output,) = session.run(None, shaped)
    return output


def shape_of(model: onnx.ModelProto, name: str) -> list[int]:
    value = next(value for value in model.graph.input if value.name == name)
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_the_same_numbers():
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal(shape, np.float32) for name, shape in WEIGHTS.items()}
    feed["hidden_states"] = rng.standard_normal((2, 7, D), np.float32)
    model = attention()
    np.testing.assert_allclose(run(fuse(model), feed), run(model, feed), rtol=1e-5, atol=1e-5)


def test_linears_become_two_dimensional_and_vectors_take_their_partners_rank():
    fused = fuse(attention())
    assert shape_of(fused, "qkv.bias") == [1, 3 * D]
    assert shape_of(fused, "out.bias") == [1, D]
    assert shape_of(fused, "scale") == [1, 1, 1, D // HEADS]
    assert shape_of(fused, "qkv.weight") == WEIGHTS["qkv.weight"]
    ops = [node.op_type for node in fused.graph.node]
    assert ops.count("MatMul") == 4
    assert ops.count("Shape") == 2  # one for each of the two linears


def test_the_original_is_left_alone_and_a_second_time_changes_nothing():
    model = attention()
    before = model.SerializeToString(deterministic=True)
    once = fuse(model)
    assert model.SerializeToString(deterministic=True) == before
    assert fuse(once).SerializeToString(deterministic=True) == once.SerializeToString(
        deterministic=True
    )


def test_a_vector_with_another_reader_keeps_its_shape():
    model = attention()
    model.graph.node.append(helper.make_node("Identity", ["out.bias"], ["out_copy"]))
    model.graph.output.append(helper.make_tensor_value_info("out_copy", TensorProto.FLOAT, [D]))
    assert shape_of(fuse(model), "out.bias") == [D]


@pytest.mark.parametrize("opset", [20, 23])
def test_attentions_are_counted_and_a_routers_softmax_is_not(opset):
    model = attention(opset=opset)
    assert attentions(model) == attentions(fuse(model)) == 1
    model.graph.node.extend(
        [
            helper.make_node("Softmax", ["hidden_states"], ["gates"], axis=-1),
            helper.make_node("Mul", ["gates", "hidden_states"], ["out_gated"]),
        ]
    )
    assert attentions(model) == 1


def test_inputs_that_are_not_read_go():
    model = attention()
    model.graph.input.append(helper.make_tensor_value_info("experts.w1", TensorProto.FLOAT, [4]))
    assert [value.name for value in fuse(model).graph.input] == ["hidden_states", *WEIGHTS]
