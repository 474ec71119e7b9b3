"""A bundle in bfloat16, for a GPU: ONNX Runtime's CUDA provider has kernels for all of it."""

import json
from pathlib import Path

import onnx
import pytest
from onnx import inliner, shape_inference

from tests.conftest import exported

# Operators of ours that the provider has no bfloat16 kernel for at opset 20 (read: ONNX Runtime's
# docs/OperatorKernels.md, CUDAExecutionProvider).
WITHOUT = set(
    "ArgMax Conv Cos CumSum Equal Floor Greater GreaterOrEqual InstanceNormalization Less"
    " LessOrEqual Log OneHot Range Reciprocal ReduceMax ReduceMean Resize Sin TopK".split()
)


def bfloat16_without_kernel(graph: onnx.GraphProto, outer: dict[str, int]) -> set[str]:
    """Operators of WITHOUT that read or write bfloat16, subgraphs included."""
    kinds = dict(outer)
    for value in (*graph.input, *graph.value_info, *graph.output):
        kinds[value.name] = value.type.tensor_type.elem_type
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    found = set()
    for node in graph.node:
        used = {kinds.get(name) for name in (*node.input, *node.output)}
        if node.op_type in WITHOUT and onnx.TensorProto.BFLOAT16 in used:
            found.add(node.op_type)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found |= bfloat16_without_kernel(attribute.g, kinds)
    return found


@pytest.mark.slow
def test_every_operator_has_a_bfloat16_kernel_on_cuda(
    tiny_sparse_dir: Path, pytestconfig: pytest.Config
) -> None:
    bundle = exported(pytestconfig, tiny_sparse_dir, top_k=(2,), dtype="bf16")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["compute_dtype"] == "bfloat16"
    for name, component in manifest["components"].items():
        halves = 0
        for kind in component["types"].values():
            for path in kind["graphs"].values():
                model = inliner.inline_local_functions(onnx.load(bundle / path))
                model = shape_inference.infer_shapes(model)
                assert bfloat16_without_kernel(model.graph, {}) == set(), path
            halves += sum(row["dtype"] == "bfloat16" for row in kind["weights"].values())
        assert bool(halves) == (not name.startswith("vae_"))  # in float32: no bfloat16 convolutions
