"""Bodies of `d2m::RoutedExperts`: the op spelled out in standard ONNX operators.

A body travels with a model as a model-local function, so that ONNX Runtime and TensorRT(-RTX) run
it without anything installed. There are two, held together by one test:

sorted    for CPUs. Pairs (token, expert) sorted by expert, one pair of matmuls per expert that
          has tokens. Sizes depend on data. Measured in ONNX Runtime, one thread, E = 12, K = 2, a
          sparse FFN against the dense one (ideal 2.67x): 2.5-2.8x at D = 1024, T = 512; 1.4x at
          D = 128, T = 512; .8-.95x at D = 128, T = 32, where some fifty small nodes cost as much
          as the multiplications saved. Tried there and no faster: every expert on every token,
          masked (.85x); tokens gathered per expert to the fullest one's length, two batched
          matmuls (.95x); com.microsoft.MoE (.7x).
portable  for TensorRT: sizes depend on T alone, no scatter-add, no NonZero, no token dropped.
          Every expert's pairs are padded to whole tiles of B rows, T*K // B + E tiles in all; a
          tile gathers its tokens and its expert's weights; two batched matmuls; every pair gathers
          its row back.

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen, P = T*K pairs, B tile rows,
N tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.schema import DOMAIN, OP, OPSET, VERSION, register

if TYPE_CHECKING:
    import onnx

BODIES = ("sorted", "portable")
FLOAT32 = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Routing:
    """What a body is specialised on: experts E, chosen K, and x's ONNX element type."""

    experts: int
    top_k: int
    dtype: int = FLOAT32


def body(kind: str, routing: Routing, *, tile: int = 64) -> onnx.FunctionProto:
    """One body as a function `d2m::RoutedExperts`. `tile`: rows B of the portable one's tiles."""
    from onnx import parser

    if kind not in BODIES:
        raise ValueError(f"the body is {kind!r}, expected one of {', '.join(BODIES)}.")
    lines = sorted_lines(routing) if kind == "sorted" else portable_lines(routing, tile)
    head = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>'
    text = f"{head}\n{OP} <top_k> (x, logits, w1, b1, w2) => (y)\n{{\n" + "\n".join(lines) + "\n}"
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
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [f for f in copy.functions if (f.domain, f.name) != (DOMAIN, OP)]
    del copy.functions[:]
    copy.functions.extend(kept)
    found = sorted(set(routings(copy)), key=lambda r: (r.experts, r.top_k, r.dtype))
    if len(found) > 1:
        raise ValueError(
            f"a model holds routed experts of {len(found)} kinds ({found[0]}, {found[1]}); expected"
            " one number of experts, one top_k and one type: export such blocks apart."
        )
    if found and kind is not None:
        rows = tile or tile_rows(tokens, found[0])
        copy.functions.append(body(kind, found[0], tile=rows))
    if found and not any(entry.domain == DOMAIN for entry in copy.opset_import):
        copy.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    return copy


def routings(model: onnx.ModelProto) -> Iterator[Routing]:
    """The Routing of every RoutedExperts node in the main graph.

    The expert weights must be graph inputs or initializers: a body is made for one E.
    """
    graph = model.graph
    known = {t.name: (t.data_type, t.dims[0]) for t in graph.initializer if t.dims}
    for value in [*graph.value_info, *graph.input]:
        kind = value.type.tensor_type
        if kind.shape.dim:
            known[value.name] = (kind.elem_type, kind.shape.dim[0].dim_value)
    for node in graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OP):
            dtype, experts = known[node.input[2]]
            top_k = next(a.i for a in node.attribute if a.name == "top_k")
            yield Routing(experts, top_k, dtype)


# ---------------------------------------------------------------- the bodies


def numbers(name: str, *values: int, dtype: str = "int64") -> str:
    """A Constant: a vector of integers."""
    listed = ", ".join(map(str, values))
    return f"{name} = Constant <value = {dtype}[{len(values)}] {{{listed}}}> ()"


def each(stem: str, count: int) -> str:
    """`stem0, stem1, ...`"""
    return ", ".join(f"{stem}{i}" for i in range(count))


