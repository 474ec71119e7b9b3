"""Plans of quantised blocks: what is multiplied in 8 and 4 bits, read from the layer dump."""

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from export.graph.program import Program
from export.plans.build import load_graph
from export.plans.compiler import build, load_api, split_by_format
from export.plans.layers import layers
from export.quant.formats import FORMATS
from export.quant.program import SIXTEEN_BITS, quantised
from export.quant.tensorrt import lowering
from tests.export.quant import test_program

pytestmark = pytest.mark.tensorrt
D, H, E = 512, 256, 8


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> Any:
    """test_program's block with experts, in bfloat16 and as wide as products of FP8 pay."""
    sizes = {"up.weight": (D, 4 * D), "down.weight": (4 * D, D), "down.bias": (D,)}
    for name, value in {"D": D, "H": H, "E": E, "WEIGHTS": sizes | {"norm.weight": (D, D)}}.items():
        monkeypatch.setattr(test_program, name, value)
    row = test_program.block("gelu_tanh", True, 2)
    (model,) = row.graphs.values()
    for value in [*model.graph.input, *model.graph.output]:
        if value.name != "gate.weight":
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    (logits,) = (node for node in model.graph.node if node.output[0] == "logits")
    logits.input[0] = "rows_float"
    place = list(model.graph.node).index(logits)
    model.graph.node.insert(place, helper.make_node("Cast", ["rows"], ["rows_float"], to=1))
    return row


@pytest.mark.parametrize("name, sm, experts", [("fp8", (89, 120), "FP8"), ("nvfp4", (120,), "FP8")])
def test_every_large_product_of_a_block_is_quantised(
    block: Any, tmp_path: Path, name: str, sm: tuple[int, ...], experts: str
) -> None:
    """With weights and scales bound at run time, dense layers and experts alike."""
    x, kind = {"x": block.inputs["x"]}, FORMATS[name]
    program = Program({"block": block}, [("block", "b.")], x, x)
    row = quantised(program, kind, lowering=lowering(1024)).types["block"]
    onnx.save(*row.graphs.values(), tmp_path / "block.onnx")
    model = load_graph(tmp_path / "block.onnx", tokens=1024)
    assert [value.name for value in model.graph.input] == ["x", *row.weights]
    plan, dump = build(
        load_api("tensorrt_rtx"),
        model,
        {"x": ((1, 64, D), (1, 1024, D), (2, 1024, D))},
        sm=sm,
        name="block",
    )
    assert 0 < len(plan) < 4_000_000  # code, and none of the 4.7 MB of weights
    products = {layer.name: layer for layer in layers(dump) if layer.type == "gemm"}
    kinds = {re.sub(r"(_plain)?_.*", "", stem): layer.reads[:2] for stem, layer in products.items()}
    types = {"fp8": "FP8", "nvfp4": "FP4E2M1"}
    assert kinds.pop("kept") == ("BFloat16",) * 2  # a name that is never quantised
    assert kinds.pop("logits") == ("Float",) * 2  # the router's
    assert kinds.pop("m") == (experts,) * 2 and kinds.pop("z") == (experts,) * 2
    dense = [layer for layer in products.values() if layer.name.startswith("plain")]
    assert [layer.reads[:2] for layer in dense] == [(types[name],) * 2] * 2
    assert kinds.keys() == {"plain"}
    assert sum(layer.quantised for layer in products.values()) == 4


def test_graphs_in_sixteen_bits_are_left_as_they_are(block: Any) -> None:
    """A GPU that does not multiply the format reads dequantised weights by their own names."""
    x = {"x": block.inputs["x"]}
    program = Program({"block": block}, [("block", "b.0."), ("block", "b.1.")], x, x)
    found = quantised(program, FORMATS["fp8"], ["b.1."], SIXTEEN_BITS)
    assert len({name for name, _ in found.calls}) == 2  # types as the quantised program has them
    assert all(row.graphs == block.graphs for row in found.types.values())


def test_which_gpus_get_which_plans() -> None:
    trt = load_api("tensorrt_rtx")
    both = [((80, 86), None), ((89, 120), "fp8")]
    assert split_by_format(trt, (89, 80, 120, 86), 89, "fp8") == both
    assert split_by_format(trt, (120,), 120, "nvfp4") == [((120,), "nvfp4")]
    assert split_by_format(trt, (86,), 120, "nvfp4") == [((86,), None)]
    assert split_by_format(trt, (), 120, "nvfp4") == [((), None), ((120, 121), "nvfp4")]
    assert split_by_format(trt, (89,), 0, "int8") == [((89,), None)]
