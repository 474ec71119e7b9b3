"""A graph with bare RoutedExperts nodes given another number of experts per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from export.op.schema import DOMAIN, OP

if TYPE_CHECKING:
    import onnx


def with_top_k(model: onnx.ModelProto, top_k: int) -> onnx.ModelProto:
    """A copy of a graph with bare RoutedExperts nodes, for another number of experts (0: none).

    For 0 every routed sum is taken out; inputs and outputs stay as they were.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    copy = ir.from_proto(model)
    for node in list(copy.graph):
        if (node.domain, node.op_type) != (DOMAIN, OP):
            continue
        if top_k:
            node.attributes["top_k"] = ir.AttrInt64("top_k", top_k)
        else:
            bypass(node)
    if not top_k:
        common.RemoveUnusedNodesPass()(copy)
    return ir.to_proto(copy)


def bypass(experts: Any) -> None:
    """What reads shared + routed reads shared alone."""
    value = experts.outputs[0]
    ((add, index),) = value.uses()
    while add.op_type == "Reshape":
        value = add.outputs[0]
        ((add, index),) = value.uses()
    assert add.op_type == "Add", (add.op_type, "expected shared + routed")
    add.outputs[0].replace_all_uses_with(add.inputs[1 - index], replace_graph_outputs=True)
