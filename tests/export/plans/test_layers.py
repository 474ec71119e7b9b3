"""The layer dump: fused attention, conditionals and host copies are seen for what they are."""

import json

import pytest
from onnx import TensorProto, helper

from export.plans.compiler import build
from export.plans.fuse import fuse
from export.plans.layers import Layer, check_plan, layers, summary
from tests.tiny.graph import D, attention, info, model_of

rtx = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt
FLOAT, BFLOAT16 = TensorProto.FLOAT, TensorProto.BFLOAT16
WEIGHT_NAMES = ("w1", "b1", "w2", "b2")
X, Y = info("x", ["n", 8]), info("y", ["n", 8])
N = {"x": [[2, 8], [4, 8], [8, 8]]}


def dump_of(model, shapes):
    return layers(build(rtx, model, shapes)[1])


def test_a_conditional_is_found():
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"])], "then", [], [info("t", ["n", 8])]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["e"])], "else", [], [info("e", ["n", 8])]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    weight = helper.make_tensor("w", FLOAT, [8, 8], [float(i % 7) for i in range(64)])
    found = dump_of(model_of([node], [X, info("c", [], TensorProto.BOOL)], [Y], [weight]), N)
    assert summary(found)["conditionals"] and summary(found)["host_copies"]
    with pytest.raises(ValueError, match="plan bad (branches|copies) .* in layer"):
        check_plan("bad", found)


def test_a_size_that_depends_on_data_is_found():
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["limit"], to=TensorProto.INT64),
        helper.make_node("Range", ["zero", "limit", "one"], ["r"]),
        helper.make_node("Cast", ["r"], ["f"], to=FLOAT),
        helper.make_node("ReduceSum", ["f"], ["s"], keepdims=0),
        helper.make_node("Mul", ["x", "s"], ["y"]),
    ]
    constants = [
        helper.make_tensor("zero", TensorProto.INT64, [], [0]),
        helper.make_tensor("one", TensorProto.INT64, [], [1]),
    ]
    found = dump_of(model_of(nodes, [X], [Y], constants), N)
    with pytest.raises(ValueError, match="copies between device and host"):
        check_plan("bad", found)


def test_an_attention_in_pieces_is_found():
    found = dump_of(attention(), {"hidden_states": [[1, 4, D], [1, 16, D], [2, 64, D]]})
    assert check_plan("fp32", found, dtype="float32", attentions=1)["fused_attention"] == 0
    with pytest.raises(ValueError, match="fuses 0 of 1 attentions"):
        check_plan("bad", found, dtype="bfloat16", attentions=1)


def test_fuse_takes_bias_and_gelu_into_the_matmuls():
    """An FFN on rank 3: the first matmul's kernel adds the bias and applies the GELU."""
    inputs = [info("x", ["n", "m", D], BFLOAT16)]
    inputs += [info(name, [D, D] if name[0] == "w" else [D], BFLOAT16) for name in WEIGHT_NAMES]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Add", ["h", "b1"], ["a"]),
        helper.make_node("Gelu", ["a"], ["g"], approximate="tanh"),
        helper.make_node("MatMul", ["g", "w2"], ["z"]),
        helper.make_node("Add", ["z", "b2"], ["y"]),
    ]
    model = model_of(nodes, inputs, [info("y", ["n", "m", D], BFLOAT16)])
    shapes = {"x": [[1, 4, D], [1, 16, D], [2, 64, D]]}
    plain, fused = (dump_of(graph, shapes) for graph in (model, fuse(model)))
    inside = [
        any("FcAdd" in layer.name and "Tanh" in layer.name for layer in found)
        for found in (plain, fused)
    ]
    assert inside == [False, True]
    assert summary(fused)["kernels"] < summary(plain)["kernels"]


def test_no_dump_and_an_inspectors_json():
    with pytest.raises(ValueError, match="holds no 'Layers:' dump"):
        layers(["[MemUsage] 3 MiB"])
    record = {"Name": "_gemm_mha_v2_0", "LayerType": "kgen", "TacticName": "", "Metadata": ""}
    found = layers(json.dumps({"Layers": [record, "bare name"]}))
    assert found[0].attention and found[1] == Layer("bare name", "", "", ())


def test_an_onnx_name_is_no_fused_attention():
    assert not Layer("node_mha_matmul_3", "shape_call", "", ()).attention
    assert not Layer("attention_out_gemm", "gemm", "__myelin_CASK_STUB", ()).attention