def sorted_lines(routing: Routing) -> list[str]:
    """Sort, split, two matmuls per expert, gather and sum.

    Pairs are numbered chosen-major (p = j*T + t), so that a token's K rows lie T apart and the sum
    is K gathers. The gate weighs the hidden row, H numbers instead of D: the same product.
    """
    experts, top_k = routing.experts, routing.top_k
    half = routing.dtype != FLOAT32
    lines = [
        numbers("flat", -1),
        numbers("zero", 0),
        numbers("one", 1),
        numbers("k", top_k),
        numbers("experts", experts),
        numbers("hit_or_not", 0, 1),
        "probabilities = Softmax <axis = -1> (logits)",
        "by_expert = Transpose <perm = [1, 0]> (probabilities)",
        "gate, chosen = TopK <axis = 0> (by_expert, k)",  # [K, T]; ties go to the lowest index
        "pair = Reshape (chosen, flat)",  # [P], the expert of every pair
        "pairs = Shape (pair)",
        "_sorted_pair, order = TopK <axis = 0, largest = 0> (pair, pairs)",
        "_sorted_order, place = TopK <axis = 0, largest = 0> (order, pairs)",  # order's inverse
        "hit = OneHot <axis = 1> (pair, experts, hit_or_not)",
        "count = ReduceSum <keepdims = 0> (hit, zero)",
        "tokens = Shape <start = 0, end = 1> (x)",
        "token = Mod (order, tokens)",
        "rows = Gather (x, token)",
        f"{each('x', experts)} = Split <axis = 0> (rows, count)",
    ]
    pieces = f"Split <axis = 0, num_outputs = {experts}>"
    lines += [  # folded where the weights are initializers
        "w1_rows = Flatten <axis = 2> (w1)",  # [E * D, H]
        f"{each('u', experts)} = {pieces} (w1_rows)",
        f"{each('c', experts)} = {pieces} (b1)",
        "w2_rows = Flatten <axis = 2> (w2)",  # [E * H, D]
        f"{each('d', experts)} = {pieces} (w2_rows)",
    ]
    lines += [f"m{e} = Gemm (x{e}, u{e}, c{e})" for e in range(experts)]
    lines += [
        f"m = Concat <axis = 0> ({each('m', experts)})",
        'g = Gelu <approximate = "tanh"> (m)',
        "flat_gate = Reshape (gate, flat)",
        "sorted_gate = Gather (flat_gate, order)",
        "weight = Unsqueeze (sorted_gate, one)",
        *(["weight_x = CastLike (weight, x)"] if half else []),
        f"h = Mul (g, weight{'_x' if half else ''})",
        f"{each('h', experts)} = Split <axis = 0> (h, count)",
    ]
    lines += [f"z{e} = MatMul (h{e}, d{e})" for e in range(experts)]
    lines += [f"z = Concat <axis = 0> ({each('z', experts)})"]
    if top_k == 1:
        return [*lines, "y = Gather (z, place)"]
    lines += [f"{each('p', top_k)} = Split <axis = 0, num_outputs = {top_k}> (place)"]
    for j in range(top_k):
        lines += [f"r{j} = Gather (z, p{j})"]
        if half:
            lines += [f"f{j} = Cast <to = {FLOAT32}> (r{j})"]
    total = each("f" if half else "r", top_k)
    result = "sum" if half else "y"
    lines += [f"{result} = {'Add' if top_k == 2 else 'Sum'} ({total})"]
    return [*lines, "y = CastLike (sum, x)"] if half else lines


