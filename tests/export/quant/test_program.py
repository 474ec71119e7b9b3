"""Block graphs with quantised weights in ONNX Runtime, against torch doing the same arithmetic."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from d2m.families.site import up_rows
from d2m.model.sparse_ffn import Experts
from export.graph.program import BlockType, Program
from export.graph.trace import Spec
from export.op.bodies import with_body
from export.op.schema import DOMAIN, OP, version_of
from export.parity.quantised_reference import experts_of
from export.quant.activations import rounded
from export.quant.formats import FORMATS
from export.quant.program import quantised
from export.quant.weights import pack, unpack
from runtime.bundle.onnx_file import check_onnx

E, D, H = 5, 32, 32
WEIGHTS = {"up.weight": (D, 96), "down.weight": (96, D), "down.bias": (D,), "norm.weight": (D, D)}


def block(activation: str, bias: bool, top_k: int) -> BlockType:
    """x [B, T, D] -> down(up(x)) + b + experts(x) + norm(x): the last one is to stay as it is."""
    wide = H * up_rows(activation)
    shapes: dict[str, tuple[Any, ...]] = {"x": ("B", "T", D), **WEIGHTS}
    shapes |= {"gate.weight": (D, E), "ff.experts.w1": (E, D, wide)}
    shapes |= ({"ff.experts.b1": (E, wide)} if bias else {}) | {"ff.experts.w2": (E, H, D)}
    first = version_of(activation, bias) == 1
    w1, b1, w2 = "ff.experts.w1", "ff.experts.b1", "ff.experts.w2"
    given = [w1, b1, w2] if first else [w1, w2, b1] if bias else [w1, w2]
    own = {} if first else {"activation": activation}
    make = helper.make_node
    nodes = [
        make("MatMul", ["x", "up.weight"], ["hidden"]),
        make("MatMul", ["hidden", "down.weight"], ["product"]),
        make("Add", ["product", "down.bias"], ["dense"]),
        make("MatMul", ["x", "norm.weight"], ["kept"]),
        make("Reshape", ["x", "flat"], ["rows"]),
        make("MatMul", ["rows", "gate.weight"], ["logits"]),
        make(OP, ["rows", "logits", *given], ["routed"], domain=DOMAIN, top_k=top_k, **own),
        make("Shape", ["x"], ["sizes"]),
        make("Reshape", ["routed", "sizes"], ["experts"]),
        make("Sum", ["dense", "kept", "experts"], ["out_x"]),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    out = [helper.make_tensor_value_info("out_x", TensorProto.FLOAT, ("B", "T", D))]
    flat = helper.make_tensor("flat", TensorProto.INT64, [2], [-1, D])
    version = version_of(activation, bias)
    model = helper.make_model(
        helper.make_graph(nodes, "block", info, out, [flat]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, version)],
        ir_version=10,
    )
    specs = {name: Spec(torch.float32, shape) for name, shape in shapes.items()}
    x = specs.pop("x")
    linears = frozenset(name for name in specs if name.endswith(".weight"))
    graphs = {str(top_k): with_body(model, "either")}
    return BlockType("block", {"x": x}, {"x": x}, specs, linears, graphs)


def run(row: BlockType, feed: dict[str, torch.Tensor]) -> torch.Tensor:
    """The block's graph on `feed`, weights of 8 bits bound by their bytes."""
    (model,) = row.graphs.values()
    onnx.checker.check_model(model)
    check_onnx(model.SerializeToString(), {})
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options)
    assert [value.name for value in session.get_inputs()] == ["x", *row.weights]
    binding, kinds = session.io_binding(), {torch.float8_e4m3fn: 17, torch.int8: 3, torch.uint8: 2}
    for name, tensor in feed.items():
        element = kinds.get(tensor.dtype, 1)
        shape, pointer = list(tensor.shape), tensor.data_ptr()
        binding.bind_input(name, "cpu", 0, element, shape, pointer)
    binding.bind_output("out_x")
    session.run_with_iobinding(binding)
    return torch.from_numpy(np.array(binding.get_outputs()[0].numpy()))


@pytest.mark.parametrize("activation, bias, top_k", [("gelu_tanh", True, 2), ("swiglu", False, 1)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_block_is_what_torch_makes_of_it(
    name: str, activation: str, bias: bool, top_k: int
) -> None:
    kind, generator = FORMATS[name], torch.Generator().manual_seed(0)
    dense = block(activation, bias, top_k)
    inputs = {"x": dense.inputs["x"]}
    program = quantised(Program({"block": dense}, [("block", "b.0.")], inputs, inputs), kind)
    row = program.types["block"]
    chosen = {part.weight for part in row.parts.values()}
    assert chosen == {"up.weight", "down.weight", "ff.experts.w1", "ff.experts.w2"}

    weights = {
        n: torch.randn(s.shape, generator=generator) * s.shape[0] ** -0.5
        for n, s in dense.weights.items()
    }
    weights["gate.weight"][:, 3] = -9  # an expert that nobody, or everybody, chooses
    feed, whole = {}, dict(weights)
    for n, weight in weights.items():
        own = kind.of_experts if weight.ndim > 2 else kind
        parts = pack(own, weight) if n in chosen else {"": weight}
        whole[n] = unpack(own, parts) if n in chosen else weight
        for suffix, part in parts.items():
            feed[n + suffix] = (part.float() if part.dtype == torch.bfloat16 else part).contiguous()

    experts = Experts(D, E, H, D, activation=activation, bias=bias)
    for n, parameter in experts.named_parameters():
        parameter.data.copy_(whole[f"ff.experts.{n}"])
    for batch, tokens in ((2, 7), (1, 1)):
        x = torch.randn(batch, tokens, D, generator=generator)
        rows = x.reshape(-1, D)
        with torch.no_grad():
            left = rounded(kind, x)
            hidden = rounded(kind, left @ whole["up.weight"])
            expected = hidden @ whole["down.weight"] + whole["down.bias"] + x @ whole["norm.weight"]
            routed = experts_of(experts, kind.of_experts, rows, rows @ whole["gate.weight"], top_k)
            expected = expected + routed.reshape(x.shape)
        found = run(row, {"x": x, **feed})
        # A hidden number at the edge of a rounding may fall to the other side.
        assert (found - expected).norm() / expected.norm() < (1e-6 if name == "int4" else 2e-3)


def test_weights_that_are_kept_make_a_type_of_their_own() -> None:
    dense = block("gelu_tanh", True, 2)
    x = {"x": dense.inputs["x"]}
    calls = [("block", ""), ("block", "b.0."), ("block", "b.1."), ("block", "b.2.")]
    program = Program({"block": dense}, calls, x, x)
    found = quantised(program, FORMATS["int8"], ["b.1.up.*", "b.2.ff.experts.w1"])
    assert [prefix for _, prefix in found.calls] == [prefix for _, prefix in calls]
    kept = {}
    for name, prefix in found.calls:
        kept[prefix] = set(dense.weights) - {p.weight for p in found.types[name].parts.values()}
    stays = {"down.bias", "norm.weight", "gate.weight", "ff.experts.b1"}
    assert kept == {
        "": set(dense.weights),  # what is before and after the blocks
        "b.0.": stays,
        "b.1.": stays | {"up.weight"},
        "b.2.": stays | {"ff.experts.w1", "ff.experts.w2"},  # the op has both or neither
    }
    assert len({name for name, _ in found.calls}) == 4
    for name, _ in found.calls:
        (model,) = found.types[name].graphs.values()
        onnx.checker.check_model(model)
