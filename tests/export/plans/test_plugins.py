"""TensorRT plugins from a package of kernels: all but TensorRT, which is handed in.

`Api` keeps what tensorrt.plugin's decorators and classes are given; sizes are Python integers, so
that a plugin's grids, shapes and arguments come out as numbers and can be compared with the plan.
"""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from d2m.kernels import package
from d2m.kernels.configs import tiles_for
from d2m.kernels.plan import Sizes, forward_plan
from d2m.kernels.ptx import parameters
from export.plans import plugins
from tests.stand_ins.kernels import stand_in

SIZES = Sizes(512, 64, 4, 32, 2, "bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "triton_version", lambda: "3.7.1")
        package.build(out, SIZES, [90], [2], streams=["text"], compile=stand_in)
    return out


class Desc:
    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape_expr = dtype, list(shape)

    def like(self) -> "Desc":
        return Desc(self.dtype, tuple(self.shape_expr))


class Api:
    """tensorrt and tensorrt.plugin as far as plugins use them."""

    float32, int32, float16, bfloat16 = "fp32", "i32", "fp16", "bf16"
    TensorDesc, SymExprs = Desc, list

    def __init__(self) -> None:
        self.described: dict[str, Any] = {}
        self.implemented: dict[str, Any] = {}

    def register(self, name: str) -> Any:
        return lambda function: self.described.setdefault(name, function)

    def aot_impl(self, name: str) -> Any:
        assert name in self.described, "registered first"
        return lambda function: self.implemented.setdefault(name, function)

    KernelLaunchParams = SimpleNamespace
    ShapeExprs = SymIntExprs = staticmethod(lambda count: [None] * count)
    SymInt32 = staticmethod(lambda number: number)


def test_every_launch_is_a_plugin_with_the_plans_numbers(folder: Path) -> None:
    kernels, api = json.loads((folder / "kernels.json").read_text()), Api()
    plan = plugins.choose(kernels, 90, "text", 2)
    ids = plugins.register(api, api, kernels, folder, plan)
    assert ids[0] == "d2m::route_text_k2_sm90" and len(ids) == 5
    for tokens in (2, 77, 512):  # from T K >= E on the bound on tiles is the plan's own
        sizes = replace(SIZES, tokens=tokens)
        wanted = forward_plan(sizes, tiles_for(90, "bf16", tokens, 64, 32))
        tensors = {name: Desc(*row) for name, row in wanted.inputs.items()}
        for name, launch, row in zip(ids, wanted.launches, plan["launches"], strict=True):
            assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name.partition("::")[2])
            read, _, written = plugins.sides(kernels, row)
            given = [tensors[tensor] for tensor in read]
            outputs = api.described[name](*given)
            for tensor, output in zip(written, outputs, strict=True):
                known = {**wanted.work, **wanted.outputs}[tensor]
                assert (output.dtype, tuple(output.shape_expr)) == known
                tensors[tensor] = output
            entry, ptx, params, extra = api.implemented[name](*given, outputs, 0)
            grid = tuple(getattr(params, f"grid_{axis}") for axis, _ in zip("xyz", launch.grid))
            assert (entry, grid) == (launch.kernel, launch.grid)
            assert params.block_x == 32 * launch.warps
            assert [*extra] == [v for _, v in launch.arguments if isinstance(v, int)]
            order = [name for _, name in parameters(ptx, entry)]
            assert len(order) == len(read) + len(extra) + len(written)
    assert tensors["y"].shape_expr == [512, 64]


def test_signatures_name_and_type_every_argument(folder: Path) -> None:
    kernels, api = json.loads((folder / "kernels.json").read_text()), Api()
    plugins.register(api, api, kernels, folder, plugins.choose(kernels, 90, "text", 2))
    signature = inspect.signature(api.described["d2m::up_text_k2_sm90"])
    assert list(signature.parameters)[:3] == ["x", "w1", "b1"]
    assert {p.annotation for p in signature.parameters.values()} == {Desc}
    signature = inspect.signature(api.implemented["d2m::route_text_k2_sm90"])
    assert list(signature.parameters) == ["logits", "outputs", "tactic"]
    assert signature.parameters["outputs"].annotation == tuple[Desc, Desc, Desc]


def test_body_is_a_valid_function_of_five_nodes(folder: Path) -> None:
    kernels = json.loads((folder / "kernels.json").read_text())
    function = plugins.plugin_body(kernels, plugins.choose(kernels, 90, "text", 2))
    assert (function.domain, function.name, list(function.output)) == (
        "d2m",
        "RoutedExperts",
        ["y"],
    )
    known = set(function.input)
    for node in function.node:
        assert set(node.input) <= known and node.domain == "d2m"
        assert {a.name for a in node.attribute} == {"plugin_namespace", "plugin_version"}
        known.update(node.output)
    assert "y" in known
    onnx.FunctionProto.FromString(function.SerializeToString())


def test_a_missing_plan_and_a_missing_library_are_one_sentence(folder: Path) -> None:
    kernels = json.loads((folder / "kernels.json").read_text())
    with pytest.raises(ValueError, match="no plan for sm_80 image k=2, only sm_90 text k=2; build"):
        plugins.choose(kernels, 80, "image", 2)
    with pytest.raises(ImportError, match="--plugin needs tensorrt with its Python plugins"):
        plugins.load_plugin_api()


def test_the_flag_is_refused_where_it_means_nothing() -> None:
    from export.checks import check_plugin

    for trt, rtx, words in ((False, False, "without --trt"), (True, True, "with --trt-rtx")):
        with pytest.raises(ValueError, match=f"--plugin is given {words}, expected --trt alone"):
            check_plugin(trt, rtx)
    with pytest.raises(ImportError, match="leave --plugin out"):
        check_plugin(True, False)


def test_a_graph_gets_the_plugins_body(folder: Path, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    from export.plans.build import load_graph, plugin_plan

    kind = TensorProto.BFLOAT16
    shapes = {"x": ["tokens", 64], "logits": ["tokens", 4], "w1": [4, 64, 32]}
    shapes |= {"b1": [4, 32], "w2": [4, 32, 64]}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT if name == "logits" else kind, shape)
        for name, shape in shapes.items()
    ]
    node = helper.make_node("RoutedExperts", list(shapes), ["y"], domain="d2m", top_k=2)
    output = helper.make_tensor_value_info("y", kind, ["tokens", 64])
    graph = helper.make_graph([node], "g", inputs, [output])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("d2m", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(tmp_path / "g.onnx"))
    assert plugin_plan(tmp_path / "g.onnx", None, [90], 16) is None
    chosen = plugin_plan(tmp_path / "g.onnx", folder, [90], 16)
    assert chosen is not None and chosen["plan"]["stream"] == "text"
    model = load_graph(tmp_path / "g.onnx", tokens=16, plugin=chosen)
    (function,) = model.functions
    assert [n.op_type for n in function.node][0] == "route_text_k2_sm90"
