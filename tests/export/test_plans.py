"""Plans are really built, without a GPU: attention fused, no host in between, the same bytes."""

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from tinygraph import D, attention

from export.fuse import fuse
from export.layers import Layer, check_plan, layers, summary
from export.plans import bounds, build_plans, default_profiles, load_graph, tensors
from export.toolchain import build, check_sm, load_api, target_name

rtx = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.tensorrt
PROFILES = {"batch": [1, 1, 4], "image_tokens": [4, 16, 64], "text_tokens": [4, 8, 8]}
FLOAT, BFLOAT16 = TensorProto.FLOAT, TensorProto.BFLOAT16
WEIGHT_NAMES = ("w1", "b1", "w2", "b2")


def model_of(nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("d2m", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def info(name, shape, dtype=FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def dump_of(model, shapes):
    return layers(build(rtx, model, shapes)[1])


X, Y = info("x", ["n", 8]), info("y", ["n", 8])
N = {"x": [[2, 8], [4, 8], [8, 8]]}


def save(folder: Path, name: str, model: onnx.ModelProto) -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(model, str(path))
    return path


# ---------------------------------------------------------------- build_plans


def test_build_plans_writes_plans_and_says_everything_a_runtime_needs(tmp_path):
    path = save(tmp_path, "attention", attention(TensorProto.BFLOAT16))
    seen = []
    plans = build_plans(
        {"transformer/double": path},
        tmp_path / "bundle",
        api="tensorrt_rtx",
        dtype="bfloat16",
        profiles=PROFILES,
        progress=lambda *args: seen.append(args),
    )
    (entry,) = plans.values()
    assert list(plans) == ["trt-rtx-portable"]
    assert entry["api"] == "tensorrt_rtx"
    assert entry["version"] == rtx.__version__
    assert entry["compute_capabilities"] == []
    assert entry["profiles"] == {name: PROFILES[name] for name in ("batch", "image_tokens")}
    assert entry["layers"]["transformer/double"]["fused_attention"] == 1
    relative = entry["files"]["transformer/double"]
    assert relative == "plans/trt-rtx-portable/transformer/double.plan"
    assert (tmp_path / "bundle" / relative).stat().st_size > 10_000
    io = entry["tensors"]["transformer/double"]
    assert io["inputs"][0]["shape"] == ["batch", "image_tokens", D]
    assert {row["dtype"] for row in io["inputs"]} == {"bfloat16"}
    assert io["outputs"][0]["name"] == "out_hidden_states"
    assert seen[0] == ("plans (tensorrt_rtx)", 0, 1) and seen[-1][1:] == (1, 1)
    json.dumps(plans, allow_nan=False)


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    path = save(tmp_path, "attention", attention(TensorProto.FLOAT16))
    graphs = {f"transformer/{name}": path for name in "ab"}  # built side by side
    found = []
    for folder in ("one", "two"):
        kwargs = {"sm": (86, 120), "dtype": "float16", "profiles": PROFILES}
        plans = build_plans(graphs, tmp_path / folder, **kwargs)
        (entry,) = plans.values()
        assert list(plans) == ["trt-rtx-sm86-sm120"]
        found += [(tmp_path / folder / file).read_bytes() for file in entry["files"].values()]
    assert len(set(found)) == 1


def test_float32_keeps_its_attention_apart_and_is_not_asked_to_fuse_it(tmp_path):
    path = save(tmp_path, "attention", attention())
    (entry,) = build_plans(
        {"transformer/double": path}, tmp_path, dtype="float32", profiles=PROFILES
    ).values()
    assert entry["layers"]["transformer/double"]["fused_attention"] == 0


def test_a_missing_profile_and_a_missing_file_are_named(tmp_path):
    path = save(tmp_path, "attention", attention())
    with pytest.raises(ValueError, match="expected a profile for 'batch' beside image_tokens"):
        build_plans({"transformer/double": path}, tmp_path, profiles={"image_tokens": [1, 2, 3]})
    with pytest.raises(FileNotFoundError, match="nothing.onnx is not a file"):
        build_plans({"a/b": tmp_path / "nothing.onnx"}, tmp_path, profiles=PROFILES)


def test_bounds_follow_sums_multiples_and_a_components_own_profile():
    io = {
        "inputs": [
            {"name": "rope", "shape": ["tokens", 4]},
            {"name": "ids", "shape": ["batch", "text_tokens"]},
            {"name": "w", "shape": [4, 4]},
        ],
        "outputs": [{"name": "y", "shape": ["8*image_tokens", "2 * batch + 1"]}],
    }
    profiles = {**PROFILES, "clip.text_tokens": [7, 7, 7]}
    assert bounds(io, profiles, "t5/all") == {
        "rope": ((8, 4), (24, 4), (72, 4)),
        "ids": ((1, 4), (1, 8), (4, 8)),
    }
    assert bounds(io, profiles, "clip/all")["ids"] == ((1, 7), (1, 7), (4, 7))


def test_default_profiles_hold_the_default_picture():
    profiles = default_profiles(
        {
            "defaults": {"height": 1024, "width": 1024},
            "latents": {"vae_scale_factor": 8},
            "tokenizers": {"tokenizer": {"max_length": 77}, "tokenizer_2": {"max_length": 512}},
        }
    )
    assert profiles["image_tokens"] == [256, 4096, 9216]
    assert profiles["latent_height"] == [32, 128, 192]
    assert all(low <= opt <= high for low, opt, high in profiles.values())


# ---------------------------------------------------------------- the toolchain


def test_which_library_and_which_gpus():
    assert load_api("tensorrt_rtx") is rtx
    with pytest.raises(ValueError, match="the plan api is 'onnx', expected auto"):
        load_api("onnx")
    assert check_sm(rtx, [120, 86, 86]) == (86, 120)
    with pytest.raises(ValueError, match="--sm is 90, expected some of 75, 80"):
        check_sm(rtx, [86, 90])
    assert target_name("tensorrt_rtx", ()) == "trt-rtx-portable"
    assert target_name("tensorrt", (90,)) == "trt-sm90"


def test_tensorrt_is_named_with_its_cure_where_it_is_missing():
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install 'd2m\[trt\]'"):
            load_api("tensorrt")
        assert load_api("auto") is rtx


def test_tensorrt_proper_says_that_it_needs_a_gpu():
    pytest.importorskip("cuda.bindings")
    from export.toolchain import local_sm

    class Proper:  # only what check_sm reads of the module
        __name__, __version__ = "tensorrt", "10.9.0"

    if local_sm() is None:
        with pytest.raises(OSError, match="this machine has none; build with --trt-rtx"):
            check_sm(Proper, ())


def test_a_node_that_is_refused_is_named():
    node = helper.make_node("Foo", ["x"], ["y"], domain="d2m", name="my_foo")
    with pytest.raises(ValueError, match=r"plan t/foo: node 'my_foo' \(Foo\) is refused"):
        build(rtx, model_of([node], [X], [Y]), N, name="t/foo")


# ---------------------------------------------------------------- the layer dump


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
    """An FFN on rank 3: both biases, and the GELU, inside the matmuls' kernels."""
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
    assert [sum("FcAdd" in layer.name for layer in found) for found in (plain, fused)] == [0, 2]
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


def test_load_graph_is_the_graph_with_body_and_fused(tmp_path):
    path = save(tmp_path, "attention", attention())
    io = tensors(load_graph(path, tokens=16))
    assert {row["name"]: row["shape"] for row in io["inputs"]}["qkv.bias"] == [1, 3 * D]
