"""Cleaning a traced graph: rules that keep its meaning and drop what a trace leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from export.schema import DOMAIN, OP

if TYPE_CHECKING:
    import onnx


def clean(model: Any) -> Any:
    """All rules on an onnx_ir model, in place; returns it.

    Weights are inputs, so nothing large is folded. Order: fold, static reshapes, weight
    transposes, then what these left unused.
    """
    import onnx_ir.passes.common as common
    from onnxscript import optimizer

    optimizer.optimize_ir(
        model,
        num_iterations=1,
        onnx_shape_inference=False,
        should_fold=lambda node: False if node.op_type == "Transpose" else None,
    )
    static_reshapes(model.graph)
    untranspose(model.graph)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    strip(model)
    return model


def static_reshapes(graph: Any) -> int:
    """Rule 1: a Reshape's target becomes a constant where 0 and one -1 can say it.

    0 copies the input's dimension at the same place; -1 takes what remains. The arithmetic on
    Shape that computed the target falls away. Returns how many were changed.
    """
    import onnx_ir as ir

    done = 0
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[1].const_value is not None:
            continue
        source, target = node.inputs[0].shape, node.outputs[0].shape
        if source is None or target is None:
            continue
        sizes = []
        for index, size in enumerate(target):
            if isinstance(size, int):
                sizes.append(size)
            elif index < len(source) and source[index] == size:
                sizes.append(0)
            else:
                sizes.append(-1)
        if sizes.count(-1) > 1:
            continue
        shape = ir.tensor(np.array(sizes, np.int64))
        constant = ir.node("Constant", [], attributes={"value": shape})
        constant.outputs[0].const_value = shape
        constant.outputs[0].name = f"{node.outputs[0].name}_sizes"
        constant.outputs[0].shape = ir.Shape([len(sizes)])
        constant.outputs[0].dtype = ir.DataType.INT64
        graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)
        done += 1
    return done


def untranspose(graph: Any) -> int:
    """Rule 2: a weight that the trace transposed twice is taken as it is stored.

    The module is given w.t() of an input [in, out]; Linear transposes it again, by a Transpose or
    by Gemm's transB. Returns how many uses were changed.
    """
    done = 0
    for value in graph.inputs:
        for first in [use.node for use in value.uses()]:
            if not _swaps(first):
                continue
            for second, index in [(use.node, use.idx) for use in first.outputs[0].uses()]:
                if _swaps(second):
                    second.outputs[0].replace_all_uses_with(value)
                    done += 1
                elif second.op_type == "Gemm" and index == 1:
                    second.replace_input_with(1, value)
                    if second.attributes.pop("transB", None) is None:
                        raise AssertionError("a Gemm on a transposed weight without transB")
                    done += 1
    return done


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


def _swaps(node: Any) -> bool:
    """Whether a node transposes a matrix."""
    return node.op_type == "Transpose" and list(node.attributes["perm"].value) == [1, 0]


def strip(model: Any) -> None:
    """Rule 3: no metadata, doc strings or producer: they hold paths and change by the machine."""
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
