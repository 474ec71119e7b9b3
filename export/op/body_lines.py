"""The bodies of `d2m::RoutedExperts`, line by line in ONNX's textual syntax (see export.op.bodies).

Shape letters: T tokens, D width, E experts, H expert hidden, K chosen, P = T*K pairs, B tile rows,
N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32 = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Routing:
    """What a body is specialised on: E, K, x's ONNX element type, D (0: not known), what experts
    do between their matrices, and whether there is b1."""

    experts: int
    top_k: int
    dtype: int = FLOAT32
    width: int = 0
    activation: str = "gelu_tanh"
    bias: bool = True


def numbers(name: str, *values: int, dtype: str = "int64") -> str:
    """A Constant: a vector of integers."""
    listed = ", ".join(map(str, values))
    return f"{name} = Constant <value = {dtype}[{len(values)}] {{{listed}}}> ()"


def each(stem: str, count: int) -> str:
    """`stem0, stem1, ...`"""
    return ", ".join(f"{stem}{i}" for i in range(count))


# Activation, or that of a gated one's gates -> its lines, from {x} to {y}.
CURVES = {
    "gelu_tanh": ('{y} = Gelu <approximate = "tanh"> ({x})',),
    "gelu": ("{y} = Gelu ({x})",),
    "silu": ("{x}_sigmoid = Sigmoid ({x})", "{y} = Mul ({x}, {x}_sigmoid)"),
}
GATES = {"swiglu": "silu", "geglu": "gelu"}


def activated(routing: Routing, source: str, result: str) -> list[str]:
    """source [.., H], or [.., 2 H] with the gates first, -> result [.., H]."""
    if routing.activation not in GATES:
        return [line.format(x=source, y=result) for line in CURVES[routing.activation]]
    gate, value, curved = (f"{source}_{part}" for part in ("gate", "value", "curved"))
    return [
        f"{gate}, {value} = Split <axis = -1, num_outputs = 2> ({source})",
        *(line.format(x=gate, y=curved) for line in CURVES[GATES[routing.activation]]),
        f"{result} = Mul ({curved}, {value})",
    ]


def sorted_lines(routing: Routing) -> list[str]:
    """Sort, split, two matmuls per expert, gather and sum.

    Pairs are numbered chosen-major (p = j*T + t), so that a token's K rows lie T apart and the sum
    is K gathers. The gate weighs the hidden row, H numbers instead of D: the same product.
    """
    experts = routing.experts
    half = routing.dtype != FLOAT32
    lines = [
        *sorting_lines(routing),
        "rows = Gather (x, token)",
        f"{each('x', experts)} = Split <axis = 0> (rows, count)",
    ]
    pieces = f"Split <axis = 0, num_outputs = {experts}>"
    lines += [  # folded with initializers
        "w1_rows = Flatten <axis = 2> (w1)",  # [E * D, H]
        f"{each('u', experts)} = {pieces} (w1_rows)",
        *([f"{each('c', experts)} = {pieces} (b1)"] if routing.bias else []),
        "w2_rows = Flatten <axis = 2> (w2)",  # [E * H, D]
        f"{each('d', experts)} = {pieces} (w2_rows)",
    ]
    for e in range(experts):
        product = f"Gemm (x{e}, u{e}, c{e})" if routing.bias else f"MatMul (x{e}, u{e})"
        lines += [f"m{e} = {product}"]
    lines += [
        f"m = Concat <axis = 0> ({each('m', experts)})",
        *activated(routing, "m", "g"),
        *weighing_lines(half),
        f"{each('h', experts)} = Split <axis = 0> (h, count)",
    ]
    lines += [f"z{e} = MatMul (h{e}, d{e})" for e in range(experts)]
    return [*lines, f"z = Concat <axis = 0> ({each('z', experts)})", *sum_lines(routing)]


def sorting_lines(routing: Routing) -> list[str]:
    """The pairs by expert: `order` and its inverse `place`, a sorted pair's `token` and expert
    (`_sorted_pair`), an expert's `count`, `gate` [K, T]."""
    return [
        numbers("flat", -1),
        numbers("zero", 0),
        numbers("one", 1),
        numbers("k", routing.top_k),
        numbers("experts", routing.experts),
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
        "divisor = Max (tokens, one)",  # for T = 0
        "token = Mod (order, divisor)",
    ]


