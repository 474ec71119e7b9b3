"""A product by a quantised weight in ONNX: functions that block graphs call, in standard operators
and two of ONNX Runtime's.

`d2m::Quantize_<format> (x) => (q, scale)` rounds the left side, once for all products of it, and
`d2m::Product_<format>` multiplies: y = x @ weight, in x's type. export/plans has other bodies of
the same functions for TensorRT.

Shape letters: K numbers in, N numbers out, G blocks of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.op.schema import DOMAIN, OPSET
from export.quant.formats import FP4_MAX, FP8_MAX, TOKEN_MAX
from export.quant.weights import FP4_VALUES, TINY

if TYPE_CHECKING:
    import onnx

    from export.quant.formats import Format

MICROSOFT = "com.microsoft"
FLOAT, FLOAT8 = 1, 17  # onnx.TensorProto's numbers
LEFT = "Quantize"
PRODUCT = "Product"


def constant(name: str, value: float) -> str:
    """A float32 scalar."""
    return f"{name} = Constant <value = float {{{value!r}}}> ()"


def token_scale(x: str, scale: str, largest: float) -> list[str]:
    """x [.., K] -> `scale` [.., 1]: the token's largest number over the format's."""
    return [
        f"{x}_size = Abs ({x})",
        f"{x}_last = Constant <value = int64[1] {{-1}}> ()",
        f"{x}_most = ReduceMax ({x}_size, {x}_last)",
        constant(f"{x}_tiny", TINY),
        f"{x}_some = Max ({x}_most, {x}_tiny)",
        constant(f"{x}_largest", largest),
        f"{scale} = Div ({x}_some, {x}_largest)",
        f"{x}_even = Div ({x}, {scale})",
    ]


def left_lines(kind: Format, x: str, q: str, scale: str) -> list[str]:
    """x [.., K] -> q, what is multiplied, and its `scale` [.., 1] (nvfp4: none, q has it)."""
    if kind.name == "int8":
        return [
            *token_scale(x, scale, TOKEN_MAX),
            constant(f"{x}_unit", 1.0),
            f"{x}_middle = Constant <value = uint8 {{128}}> ()",
            f"{q} = QuantizeLinear ({x}_even, {x}_unit, {x}_middle)",
        ]
    if kind.name == "fp8":
        return [
            *token_scale(x, scale, FP8_MAX),
            f"{x}_cast = Cast <to = {FLOAT8}> ({x}_even)",
            f"{q} = Cast <to = {FLOAT}> ({x}_cast)",
        ]
    assert kind.name == "nvfp4", kind
    return [
        f"{x}_lead = Shape <start = 0, end = -1> ({x})",
        f"{x}_block = Constant <value = int64[2] {{-1, 16}}> ()",
        f"{x}_shape = Concat <axis = 0> ({x}_lead, {x}_block)",
        f"{x}_blocks = Reshape ({x}, {x}_shape)",
        f"{x}_size = Abs ({x}_blocks)",
        f"{x}_last = Constant <value = int64[1] {{-1}}> ()",
        f"{x}_most = ReduceMax ({x}_size, {x}_last)",
        constant(f"{x}_six", FP4_MAX),
        f"{x}_wanted = Div ({x}_most, {x}_six)",
        constant(f"{x}_largest", FP8_MAX),
        f"{x}_bounded = Min ({x}_wanted, {x}_largest)",
        f"{x}_cast = Cast <to = {FLOAT8}> ({x}_bounded)",
        f"{x}_scale = Cast <to = {FLOAT}> ({x}_cast)",
        constant(f"{x}_nil", 0.0),
        f"{x}_none = Equal ({x}_scale, {x}_nil)",
        f"{x}_endless = Constant <value_float = inf> ()",
        f"{x}_divisor = Where ({x}_none, {x}_endless, {x}_scale)",
        f"{x}_even = Div ({x}_size, {x}_divisor)",
        f"{x}_most_even = Min ({x}_even, {x}_six)",
        # Neighbours lie a half apart below 2, 1 below 4, then 2; Round sends ties to the even one.
        *(constant(f"{x}_{name}", value) for name, value in (("half", 0.5), ("one", 1.0))),
        *(constant(f"{x}_{name}", value) for name, value in (("two", 2.0), ("four", 4.0))),
        f"{x}_low = Less ({x}_most_even, {x}_two)",
        f"{x}_middle = Less ({x}_most_even, {x}_four)",
        f"{x}_upper = Where ({x}_middle, {x}_one, {x}_two)",
        f"{x}_step = Where ({x}_low, {x}_half, {x}_upper)",
        f"{x}_steps = Div ({x}_most_even, {x}_step)",
        f"{x}_whole = Round ({x}_steps)",
        f"{x}_rounded = Mul ({x}_whole, {x}_step)",
        f"{x}_sign = Sign ({x}_blocks)",
        f"{x}_signed = Mul ({x}_rounded, {x}_sign)",
        f"{x}_scaled = Mul ({x}_signed, {x}_scale)",
        f"{x}_sizes = Shape ({x})",
        f"{q} = Reshape ({x}_scaled, {x}_sizes)",
    ]


def whole_lines(kind: Format, parts: list[str], whole: str) -> list[str]:
    """fp8 and nvfp4: quantised [K, N] as float32.

    Without the column's scale, which multiplies what comes out. ONNX Runtime does this once, when
    a session opens, where the weights are initializers.
    """
    w = parts[0]
    if kind.name == "fp8":  # cast already
        return [f"{whole} = Identity ({w})"]
    values = ", ".join(map(repr, [*FP4_VALUES, *(-value for value in FP4_VALUES)]))
    return [
        f"{w}_15 = Constant <value = uint8 {{15}}> ()",
        f"{w}_4 = Constant <value = uint8 {{4}}> ()",
        f"{w}_first = BitwiseAnd ({w}, {w}_15)",
        f'{w}_second = BitShift <direction = "RIGHT"> ({w}, {w}_4)',
        f"{w}_new = Constant <value = int64[1] {{-1}}> ()",
        f"{w}_firsts = Unsqueeze ({w}_first, {w}_new)",
        f"{w}_seconds = Unsqueeze ({w}_second, {w}_new)",
        f"{w}_pairs = Concat <axis = -1> ({w}_firsts, {w}_seconds)",
        f"{w}_groups = Shape ({parts[1]})",
        f"{w}_16 = Constant <value = int64[1] {{16}}> ()",
        f"{w}_shape = Concat <axis = 0> ({w}_groups, {w}_16)",
        f"{w}_blocks = Reshape ({w}_pairs, {w}_shape)",
        f"{w}_index = Cast <to = 6> ({w}_blocks)",
        f"{w}_table = Constant <value = float[16] {{{values}}}> ()",
        f"{w}_values = Gather ({w}_table, {w}_index)",
        f"{w}_scales = Unsqueeze ({parts[1]}, {w}_new)",
        f"{w}_scaled = Mul ({w}_values, {w}_scales)",
        f"{w}_lead = Shape <start = 0, end = -1> ({w})",
        f"{w}_row = Concat <axis = 0> ({w}_lead, {w}_new)",
        f"{w}_rows = Reshape ({w}_scaled, {w}_row)",
        f"{whole} = Transpose <perm = [1, 0]> ({w}_rows)",
    ]


def multiplied(
    kind: Format, q: str, weight: list[str], y: str, sizes: tuple[str, str]
) -> list[str]:
    """q by one matrix whose `whole_lines` were written (`weight[0]`, then scales): y, not yet times
    the token's scale. `sizes`: the names of the attributes that say K and N (int4)."""
    if kind.name == "int8":
        return [
            constant(f"{y}_unit", 1.0),
            f"{y}_middle = Constant <value = uint8 {{128}}> ()",
            f"{y} = {MICROSOFT}.MatMulIntegerToFloat "
            f"({q}, {weight[0]}, {y}_unit, {weight[1]}, {y}_middle)",
        ]
    if kind.name == "int4":
        k, n = sizes
        given = f"K: int = @{k}, N: int = @{n}, bits = 4, block_size = {kind.block}"
        return [f"{y} = {MICROSOFT}.MatMulNBits <{given}> ({q}, {weight[0]}, {weight[1]})"]
    return [f"{y}_plain = MatMul ({q}, {weight[0]})", f"{y} = Mul ({y}_plain, {weight[-1]})"]


