"""`d2m::RoutedExperts` as ONNX knows it: its schema, and how torch's op becomes this node.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen.
"""

from __future__ import annotations

from typing import Any

DOMAIN = "d2m"
OP = "RoutedExperts"
VERSION = 1
OPSET = 20  # the first with Gelu; TensorRT-RTX and ONNX Runtime take it whole
DOC = """Routed experts of a Dense2MoE FFN.

gate = softmax(logits) over the experts in float32; the top_k largest are chosen, ties to the lowest
index, not renormalised. y = sum over the chosen i of gate_i * (gelu_tanh(x @ w1_i + b1_i) @ w2_i),
summed in float32 at least, returned in x's type. Attribute top_k is 1 to E.
"""
# (name, type variable, what it is)
INPUTS = (
    ("x", "X", "tokens [T, D]"),
    ("logits", "L", "router logits [T, E]"),
    ("w1", "X", "up projections [E, D, H]"),
    ("b1", "X", "hidden biases [E, H]"),
    ("w2", "X", "down projections [E, H, D]"),
)
TYPES = {
    "X": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"],
    "L": ["tensor(float)", "tensor(double)"],
}


def register() -> None:
    """Make the op known to this process's ONNX (its checker and onnxscript); twice is once."""
    import onnx

    if onnx.defs.has(OP, DOMAIN):
        return
    schema = onnx.defs.OpSchema(
        OP,
        DOMAIN,
        VERSION,
        doc=DOC,
        inputs=[
            onnx.defs.OpSchema.FormalParameter(name, kind, description=text)
            for name, kind, text in INPUTS
        ],
        outputs=[onnx.defs.OpSchema.FormalParameter("y", "X", description="[T, D]")],
        type_constraints=[(name, kinds, "") for name, kinds in TYPES.items()],
        attributes=[
            onnx.defs.OpSchema.Attribute(
                "top_k", onnx.defs.OpSchema.AttrType.INT, "experts per token", required=True
            )
        ],
    )
    onnx.defs.register_schema(schema)


def translation_table() -> dict[Any, Any]:
    """For torch.onnx.export(custom_translation_table=): the torch op -> one bare node.

    The function body is attached after the export: an exporter that is handed a function inlines
    it (measured, torch 2.13).
    """
    import onnxscript
    import torch

    import d2m.model.experts_op  # noqa: F401 (defines the torch op)

    register()
    opset = onnxscript.values.Opset(DOMAIN, VERSION)

    def routed_experts(x, logits, w1, b1, w2, top_k: int):  # type: ignore[no-untyped-def]
        return opset.RoutedExperts(x, logits, w1, b1, w2, top_k=top_k)

    return {torch.ops.d2m.routed_experts.default: routed_experts}
