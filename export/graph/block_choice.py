"""Which blocks of a group run, as ONNX: the choice as a function, a block call inside an `If`.

A composed graph holds one decision for the whole batch, and samples may choose differently. So a
block runs where any sample chose it, and `Where` keeps the other samples' streams: right for every
batch, and a block that nobody chose costs nothing, for ONNX Runtime runs one branch of an `If`.
(Rows gathered by choice would compute less in mixed batches, but need NonZero, which TensorRT
refuses. The block program gathers them: see runtime.bundle.block_groups.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from export.op.schema import OPSET

if TYPE_CHECKING:
    import onnx

CHOOSE = "choose"
KAPPA = "kappa"  # an initializer that is an input too: whoever gives none gets the default
# Window w holds the blocks w .. w + kappa - 1; windows that would reach past the last are none.
# The largest mean logit wins, the lowest index on ties (ArgMax takes the first).
_CHOOSE = f"""
<domain: "{{domain}}", opset_import: ["": {OPSET}]>
{CHOOSE} (logits, {KAPPA}) => (runs, wanted)
{{{{
    nothing = Constant <value: tensor = int64 {{{{0}}}}> ()
    single = Constant <value: tensor = int64 {{{{1}}}}> ()
    axis = Constant <value: tensor = int64[1] {{{{1}}}}> ()
    sample = Constant <value: tensor = int64[1] {{{{1}}}}> ()
    stream = Constant <value: tensor = int64[2] {{{{2, 3}}}}> ()
    never = Constant <value: tensor = float {{{{-inf}}}}> ()
    size = Shape <start: int = 1, end: int = 2> (logits)
    blocks = Squeeze (size)
    place = Range (nothing, blocks, single)
    block = Unsqueeze (place, axis)
    end = Add (place, {KAPPA})
    after = GreaterOrEqual (block, place)
    before = Less (block, end)
    inside = And (after, before)
    ones = CastLike (inside, logits)
    sums = MatMul (logits, ones)
    share = CastLike ({KAPPA}, logits)
    means = Div (sums, share)
    fits = LessOrEqual (end, blocks)
    windows = Where (fits, means, never)
    start = ArgMax <axis: int = -1, keepdims: int = 1> (windows)
    stop = Add (start, {KAPPA})
    begun = GreaterOrEqual (place, start)
    going = Less (place, stop)
    chosen = And (begun, going)
    turned = Transpose <perm: ints = [1, 0]> (chosen)
    runs = Unsqueeze (turned, stream)
    number = Cast <to: int = 6> (turned)
    most = ReduceMax <keepdims: int = 0> (number, sample)
    wanted = Cast <to: int = 9> (most)
}}}}
"""


def choose_function(domain: str) -> onnx.FunctionProto:
    """(logits [B, m] float32, kappa int64) -> (runs [m, B, 1, 1] bool, wanted [m] bool).

    `runs`: whether a sample runs a block, in the shape of a mask over its tokens; `wanted`: whether
    any sample does.
    """
    from onnx import parser

    return parser.parse_function(_CHOOSE.format(domain=domain))


def choice(group: str, logits: str, domain: str) -> list[onnx.NodeProto]:
    """The nodes that choose for a group: they write `<group>.runs` and `<group>.wanted`."""
    from onnx import helper

    outputs = [f"{group}.runs", f"{group}.wanted"]
    return [
        helper.make_node(CHOOSE, [logits, KAPPA], outputs, name=f"{group}.{CHOOSE}", domain=domain)
    ]


def conditional(
    group: str, offset: int, call: onnx.NodeProto, before: Mapping[str, str], types: Sequence[int]
) -> list[onnx.NodeProto]:
    """`call`, the group's block at `offset`, as an `If` with the same outputs.

    before: each output of the call -> the tensor that it takes the place of; types: element types.
    """
    from onnx import helper

    results = list(call.output)
    tag = results[0]
    mask, wanted, place = f"{tag}.mask", f"{tag}.wanted", f"{tag}.place"
    inner = type(call).FromString(call.SerializeToString())
    inner.output[:] = [f"{name}.new" for name in results]
    kept = [
        helper.make_node("Where", [mask, new, before[name]], [f"{name}.run"], name=f"{name}.run")
        for name, new in zip(results, inner.output)
    ]
    passed = [
        helper.make_node("Identity", [before[name]], [f"{name}.skip"], name=f"{name}.skip")
        for name in results
    ]

    def branch(suffix: str, nodes: list[Any]) -> onnx.GraphProto:
        outputs = [
            helper.make_tensor_value_info(f"{name}.{suffix}", kind, None)
            for name, kind in zip(results, types, strict=True)
        ]
        return helper.make_graph(nodes, f"{tag}.{suffix}", [], outputs)

    index = helper.make_tensor(place, 7, [], [offset])
    return [
        helper.make_node("Constant", [], [place], name=place, value=index),
        helper.make_node("Gather", [f"{group}.runs", place], [mask], name=mask, axis=0),
        helper.make_node("Gather", [f"{group}.wanted", place], [wanted], name=wanted, axis=0),
        helper.make_node(
            "If",
            [wanted],
            results,
            name=f"{call.name}if",
            then_branch=branch("run", [inner, *kept]),
            else_branch=branch("skip", passed),
        ),
    ]
