"""The functions of quantised block graphs as TensorRT multiplies in FP8 and FP4.

TensorRT takes a product for one of 8 or 4 bits where both sides come from DequantizeLinear with a
constant scale. So that scale is one, and the real ones, a token's and a column's, multiply what
comes out: then weights and scales are bound at run time (measured on layer dumps of TensorRT-RTX
1.7.1: with the scale itself an input, the product falls back to 16 bits). Experts are dequantised
before they are gathered, for an FP8 tensor may be read by little else; the gather stays in FP8.

Shape letters: K numbers in, N numbers out, E experts, H expert hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.op.bodies import tile_rows
from export.op.body_lines import Routing, activated, tiling_lines, untiling_lines
from export.op.schema import DOMAIN, OP
from export.quant.formats import FP8_MAX, Format
from export.quant.products import LEFT, PRODUCT, token_scale
from export.quant.program import Lowering

if TYPE_CHECKING:
    import onnx

OPSET = 23  # the first with FP4
FLOAT, BFLOAT16, FLOAT4 = 1, 16, 23  # onnx.TensorProto's numbers
ONES = (
    "unit = Constant <value = bfloat16 {1}> ()",
    "float8 = Constant <value = float8e4m3fn {0}> ()",
    "unit_float = Constant <value = float {1}> ()",
)


def left_lines(kind: Format, x: str, q: str, scale: str) -> list[str]:
    """x -> q, rounded to FP8 or FP4 and back, and fp8's `scale` of every token."""
    if kind.name == "fp8":
        return [
            f"{x}_float = Cast <to = {FLOAT}> ({x})",
            *token_scale(f"{x}_float", f"{scale}_float", FP8_MAX),
            f"{x}_unscaled = CastLike ({x}_float_even, {x})",
            f"{x}_rounded = QuantizeLinear ({x}_unscaled, unit, float8)",
            f"{q} = DequantizeLinear ({x}_rounded, unit, float8)",
            f"{scale} = CastLike ({scale}_float, {x})",
        ]
    return [
        f"{x}_4, {x}_8 = trt.TRT_FP4DynamicQuantize <axis = -1, block_size = 16, scale_type = 17>"
        f" ({x}, unit_float)",
        f"{x}_scales = DequantizeLinear ({x}_8, unit_float)",
        f"{x}_back = DequantizeLinear <axis = -1, block_size = 16> ({x}_4, {x}_scales)",
        f"{q} = CastLike ({x}_back, {x})",
    ]


def weight_lines(kind: Format, parts: list[str], whole: str) -> list[str]:
    """The weight [.., K, N] without its columns' scale."""
    w = parts[0]
    if kind.name == "fp8":
        return [f"{whole} = DequantizeLinear ({w}, unit, float8)"]
    return [
        f"{w}_scales = DequantizeLinear ({parts[1]}, unit_float)",
        f"{w}_back = DequantizeLinear <axis = -1, block_size = 16> ({w}, {w}_scales)",
        f"{w}_half = Cast <to = {BFLOAT16}> ({w}_back)",
        f"{whole} = Transpose <perm = [1, 0]> ({w}_half)",
    ]


def function(
    name: str, attributes: str, given: str, written: str, lines: list[str]
) -> onnx.FunctionProto:
    """A function of our domain for TensorRT."""
    from onnx import parser

    head = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}, "trt": 1]>'
    shown = f" <{attributes}>" if attributes else ""
    return parser.parse_function(
        f"{head}\n{name}{shown} ({given}) => ({written})\n{{\n" + "\n".join(lines) + "\n}"
    )


def functions(kind: Format, routing: Routing | None, tokens: int) -> list[onnx.FunctionProto]:
    """See export.quant.program.Lowering; `tokens` size the tiles of experts."""
    parts = [f"w{suffix}" for suffix in kind.parts]
    scaled = kind.name == "fp8"
    q = "q, scale" if scaled else "q"
    product = [*ONES, *weight_lines(kind, parts, "whole"), "plain = MatMul (q, whole)"]
    product += [f"column = CastLike ({parts[-1]}, q)"]
    product += ["both = Mul (scale, column)"] if scaled else []
    product += [f"y = Mul (plain, {'both' if scaled else 'column'})"]
    left = [*ONES, *left_lines(kind, "x", "q", "scale")]
    made = [
        function(f"{LEFT}_{kind.name}", "", "x", q, left),
        function(f"{PRODUCT}_{kind.name}", "", f"{q}, {', '.join(parts)}", "y", product),
    ]
    return [*made, *([experts(kind.of_experts, routing, tokens)] if routing is not None else [])]


def experts(kind: Format, routing: Routing, tokens: int) -> onnx.FunctionProto:
    """`d2m::RoutedExperts_fp8`: the portable body, its products in FP8."""
    parts = {name: [f"{name}{suffix}" for suffix in kind.parts] for name in ("w1", "w2")}
    lines = [*ONES, *tiling_lines(routing, tile_rows(tokens, routing))]
    lines += by_tile(kind, "tile_x", "m", parts["w1"])
    if routing.bias:
        lines += ["tile_b1 = Gather (b1, owner)", "tile_bias = Unsqueeze (tile_b1, one)"]
        lines += ["a = Add (m, tile_bias)"]
    lines += activated(routing, "a" if routing.bias else "m", "g")
    lines += by_tile(kind, "g", "z_tiles", parts["w2"])
    given = ["x", "logits", *parts["w1"], *parts["w2"], *(["b1"] if routing.bias else [])]
    name, own = f"{OP}_{kind.name}", "top_k, activation"
    return function(name, own, ", ".join(given), "y", [*lines, *untiling_lines()])


def by_tile(kind: Format, x: str, y: str, parts: list[str]) -> list[str]:
    """x [tiles, B, K] -> y [tiles, B, N], each by its expert's matrix in FP8."""
    w = parts[0]
    lines = [
        *left_lines(kind, x, f"{x}_q", f"{x}_scale"),
        *weight_lines(kind, parts, f"{w}_whole"),
        f"{w}_tiles = Gather ({w}_whole, owner)",
        f"{y}_plain = MatMul ({x}_q, {w}_tiles)",
        f"{y}_column = CastLike ({parts[-1]}, {x})",
        f"{y}_owned = Gather ({y}_column, owner)",
        f"{y}_columns = Unsqueeze ({y}_owned, one)",
    ]
    return [*lines, f"{y}_both = Mul ({x}_scale, {y}_columns)", f"{y} = Mul ({y}_plain, {y}_both)"]


def lowering(tokens: int) -> Lowering:
    """To TensorRT's graphs, with tiles for about `tokens` tokens."""
    return Lowering(lambda kind, routing: functions(kind, routing, tokens), plans=True)


def spelled_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """A quantised block graph without functions, every node with a name of its own.

    TensorRT names quantising layers after their nodes and refuses a name twice, which a function
    that is called twice would give it.
    """
    import onnx.inliner

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for entry in (*copy.opset_import, *(e for f in copy.functions for e in f.opset_import)):
        if entry.domain == "":
            entry.version = OPSET
    copy = onnx.inliner.inline_local_functions(copy)
    for node in copy.graph.node:
        node.name = next(name for name in node.output if name)
    return copy