def portable_lines(routing: Routing, tile: int) -> list[str]:
    """Pad every expert's pairs to whole tiles; sizes follow from T, never from the routing.

    Pairs are numbered token-major (p = t*K + j). ceil summed over experts is at most P // B + E
    tiles; tiles past the last one used, and padding rows, compute token 0 and are never read.
    """
    experts, top_k = routing.experts, routing.top_k
    return [
        numbers("flat", -1),
        numbers("zero", 0),
        numbers("one", 1),
        numbers("two", 2),
        numbers("k", top_k),
        numbers("tile", tile),
        numbers("experts", experts),
        numbers("ids", *range(experts), dtype="int32"),
        numbers("tile32", tile, dtype="int32"),
        numbers("short32", tile - 1, dtype="int32"),
        numbers("one32", 1, dtype="int32"),
        numbers("last32", experts - 1, dtype="int32"),
        "from = Constant <value = int64 {0}> ()",
        "by = Constant <value = int64 {1}> ()",
        "probabilities = Softmax <axis = -1> (logits)",
        "gate, chosen = TopK <axis = -1> (probabilities, k)",  # [T, K]
        "pair64 = Reshape (chosen, flat)",
        "pair = Cast <to = 6> (pair64)",  # [P] int32
        # rank: how many earlier pairs went to the same expert
        "pair_column = Unsqueeze (pair, one)",
        "same = Equal (pair_column, ids)",
        "hit = Cast <to = 6> (same)",  # [P, E]
        "seen = CumSum (hit, from)",
        "mine = Mul (seen, hit)",
        "rank_1 = ReduceSum <keepdims = 0> (mine, one)",
        "rank = Sub (rank_1, one32)",
        # an expert's tiles follow the tiles of the experts before it
        "count = ReduceSum <keepdims = 0> (hit, zero)",
        "rounded = Add (count, short32)",
        "tiles = Div (rounded, tile32)",
        "end = CumSum (tiles, from)",  # [E]
        "start = Sub (end, tiles)",
        "first = Gather (start, pair)",
        "first_row = Mul (first, tile32)",
        "row32 = Add (first_row, rank)",
        "row = Cast <to = 7> (row32)",  # [P], the pair's row among N*B
        # sizes
        "pairs = Shape (pair)",
        "full = Div (pairs, tile)",
        "n = Add (full, experts)",
        "all_rows = Mul (n, tile)",
        "tokens = Shape <start = 0, end = 1> (x)",
        "width = Shape <start = 1, end = 2> (x)",
        # tile -> expert
        "n_scalar = Squeeze (n, zero)",
        "number = Range (from, n_scalar, by)",
        "number32 = Cast <to = 6> (number)",
        "number_column = Unsqueeze (number32, one)",
        "past = GreaterOrEqual (number_column, end)",
        "past32 = Cast <to = 6> (past)",
        "owner_any = ReduceSum <keepdims = 0> (past32, one)",
        "owner = Min (owner_any, last32)",  # [N]
        # row -> token
        "t_scalar = Squeeze (tokens, zero)",
        "t = Range (from, t_scalar, by)",
        "t_column = Unsqueeze (t, one)",
        "t_shape = Concat <axis = 0> (tokens, k)",
        "t_pairs = Expand (t_column, t_shape)",
        "token = Reshape (t_pairs, flat)",  # [P]
        "nobody = ConstantOfShape <value = int64[1] {0}> (all_rows)",
        "source = ScatterElements <axis = 0> (nobody, row, token)",  # rows are all different
        # the experts
        "gathered = Gather (x, source)",
        "tile_shape = Concat <axis = 0> (n, tile, width)",
        "tile_x = Reshape (gathered, tile_shape)",  # [N, B, D]
        "tile_w1 = Gather (w1, owner)",
        "tile_b1 = Gather (b1, owner)",
        "tile_w2 = Gather (w2, owner)",
        "tile_bias = Unsqueeze (tile_b1, one)",
        "m = MatMul (tile_x, tile_w1)",
        "a = Add (m, tile_bias)",
        'g = Gelu <approximate = "tanh"> (a)',
        "z_tiles = MatMul (g, tile_w2)",
        # back to tokens
        "z_shape = Concat <axis = 0> (flat, width)",
        "z = Reshape (z_tiles, z_shape)",
        "z_pair = Gather (z, row)",
        "pair_shape = Concat <axis = 0> (flat, k, width)",
        "z_chosen = Reshape (z_pair, pair_shape)",  # [T, K, D]
        f"z_float = Cast <to = {FLOAT32}> (z_chosen)",
        "weight = Unsqueeze (gate, two)",
        "weighed = Mul (z_float, weight)",
        "sum = ReduceSum <keepdims = 0> (weighed, one)",
        "y = CastLike (sum, x)",
    ]
