"""A traced graph made fit to ship: constants folded, rules applied, names of this machine gone."""

from __future__ import annotations

from typing import Any

from export.graph.rules import static_reshapes, uncat, unscalar, unsqueeze_once, untranspose


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