def weighing_lines(half: bool = False) -> list[str]:
    """g [P, H], the hidden rows of the sorted pairs, times their gates: h."""
    return [
        "flat_gate = Reshape (gate, flat)",
        "sorted_gate = Gather (flat_gate, order)",
        "weight = Unsqueeze (sorted_gate, one)",
        *(["weight_x = CastLike (weight, x)"] if half else []),
        f"h = Mul (g, weight{'_x' if half else ''})",
    ]


def sum_lines(routing: Routing) -> list[str]:
    """z [P, D] of the sorted pairs -> y [T, D], each token's own summed."""
    top_k, half = routing.top_k, routing.dtype != FLOAT32
    if top_k == 1:
        return ["y = Gather (z, place)"]
    lines = [f"{each('p', top_k)} = Split <axis = 0, num_outputs = {top_k}> (place)"]
    for j in range(top_k):
        lines += [f"r{j} = Gather (z, p{j})"]
        if half:
            lines += [f"f{j} = Cast <to = {FLOAT32}> (r{j})"]
    total = each("f" if half else "r", top_k)
    result = "sum" if half else "y"
    lines += [f"{result} = {'Add' if top_k == 2 else 'Sum'} ({total})"]
    return [*lines, "y = CastLike (sum, x)"] if half else lines


def every_lines(routing: Routing) -> list[str]:
    """Every expert on every token, the unchosen weighed with nought: no sort, no split, no gather.

    E/K times the multiplications, in two large matmuls and a dozen nodes. Hidden values of unchosen
    experts are masked, for nought times infinity is no nought (12 us of 55 at T = 16, D = 128).
    Their w2 is multiplied, and must be finite: a product per expert, masked, took 83 us there,
    where `sorted` takes 66.
    """
    half = routing.dtype != FLOAT32
    lines = [
        numbers("k", routing.top_k),
        numbers("two", 2),
        numbers("flat", -1),
        "nil = Constant <value = float {0}> ()",
        "w1_by_row = Transpose <perm = [1, 0, 2]> (w1)",  # folded with initializers
        "w1_all = Flatten <axis = 1> (w1_by_row)",  # [D, E * H]
        *(["b1_all = Reshape (b1, flat)"] if routing.bias else []),
        "w2_all = Flatten <axis = 2> (w2)",  # [E * H, D]
        "probabilities = Softmax <axis = -1> (logits)",
        "gate, chosen = TopK <axis = -1> (probabilities, k)",
        "nobody = Mul (probabilities, nil)",
        "gates = ScatterElements <axis = 1> (nobody, chosen, gate)",  # [T, E]
        "weight = Unsqueeze (gates, two)",
        *(["weight_x = CastLike (weight, x)"] if half else []),
        "m = Gemm (x, w1_all, b1_all)" if routing.bias else "m = MatMul (x, w1_all)",
        *by_expert(routing),
        f"weighed = Mul (g_expert, weight{'_x' if half else ''})",
        *([f"weighed_float = Cast <to = {FLOAT32}> (weighed)"] if half else []),
        "unchosen = Equal (weight, nil)",
        f"h_expert = Where (unchosen, nil, weighed{'_float' if half else ''})",
        "h = Flatten <axis = 1> (h_expert)",
    ]
    if not half:
        return [*lines, "y = MatMul (h, w2_all)"]
    return [
        *lines,
        f"w2_float = Cast <to = {FLOAT32}> (w2_all)",
        "sum = MatMul (h, w2_float)",
        "y = CastLike (sum, x)",
    ]


