"""Bodies of `d2m::RoutedExperts`: the op spelled out in standard ONNX operators.

A body travels with a model as a model-local function, so that ONNX Runtime and TensorRT(-RTX) run
it without anything installed. There are four, held together by one test:

sorted    for CPUs. Pairs (token, expert) sorted by expert, one pair of matmuls per expert that
          has tokens. Sizes depend on data. Measured in ONNX Runtime, one thread, E = 12, K = 2, a
          sparse FFN against the dense one (ideal 2.67x): 2.5-2.8x at D = 1024, T = 512; 1.4x at
          D = 128, T = 512; .8-.95x at D = 128, T = 32.
every     for few tokens of a narrow model: every expert on every token, unchosen ones weighed with
          nought. The arithmetic of the dense FFN, in a dozen nodes.
either    what ONNX Runtime's graphs carry: `every` up to a number of tokens, `sorted` above.
portable  for TensorRT: sizes depend on T alone, no scatter-add, no NonZero, no token dropped.
          Every expert's pairs are padded to whole tiles of B rows, T*K // B + E tiles in all; a
          tile gathers its tokens and its expert's weights; two batched matmuls; every pair gathers
          its row back.

Tried on CPUs at D = 128 and not taken, each timed against the dense FFN in one process:
com.microsoft.MoE ties with `every` at T = 16 and loses to `sorted` from T = 64 on (it packs every
expert's weights anew at each call, its GELU calls tanh per number, and equal gates go to the
highest expert); NonZero and ScatterND(reduction=add) in place of two sorts is 8 % faster than
`sorted`, but ONNX Runtime adds from several threads without a lock (its issues 18048, 23396: other
results from run to run); tokens gathered per expert to the fullest one's length, two batched
matmuls.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen, P = T*K pairs, B tile rows,
N tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from export.op.body_lines import Routing, either_lines, every_lines, portable_lines, sorted_lines
from export.op.schema import DOMAIN, INPUTS, OP, OPSET, inputs_of, register, version_of

if TYPE_CHECKING:
    import onnx

BODIES = ("sorted", "every", "either", "portable")
SPELLED = {"sorted": sorted_lines, "every": every_lines, "either": either_lines}


def body(kind: str, routing: Routing, *, tile: int = 64) -> onnx.FunctionProto:
    """One body as a function `d2m::RoutedExperts`. `tile`: rows B of the portable one's tiles."""
    from onnx import parser

    if kind not in BODIES:
        raise ValueError(f"the body is {kind!r}, expected one of {', '.join(BODIES)}.")
    lines = portable_lines(routing, tile) if kind == "portable" else SPELLED[kind](routing)
    head = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>'
    kind_of = (routing.activation, routing.bias)
    own = "top_k" if version_of(*kind_of) == 1 else "top_k, activation"
    given = ", ".join(inputs_of(*kind_of))
    text = f"{head}\n{OP} <{own}> ({given}) => (y)\n{{\n" + "\n".join(lines) + "\n}"
    function = parser.parse_function(text)
    for node in function.node:
        node.name = node.output[0]
    return function


def tile_rows(tokens: int, routing: Routing) -> int:
    """B for about `tokens` tokens: the power of two near half an expert's share, 16 to 256.

    Overhead of padding measured at 4096 tokens, K = 2: 39.8 % of the dense FFN's arithmetic at
    B = 128, 42.2 % at 256, 46.9 % at 512 (ideal 37.5 %), while the gathered weights shrink from
    717 MB to 415 and 264.
    """
    share = tokens * routing.top_k // (2 * routing.experts)
    return min(256, max(16, 1 << max(share, 1).bit_length() - 1))


def with_body(
    model: onnx.ModelProto, kind: str | None, *, tokens: int = 4096, tile: int | None = None
) -> onnx.ModelProto:
    """A copy of `model` whose RoutedExperts nodes have the body `kind` (None: the bare op).

    A body that is there already is replaced. `tokens` is the number that the portable body's tiles
    are sized for (any number runs), `tile` overrides it. Models without the op are only copied.
    """
    import onnx

    register()
    # On protobuf: through onnx_ir, what is only copied would lose its empty fields, and its bytes.
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [f for f in copy.functions if (f.domain, f.name) != (DOMAIN, OP)]
    del copy.functions[:]
    copy.functions.extend(kept)
    found = sorted(set(routings(copy)), key=repr)
    if len(found) > 1:
        raise ValueError(
            f"a model holds routed experts of {len(found)} kinds ({found[0]}, {found[1]}); expected"
            " one number of experts, one top_k, one activation and one type: export such blocks"
            " apart."
        )
    if found and kind is not None:
        rows = tile or tile_rows(tokens, found[0])
        copy.functions.append(body(kind, found[0], tile=rows))
    if found and not any(entry.domain == DOMAIN for entry in copy.opset_import):
        version = version_of(found[0].activation, found[0].bias)
        copy.opset_import.append(onnx.helper.make_opsetid(DOMAIN, version))
    return copy


def routings(model: onnx.ModelProto) -> Iterator[Routing]:
    """The Routing of every RoutedExperts node in the main graph.

    The expert weights must be graph inputs or initializers: a body is made for one E.
    """
    import onnx_ir as ir

    for node in ir.from_proto(model).graph:
        if (node.domain, node.op_type) == (DOMAIN, OP):
            w1: Any = node.inputs[2]
            experts, width, _ = w1.shape
            known = width if isinstance(width, int) else 0
            own = node.attributes.get("activation")
            activation = "gelu_tanh" if own is None else own.as_string()
            top_k, bias = node.attributes["top_k"].as_int(), len(node.inputs) == len(INPUTS)
            yield Routing(experts, top_k, int(w1.dtype), known, activation, bias)
