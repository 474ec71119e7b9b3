"""A traced graph made fit to ship: cleaned, and given another number of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from export.rules import static_reshapes, uncat, unscalar, unsqueeze_once, untranspose
from export.schema import DOMAIN, OP

if TYPE_CHECKING:
    import onnx


def clean(model: Any) -> Any:
    """Fold constants, apply the rules, drop what is unused; in place, returns the onnx_ir model.

    Weights are inputs, so nothing large is folded.
    """
    import onnx_ir.passes.common as common
    from onnxscript import optimizer

    optimizer.optimize_ir(
        model,
        num_iterations=1,
        onnx_shape_inference=False,
        should_fold=lambda node: False if node.op_type == "Transpose" else None,
    )
    common.IdentityEliminationPass()(model)
    for rule in (static_reshapes, unscalar, untranspose, unsqueeze_once, uncat):
        rule(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    strip(model)
    return model


def with_top_k(model: onnx.ModelProto, top_k: int) -> onnx.ModelProto:
    """A copy of a graph with bare RoutedExperts nodes, for another number of experts (0: none)."""
    import onnx

    if top_k == 0:
        return without_experts(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OP):
            next(a for a in node.attribute if a.name == "top_k").i = top_k
    return copy


def without_experts(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph for top_k = 0: every routed sum taken out, inputs and outputs as they were."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    copy = ir.from_proto(model)
    for node in list(copy.graph):
        if (node.domain, node.op_type) != (DOMAIN, OP):
            continue
        value = node.outputs[0]
        ((use, index),) = value.uses()
        while use.op_type == "Reshape":
            value = use.outputs[0]
            ((use, index),) = value.uses()
        assert use.op_type == "Add", (use.op_type, "expected shared + routed")
        use.outputs[0].replace_all_uses_with(use.inputs[1 - index], replace_graph_outputs=True)
    common.RemoveUnusedNodesPass()(copy)
    return ir.to_proto(copy)


def strip(model: Any) -> None:
    """No metadata, doc strings or producer: they hold paths and change by the machine."""
    model.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.producer_name, model.producer_version = "d2m", None
    model.graph.metadata_props.clear()
    model.graph.name = "block"
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for number, node in enumerate(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        node.name = f"{number}_{node.op_type}"
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
