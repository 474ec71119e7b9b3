"""A block graph cut at its routed experts: dense segments, and launches of kernels between them.

What the experts read is computed first; everything that does not lead to it (attention of a single
block, the shared experts) waits for the segment after, whose last products then take the routed
sum in. A double block gives: segment, experts of the image, experts of the text, segment.

Sizes are never passed from a segment to the next, nor are views: a Reshape, and whatever is not of
floating type, is done again where it is read. So no segment wants a shape in host memory, and the
experts read [B, T, D] where it lies, its rows being those of [B*T, D]. Nothing here depends on the
number of experts a token uses: one set of segments serves every top_k from 1.

Shape letters: B batch, T tokens, D width, E experts, H expert hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from export.op.bodies import with_body
from export.op.schema import DOMAIN, INPUTS, OP, ORDERS, inputs_of
from export.plans.build import tensor_row

if TYPE_CHECKING:
    import onnx

VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Identity"}
TOKENS = "image_tokens + text_tokens"  # "tokens" in the rotary tables' shapes: one name for it


@dataclass(frozen=True)
class Experts:
    """One launch between segments: tensors' names in the graph, and their rows for a manifest.

    inputs: x [B, T, D], logits [B*T, E], w1 [E, D, H], b1 [E, H] (if any), w2 [E, H, D], in this
    order whatever the op's version; activation: the op's; output: y, with the shape of x. Rows are
    {"name", "dtype", "shape"}.
    """

    inputs: tuple[dict[str, Any], ...]
    output: dict[str, Any]
    activation: str = "gelu_tanh"


def cut(model: onnx.ModelProto) -> list[Any]:
    """The steps of a block graph in order: onnx.ModelProto segments and `Experts`.

    A graph without routed experts is one segment, itself. Segments keep the names of what they
    read and write; a later one reads an earlier one's outputs and the experts' by name.
    """
    import onnx

    bare = with_body(model, None)
    graph = onnx.shape_inference.infer_shapes(bare).graph  # sizes have no type as traced
    whole = _Graph(graph)
    # Forwards: a wave of experts is all whose inputs need no other experts that are still to come.
    done: set[int] = set()
    plan: list[tuple[list[int], list[Any]]] = []  # a segment's nodes, the experts after it
    left = [node for node in graph.node if is_experts(node)]
    while left:
        outputs = {node.output[0] for node in left}
        wave = [n for n in left if not whole.ancestors(n.input, set()) & outputs]
        targets = [name for n in wave for name in (whole.source(n.input[0]), n.input[1])]
        plan.append((whole.needed(targets, done), wave))
        left = [node for node in left if node not in wave]
    ends = [value.name for value in graph.output]
    plan.append((whole.needed(ends, done), []))

    # Backwards, for what a segment must write is what later steps read.
    steps: list[Any] = []
    wanted = [*ends]  # what later steps read, from the last segment backwards
    for place, (nodes, wave) in reversed(list(enumerate(plan))):
        rows = [whole.experts(node) for node in wave]
        wanted += [row["name"] for launch in rows for row in launch.inputs]
        segment, read = whole.segment(nodes, ends if place == len(plan) - 1 else wanted)
        wanted += read
        steps[:0] = [*([segment] if nodes else []), *rows]
    return [_model(model, step) if not isinstance(step, Experts) else step for step in steps]


def is_experts(node: Any) -> bool:
    """Whether a node is `d2m::RoutedExperts`."""
    return (node.domain, node.op_type) == (DOMAIN, OP)


class _Graph:
    """A block graph with its producers and types looked up; nodes are named by their place."""

    def __init__(self, graph: Any) -> None:
        import onnx

        self.graph = graph
        self.producer = {name: i for i, node in enumerate(graph.node) for name in node.output}
        self.given = {value.name: value for value in graph.input}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.types = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
        self.floats = {getattr(onnx.TensorProto, n) for n in ("FLOAT", "FLOAT16", "BFLOAT16")}

    def ancestors(self, names: Iterable[str], over: set[str]) -> set[str]:
        """Every name that `names` are computed from; `over` collects it."""
        for name in names:
            if name not in over:
                over.add(name)
                if name in self.producer:
                    self.ancestors(self.graph.node[self.producer[name]].input, over)
        return over

    def again(self, place: int) -> bool:
        """Whether a node is done anew in each segment that reads it: a view, or no float."""
        node = self.graph.node[place]
        kind = self.types[node.output[0]].type.tensor_type.elem_type
        return node.op_type in VIEWS or kind not in self.floats

    def source(self, name: str) -> str:
        """The tensor behind a view."""
        place = self.producer.get(name)
        if place is not None and self.graph.node[place].op_type in VIEWS:
            return self.source(self.graph.node[place].input[0])
        return name

    def needed(self, targets: Iterable[str], done: set[int]) -> list[int]:
        """Nodes of a segment that ends in `targets`, in order; they are `done` afterwards."""
        found: set[int] = set()
        names = list(targets)
        while names:
            place = self.producer.get(names.pop())
            if place is None or place in found or place in done:
                continue
            if not is_experts(self.graph.node[place]):
                found.add(place)
                names += self.graph.node[place].input
        done.update(place for place in found if not self.again(place))
        return sorted(found)

    def experts(self, node: Any) -> Experts:
        """The launch that a node becomes."""
        kinds = [each.s.decode() for each in node.attribute if each.name == "activation"]
        activation, bias = kinds[0] if kinds else "gelu_tanh", len(node.input) == len(INPUTS)
        names = dict(zip(inputs_of(activation, bias), node.input, strict=True))
        names["x"] = self.source(names["x"])
        inputs = tuple(self.row(names[role]) for role in ORDERS[1] if role in names)
        return Experts(inputs, {**inputs[0], "name": node.output[0]}, activation)

    def row(self, name: str) -> dict[str, Any]:
        """{"name", "dtype", "shape"} of a tensor."""
        row = tensor_row(self.types[name])
        return {**row, "shape": [plain(size) for size in row["shape"]]}

    def segment(self, nodes: Sequence[int], wanted: Sequence[str]) -> tuple[Any, list[str]]:
        """(graph, names it reads of earlier steps) of a segment that writes what is `wanted`."""
        import onnx
        from onnx import helper

        # A dictionary, for a set has another order, and the plan other bytes, in every process.
        made = dict.fromkeys(name for place in nodes for name in self.graph.node[place].output)
        body = [onnx.NodeProto.FromString(self.graph.node[p].SerializeToString()) for p in nodes]
        self.measure_what_is_read(body, made)
        read = dict.fromkeys(name for node in body for name in node.input if name not in made)
        outer = [name for name in read if name in self.producer]
        shapes: dict[str, Any] = {}
        front: list[Any] = []
        for name in outer:  # the experts' y comes as x lies, and is read as rows
            node = self.graph.node[self.producer[name]]
            row = self.experts(node).output if is_experts(node) else self.row(name)
            shapes[name] = row["shape"]
            if is_experts(node) and len(row["shape"]) > 2:
                self.rows_of(name, row["shape"][-1], body, front)
        inputs = [value for name, value in self.given.items() if name in read]
        inputs += [self.info(name, shapes[name]) for name in outer]
        outputs = [
            value
            if value.name in {end.name for end in self.graph.output}
            else self.info(value.name, self.row(value.name)["shape"])
            for value in (self.types[name] for name in dict.fromkeys(wanted) if name in made)
        ]
        constants = [tensor for name, tensor in self.constants.items() if name in read]
        inner = [self.types[n] for n in made if n in self.types]
        written = {value.name for value in outputs}
        graph = helper.make_graph(
            [*front, *body],
            self.graph.name,
            inputs,
            outputs,
            constants,
            value_info=[value for value in inner if value.name not in written],
        )
        return graph, [*outer, *(value.name for value in inputs)]

    def rows_of(self, name: str, width: int, body: Sequence[Any], front: list[Any]) -> None:
        """Let `body` read the [B, T, D] tensor `name` as [B*T, D]."""
        from onnx import TensorProto, helper

        sizes, rows = f"{name}_sizes", f"{name}_rows"
        tensor = helper.make_tensor(sizes, TensorProto.INT64, [2], [-1, width])
        front.append(helper.make_node("Constant", [], [sizes], name=sizes, value=tensor))
        front.append(helper.make_node("Reshape", [name, sizes], [rows], name=rows))
        for node in body:
            for place, read in enumerate(node.input):
                if read == name:
                    node.input[place] = rows

    def measure_what_is_read(self, body: Sequence[Any], made: Mapping[str, Any]) -> None:
        """A Shape of a tensor from outside is taken of one that the segment reads anyway."""

        def dims(name: str) -> list[Any]:
            return list(self.row(name)["shape"])

        read = [
            name
            for node in body
            if node.op_type != "Shape"
            for name in node.input
            if name not in made and name in self.types
        ]
        for node in body:
            if node.op_type == "Shape" and node.input[0] not in {*made, *read}:
                alike = [name for name in read if dims(name) == dims(node.input[0])]
                node.input[0] = (alike or [node.input[0]])[0]

    def info(self, name: str, shape: Sequence[Any]) -> Any:
        """A graph's input or output."""
        from onnx import helper

        return helper.make_tensor_value_info(
            name, self.types[name].type.tensor_type.elem_type, shape
        )


def plain(size: int | str) -> int | str:
    """A dimension as runtime.trt.launch_schedule measures it: sums of products, "tokens" for both
    streams.

    The exporter writes "batch*(image_tokens + text_tokens)".
    """
    if not isinstance(size, str):
        return size
    if size == TOKENS:
        return "tokens"
    factor, found, rest = size.partition("*(")
    if not found:
        return size
    return " + ".join(f"{factor}*{term}" for term in rest.removesuffix(")").split(" + "))


def _model(whole: onnx.ModelProto, graph: Any) -> onnx.ModelProto:
    """A segment as a model, with the standard operators' version of the whole."""
    from onnx import helper

    opsets = [entry for entry in whole.opset_import if entry.domain != DOMAIN]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=whole.ir_version, producer_name="d2m"
    )
