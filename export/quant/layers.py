"""Which weights are quantised: the products inside blocks, and the experts.

What is before and after the blocks stays (embeddings, the final layer), and so do modulation,
norms and routers: they are a few percent of the weights, and everything passes through them. More
is kept by name (`--keep`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from export.graph.trace import stays_float32
from export.op.schema import DOMAIN, OP

if TYPE_CHECKING:
    from export.graph.program import BlockType
    from export.quant.formats import Format

# Parts of weights' names that stay, in every family: AdaLN's projections.
SENSITIVE = ("norm", "modulation", "adaln", "_mod.")


def products(graph: Any) -> Iterator[tuple[Any, str]]:
    """(node, weight) of every product by a matrix that is a graph input, of an onnx_ir graph."""
    for node in graph:
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and plain(node)):
            weight = node.inputs[1]
            if weight.is_graph_input() and weight.shape is not None and len(weight.shape) == 2:
                yield node, weight.name
        elif (node.domain, node.op_type) == (DOMAIN, OP):
            yield from ((node, value.name) for value in experts(node))


def experts(node: Any) -> list[Any]:
    """w1 and w2 of a RoutedExperts node."""
    named = [value for value in node.inputs if value is not None and value.is_graph_input()]
    return [value for value in named if value.name.rpartition(".")[2] in ("w1", "w2")]


def plain(gemm: Any) -> bool:
    """Whether a Gemm is a product and a bias, and no more."""
    values = {name: attribute.value for name, attribute in gemm.attributes.items()}
    return all(values.get(name, 1.0) == 1.0 for name in ("alpha", "beta")) and not any(
        values.get(name) for name in ("transA", "transB")
    )


def quantisable(kind: Format, row: BlockType) -> list[str]:
    """The weights of a block type that `kind` can hold, by local name."""
    import onnx_ir as ir

    graph = ir.from_proto(next(reversed(row.graphs.values()))).graph  # the most experts
    multiplied = {name for _, name in products(graph)}

    def fits(value: Any) -> bool:
        sensitive = any(part in value.name.lower() for part in SENSITIVE) or stays_float32(
            value.name
        )
        readers = [use.node for use in value.uses()]
        only = all(value.name in [name for _, name in products([node])] for node in readers)
        block = (kind.of_experts if len(value.shape) > 2 else kind).block
        whole = not block or value.shape[-2] % block == 0
        return only and whole and not sensitive

    return [value.name for value in graph.inputs if value.name in multiplied and fits(value)]


def kept(name: str, patterns: Sequence[str]) -> bool:
    """Whether a weight's full name is among `--keep`: a pattern such as *.attn.*, or a prefix."""
    return any(
        fnmatchcase(name, each) or name.startswith(f"{each.rstrip('.')}.") for each in patterns
    )
