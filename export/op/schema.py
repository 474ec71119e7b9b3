"""`d2m::RoutedExperts` as ONNX knows it: its schemas, and how torch's op becomes this node.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen.
"""

from __future__ import annotations

from typing import Any

from d2m.families.site import ACTIVATIONS

DOMAIN = "d2m"
OP = "RoutedExperts"
VERSION = 2  # the newest
OPSET = 20  # the first with Gelu; TensorRT-RTX and ONNX Runtime take it whole
DOC = """Routed experts of a Dense2MoE FFN.

gate = softmax(logits) over the experts in float32; the top_k largest are chosen, ties to the lowest
index, not renormalised. y = sum over the chosen i of gate_i * (gelu_tanh(x @ w1_i + b1_i) @ w2_i),
summed in float32 at least, returned in x's type. Attribute top_k is 1 to E.
"""
DOC_2 = (
    DOC
    + """
From version 2 on the attribute activation stands in gelu_tanh's place, and b1 is the last input and
may be left out. Of swiglu and geglu w1 and b1 have 2 H columns, an expert's gates first:
silu(gate) * value, and gelu(gate) * value with the exact GELU.
"""
)
# (name, type variable, what it is)
INPUTS = (
    ("x", "X", "tokens [T, D]"),
    ("logits", "L", "router logits [T, E]"),
    ("w1", "X", "up projections [E, D, H], gated [E, D, 2 H]"),
    ("b1", "X", "hidden biases [E, H], gated [E, 2 H]"),
    ("w2", "X", "down projections [E, H, D]"),
)
# From version 2 on b1 is last, so that it can be left out: TensorRT's parser refuses a function's
# empty input (measured with TensorRT-RTX 1.7.1).
ORDERS = {1: ("x", "logits", "w1", "b1", "w2"), 2: ("x", "logits", "w1", "w2", "b1")}
TYPES = {
    "X": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"],
    "L": ["tensor(float)", "tensor(double)"],
}


def version_of(activation: str, bias: bool) -> int:
    """The op's version that a node needs: the oldest that can say it, for the readers there are."""
    return 1 if (activation, bias) == ("gelu_tanh", True) else 2


def inputs_of(activation: str, bias: bool) -> tuple[str, ...]:
    """What a node of `version_of` reads, in order."""
    order = ORDERS[version_of(activation, bias)]
    return order if bias else order[:-1]


def register() -> None:
    """Make the op known to this process's ONNX (its checker and onnxscript); twice is once."""
    import onnx

    if onnx.defs.has(OP, DOMAIN):
        return
    schema, kinds = onnx.defs.OpSchema, onnx.defs.OpSchema.AttrType
    top_k = schema.Attribute("top_k", kinds.INT, "experts per token", required=True)
    default = onnx.helper.make_attribute("activation", "gelu_tanh")
    own = schema.Attribute("activation", default, ", ".join(ACTIVATIONS))
    optional = schema.FormalParameterOption.Optional
    for version, doc, attributes in ((1, DOC, [top_k]), (2, DOC_2, [top_k, own])):
        rows = {row[0]: row for row in INPUTS}
        inputs = [
            schema.FormalParameter(
                *rows[name], **({"param_option": optional} if version > 1 and name == "b1" else {})
            )
            for name in ORDERS[version]
        ]
        made = schema(
            OP,
            DOMAIN,
            version,
            doc=doc,
            inputs=inputs,
            outputs=[schema.FormalParameter("y", "X", description="[T, D]")],
            type_constraints=[(name, types, "") for name, types in TYPES.items()],
            attributes=attributes,
        )
        onnx.defs.register_schema(made)


def translation_table() -> dict[Any, Any]:
    """For torch.onnx.export(custom_translation_table=): the torch op -> one bare node.

    The function body is attached after the export: an exporter that is handed a function inlines
    it (measured, torch 2.13).
    """
    import onnxscript
    import torch

    import d2m.model.experts_op  # noqa: F401 (defines the torch op)

    register()
    opsets = {version: onnxscript.values.Opset(DOMAIN, version) for version in (1, 2)}

    def routed_experts(  # type: ignore[no-untyped-def]
        x, logits, w1, b1, w2, top_k: int, activation: str = "gelu_tanh"
    ):
        if version_of(activation, b1 is not None) == 1:
            return opsets[1].RoutedExperts(x, logits, w1, b1, w2, top_k=top_k)
        given = (x, logits, w1, w2) if b1 is None else (x, logits, w1, w2, b1)
        return opsets[2].RoutedExperts(*given, top_k=top_k, activation=activation)

    return {torch.ops.d2m.routed_experts.default: routed_experts}
