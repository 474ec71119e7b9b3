"""The body of `d2m::RoutedExperts` with quantised experts, for CPUs.

As the sorted body of export/op: pairs (token, expert) sorted by expert, two products per expert
that has tokens. The tokens are rounded once, before they are gathered: an eighth or a quarter of
the bytes. Node `d2m::RoutedExperts_<format>`: x, logits, w1 and its scales, w2 and its scales, b1
(if any); attributes top_k, activation, and for int4 the products' sizes k1, n1, k2, n2.

Shape letters: T tokens, D width, E experts, H expert hidden, P pairs, G blocks of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.op.body_lines import Routing, activated, each, sorting_lines, sum_lines, weighing_lines
from export.op.schema import OP
from export.quant.products import function, left_lines, multiplied

if TYPE_CHECKING:
    import onnx

    from export.quant.formats import Format

ATTRIBUTES = ("k1", "n1", "k2", "n2")


def body(kind: Format, routing: Routing) -> onnx.FunctionProto:
    """The function `d2m::RoutedExperts_<format>` for one number of experts, float32."""
    parts = {name: [f"{name}{suffix}" for suffix in kind.parts] for name in ("w1", "w2")}
    lines = sorting_lines(routing)
    if kind.name == "int4":
        lines += ["rows = Gather (x, token)"]
    else:
        lines += left_lines(kind, "x", "q", "scale")
        lines += ["rows = Gather (q, token)", "row_scale = Gather (scale, token)"]
    lines += by_expert(kind, routing, "rows", "m", parts["w1"], ("k1", "n1"))
    scaled = kind.name != "int4"
    lines += [f"m_scaled = {'Mul (m, row_scale)' if scaled else 'Identity (m)'}"]
    if routing.bias:
        lines += ["bias = Gather (b1, _sorted_pair)", "m_biased = Add (m_scaled, bias)"]
    lines += activated(routing, "m_biased" if routing.bias else "m_scaled", "g")
    lines += weighing_lines()
    if kind.name != "int4":
        lines += left_lines(kind, "h", "h_q", "h_scale")
    source = "h" if kind.name == "int4" else "h_q"
    lines += by_expert(kind, routing, source, "z_even", parts["w2"], ("k2", "n2"))
    lines += [f"z = {'Mul (z_even, h_scale)' if scaled else 'Identity (z_even)'}"]
    own = ["top_k", "activation", *(ATTRIBUTES if kind.name == "int4" else ())]
    given = ["x", "logits", *parts["w1"], *parts["w2"], *(["b1"] if routing.bias else [])]
    name = f"{OP}_{kind.name}"
    return function(name, ", ".join(own), ", ".join(given), "y", [*lines, *sum_lines(routing)])


def by_expert(
    kind: Format, routing: Routing, rows: str, y: str, parts: list[str], sizes: tuple[str, str]
) -> list[str]:
    """rows [P, K] of the sorted pairs -> y [P, N], each by its expert's matrix of parts [E, ..].

    Without the tokens' scale. Constants are folded where the weights are initializers.
    """
    experts = routing.experts
    lines = []
    pieces = f"Split <axis = 0, num_outputs = {experts}>"
    for name in parts:  # [E, a, ..] -> E times [a, ..]
        lines += [
            f"{name}_inner = Shape <start = 1> ({name})",
            f"{name}_any = Constant <value = int64[1] {{-1}}> ()",
            f"{name}_rest = Shape <start = 2> ({name})",
            f"{name}_joined = Concat <axis = 0> ({name}_any, {name}_rest)",
            f"{name}_flat = Reshape ({name}, {name}_joined)",
            f"{each(f'{name}_', experts)} = {pieces} ({name}_flat)",
        ]
    lines += [f"{each(f'{rows}_', experts)} = Split <axis = 0> ({rows}, count)"]
    for e in range(experts):
        lines += multiplied(
            kind, f"{rows}_{e}", [f"{name}_{e}" for name in parts], f"{y}_{e}", sizes
        )
    return [*lines, f"{y} = Concat <axis = 0> ({each(f'{y}_', experts)})"]
