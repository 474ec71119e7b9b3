"""The op's ONNX schema, and the torch op's translation to one bare node."""

import onnx
import pytest
import torch

from d2m.model.sparse_ffn import SparseFFN
from export.op.schema import (
    DOMAIN,
    INPUTS,
    OP,
    ORDERS,
    VERSION,
    inputs_of,
    register,
    translation_table,
    version_of,
)


def test_schema_is_registered_once() -> None:
    register()
    register()
    types = {name: kind for name, kind, _ in INPUTS}
    for version, order in ORDERS.items():
        schema = onnx.defs.get_schema(OP, version, DOMAIN)
        assert [(i.name, i.type_str) for i in schema.inputs] == [(n, types[n]) for n in order]
        assert schema.attributes["top_k"].required and schema.since_version == version
        assert ("activation" in schema.attributes) == (version > 1)
    assert onnx.defs.get_schema(OP, DOMAIN).since_version == VERSION


def test_checker_knows_the_op() -> None:
    from onnx import TensorProto, helper

    register()
    names = [row[0] for row in INPUTS]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in names]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])]

    def model(given: int = 5, version: int = 1, **attributes: int | str) -> onnx.ModelProto:
        node = helper.make_node(OP, names[:given], ["y"], domain=DOMAIN, **attributes)
        graph = helper.make_graph([node], "g", inputs, out)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid(DOMAIN, version)])

    onnx.checker.check_model(model(top_k=2))
    onnx.checker.check_model(model(4, 2, top_k=2, activation="swiglu"))
    with pytest.raises(onnx.checker.ValidationError, match="top_k"):
        onnx.checker.check_model(model())
    with pytest.raises(onnx.checker.ValidationError, match="input size"):
        onnx.checker.check_model(model(4, 1, top_k=2))
    with pytest.raises(onnx.checker.ValidationError, match="activation"):
        onnx.checker.check_model(model(5, 1, top_k=2, activation="swiglu"))


@pytest.mark.parametrize("kind", [("gelu_tanh", True), ("swiglu", False), ("silu", True)])
def test_torch_op_becomes_one_node(kind: tuple[str, bool]) -> None:
    """The trace does not depend on which experts the example input hits, and T stays dynamic.

    What version 1 can say is version 1, without a word more.
    """
    torch.manual_seed(0)
    activation, bias = kind
    ffn = SparseFFN(16, 16, 4, 4, top_k=3, activation=activation, bias=bias).eval()
    program = torch.onnx.export(
        ffn,
        (torch.randn(2, 5, 16),),
        dynamo=True,
        optimize=False,
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},),
        custom_translation_table=translation_table(),
        verbose=False,
    )
    nodes = [node for node in program.model.graph if node.domain == DOMAIN]
    (node,) = nodes
    version = version_of(activation, bias)
    assert (node.op_type, node.attributes["top_k"].as_int()) == (OP, 3)
    assert [value.name.rpartition(".")[2] for value in node.inputs[2:]] == list(
        inputs_of(activation, bias)[2:]
    )
    own = {"top_k"} if version == 1 else {"top_k", "activation"}
    assert set(node.attributes) == own
    assert version == 1 or node.attributes["activation"].as_string() == activation
    assert program.model.opset_imports[DOMAIN] == version
    assert not any(node.op_type in ("NonZero", "If", "Loop") for node in program.model.graph)