def by_expert(routing: Routing) -> list[str]:
    """m [T, E * H], or [T, E * 2 H], -> g_expert [T, E, H].

    Sizes are read from tensors: where T = 0 none can be told from the others, and blocks of several
    sizes of experts share this function. Gates and values are each expert's own halves, so that a
    gated m is cut by expert first.
    """
    tokens = "tokens = Shape <start = 0, end = 1> (x)"
    if routing.activation in GATES:
        return [
            tokens,
            "experts_of = Shape <start = 0, end = 1> (w1)",
            "columns_of = Shape <start = 2, end = 3> (w1)",
            "by_expert = Concat <axis = 0> (tokens, experts_of, columns_of)",
            "m_expert = Reshape (m, by_expert)",
            *activated(routing, "m_expert", "g_expert"),
        ]
    sizes = "Shape (b1)" if routing.bias else "Shape <start = 0, end = 2> (w2)"
    return [
        *activated(routing, "m", "g"),
        tokens,
        f"expert_sizes = {sizes}",
        "by_expert = Concat <axis = 0> (tokens, expert_sizes)",
        "g_expert = Reshape (g, by_expert)",
    ]


def few(routing: Routing) -> int:
    """Up to how many tokens `every` beats `sorted` (0: never, or D is not known).

    Measured at E = 12, K = 2, H = D/4, one thread, D = 128: faster at T = 16 (56 us against 61 to
    74), slower at T = 32 (96 against 77 to 85). There an expert has 2.7 rows at 16 tokens: more
    than four on average and the sort pays. What `every` wastes grows with D, what it saves does
    not. Above D = 512 the second layout of the weights would cost more memory than it is worth.
    """
    if not 0 < routing.width <= 512:
        return 0
    return min(4 * routing.experts // routing.top_k, 2048 // routing.width)


def either_lines(routing: Routing) -> list[str]:
    """`every` for few tokens, `sorted` for more: one `If` a call, 1.7 us (measured).

    Each branch has its layout of the weights, folded when a session opens: the experts are in
    memory twice, only where D is small.
    """
    limit = few(routing)
    if not limit:
        return sorted_lines(routing)
    return [
        numbers("limit", limit + 1),
        "rows_x = Shape <start = 0, end = 1> (x)",
        "small = Less (rows_x, limit)",
        "y = If (small) <",
        f"then_branch = {branch('few', every_lines(routing))},",
        f"else_branch = {branch('many', sorted_lines(routing))}",
        ">",
    ]


def branch(name: str, lines: list[str]) -> str:
    """A body as a graph without inputs; its result is called `name`, for y is the If's."""
    *before, last = lines
    assert last.startswith("y = "), last
    inner = "\n".join([*before, last.replace("y", name, 1)])
    return f"{name}_branch () => ({name}) {{\n{inner}\n}}"


def portable_lines(routing: Routing, tile: int) -> list[str]:
    """Pad every expert's pairs to whole tiles; sizes follow from T, never from the routing.

    Pairs are numbered token-major (p = t*K + j). ceil summed over experts is at most P // B + E
    tiles, and at most P; tiles past the last one used, and padding rows, compute token 0 and are
    never read.
    """
    biased = routing.bias
    return [
        *tiling_lines(routing, tile),
        "tile_w1 = Gather (w1, owner)",
        *(["tile_b1 = Gather (b1, owner)"] if biased else []),
        "tile_w2 = Gather (w2, owner)",
        *(["tile_bias = Unsqueeze (tile_b1, one)"] if biased else []),
        "m = MatMul (tile_x, tile_w1)",
        *(["a = Add (m, tile_bias)"] if biased else []),
        *activated(routing, "a" if biased else "m", "g"),
        "z_tiles = MatMul (g, tile_w2)",
        *untiling_lines(),
    ]


def tiling_lines(routing: Routing, tile: int) -> list[str]:
    """The tokens of every tile, `tile_x` [N, B, D], its expert `owner` [N], and each pair's `row`
    among the N*B and its `gate` [T, K]."""
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
        "most = Add (full, experts)",
        "n = Min (most, pairs)",  # none where T = 0: there is no token 0
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
        "gathered = Gather (x, source)",
        "tile_shape = Concat <axis = 0> (n, tile, width)",
        "tile_x = Reshape (gathered, tile_shape)",  # [N, B, D]
    ]


def untiling_lines() -> list[str]:
    """z_tiles [N, B, D] -> y [T, D], weighed by the gates."""
    return [
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