def function(
    name: str, attributes: str, given: str, written: str, lines: list[str]
) -> onnx.FunctionProto:
    """A function of our domain from its lines."""
    from onnx import parser

    head = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}, "{MICROSOFT}": 1]>'
    shown = f" <{attributes}>" if attributes else ""
    text = f"{head}\n{name}{shown} ({given}) => ({written})\n{{\n" + "\n".join(lines) + "\n}"
    made = parser.parse_function(text)
    for node in made.node:
        node.name = node.output[0]
    return made


def functions(kind: Format) -> list[onnx.FunctionProto]:
    """The functions that a block graph with weights of this format calls."""
    parts = [f"w{suffix}" for suffix in kind.parts]
    weights, made = ", ".join(parts), []
    name = f"{PRODUCT}_{kind.name}"
    if kind.name == "int4":
        lines = multiplied(kind, "q", parts, "y", ("k", "n"))
        return [function(name, "k, n", f"q, {weights}", "y", lines)]
    scaled = kind.name != "nvfp4"
    left = left_lines(kind, "x", "q", "scale")
    made = [function(f"{LEFT}_{kind.name}", "", "x", "q, scale" if scaled else "q", left)]
    lines = []
    if kind.name != "int8":
        lines = whole_lines(kind, parts, "whole")
        parts = ["whole", *parts[1:]]
    lines += multiplied(kind, "q", parts, "y_even" if scaled else "y", ("k", "n"))
    lines += ["y = Mul (y_even, scale)"] if scaled else []
    return [*made, function(name, "", f"q, {'scale, ' if scaled else ''}{weights}", "y", lines)]
