"""The op's ONNX schema, and the torch op's translation to one bare node."""

import onnx
import pytest
import torch

from d2m.model.sparse_ffn import SparseFFN
from export.op.schema import DOMAIN, INPUTS, OP, VERSION, register, translation_table


def test_schema_is_registered_once() -> None:
    register()
    register()
    schema = onnx.defs.get_schema(OP, VERSION, DOMAIN)
    assert [(i.name, i.type_str) for i in schema.inputs] == [row[:2] for row in INPUTS]
    assert schema.attributes["top_k"].required


def test_checker_knows_the_op() -> None:
    from onnx import TensorProto, helper

    register()
    names = [row[0] for row in INPUTS]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in names]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])]

    def model(**attributes: int) -> onnx.ModelProto:
        node = helper.make_node(OP, names, ["y"], domain=DOMAIN, **attributes)
        graph = helper.make_graph([node], "g", inputs, out)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid(DOMAIN, VERSION)])

    onnx.checker.check_model(model(top_k=2))
    with pytest.raises(onnx.checker.ValidationError, match="top_k"):
        onnx.checker.check_model(model())


def test_torch_op_becomes_one_node() -> None:
    """The trace does not depend on which experts the example input hits, and T stays dynamic."""
    torch.manual_seed(0)
    ffn = SparseFFN(16, 16, 4, 4, top_k=3).eval()
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
    assert [(n.op_type, n.attributes["top_k"].as_int(), len(n.inputs)) for n in nodes] == [
        (OP, 3, 5)
    ]
    assert not any(node.op_type in ("NonZero", "If", "Loop") for node in program.model.graph)
