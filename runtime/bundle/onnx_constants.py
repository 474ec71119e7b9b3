"""Memory that ONNX Runtime takes for the constants it computes while a graph opens.

It runs every node whose inputs are all constant, whatever comes out (1 GB from a file of 85 bytes).
Its one remedy is a limit for the output of a node. Weights in another type than the graph computes
in must be converted so, the largest too, while nodes that may grow (Expand, ConstantOfShape, any
broadcast) must not each fill as much. So constants are traced through the graph: where the nodes
that keep a tensor's size, and the others at the limit, stay within what the files justify, the
limit is that of the largest tensor, else a small one for every node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Key = tuple[str, str]  # domain and name of an operator or function

MAX_VISITS = 2_000_000  # of nodes, while constants are traced
WIDEST = 8  # bytes of an element
FOLDED = 256 << 20  # bytes that computed constants may fill beside a multiple of the files
FOLDED_USUAL = 64 << 10  # bytes of one node's output that are no matter
FOLDED_LEAST = 512
# What comes out has no more elements than what goes in.
KEEPING = set(
    "Abs Cast CastLike Ceil Concat Constant Cos Exp Flatten Floor Identity Log Neg Not Reciprocal"
    " ReduceMax ReduceMean ReduceMin ReduceSum Reshape Shape Sigmoid Sin Size Slice Split Sqrt"
    " Squeeze Tanh Transpose Unsqueeze".split()
)


@dataclass
class Step:
    """A node: operator, names in and out, graphs inside it, elements of its tensors."""

    key: Key = ("", "")
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    graphs: list[Body] = field(default_factory=list)
    elements: int = 0


@dataclass
class Body:
    """A graph or a function: its steps, its constants (name -> elements), names in and out."""

    steps: list[Step] = field(default_factory=list)
    constants: dict[str, int] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass
class Count:
    """What was found on the way."""

    keeping: int = 0  # elements that come out of nodes that keep a tensor's size
    growing: int = 0  # nodes that may grow
    visits: int = 0


def folding_limit(main: Body, functions: Mapping[Key, Body], size: int, nodes: int) -> int:
    """Bytes that one node's constant output may fill; `size` bytes of files, `nodes` in all.

    ValueError, a clause, where constants cannot be traced in a bounded time.
    """
    count = Count()
    trace(main, {}, functions, count)
    budget = FOLDED + 16 * size
    bodies = [main, *functions.values()]
    largest = max((n for body in bodies for n in body.constants.values()), default=0)
    limit = max(FOLDED_USUAL, WIDEST * largest)
    if count.keeping * WIDEST + count.growing * limit <= budget:
        return limit
    return max(FOLDED_LEAST, budget // (nodes + 1))


def trace(
    body: Body, known: Mapping[str, int], functions: Mapping[Key, Body], count: Count
) -> dict[str, int]:
    """Constants of a graph, name -> elements, given those that come from outside."""
    here = {**known, **body.constants}
    for step in body.steps:
        count.visits += 1
        if count.visits > MAX_VISITS:
            raise ValueError(f"its calls come to more than {MAX_VISITS} nodes")
        for graph in step.graphs:
            trace(graph, here, functions, count)
        if step.key in functions:
            call(step, here, functions, count)
        elif not step.graphs and all(name in here for name in step.inputs if name):
            elements = step.elements + sum(here[name] for name in step.inputs if name)
            here |= dict.fromkeys(step.outputs, elements)
            if step.key[1] == "Constant":
                continue
            if step.key[1] in KEEPING:
                count.keeping += elements * len(step.outputs)
            else:
                count.growing += len(step.outputs)
    return here


def call(step: Step, here: dict[str, int], functions: Mapping[Key, Body], count: Count) -> None:
    """A function's body with the constants of this call; constants that it returns enter `here`."""
    body = functions[step.key]
    given = {
        inside: here[outside]
        for inside, outside in zip(body.inputs, step.inputs)
        if outside in here
    }
    found = trace(body, given, functions, count)
    pairs: Sequence[tuple[str, str]] = list(zip(body.outputs, step.outputs))
    here |= {outside: found[inside] for inside, outside in pairs if inside in found}
