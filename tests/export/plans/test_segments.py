"""A block graph cut at its experts: the segments one after another give what the whole gives."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from d2m.model.routing import routed_experts_reference
from d2m.model.sparse_ffn import SparseFFN
from export.graph.trace import Spec, trace
from export.op.top_k import with_top_k
from export.plans.build import tensors
from export.plans.fuse import fuse
from export.plans.segments import Experts, cut, plain
from runtime.files.tensors import SafeTensors
from tests.tiny.bundle import manifest_of, relative, run_block, session

KINDS = {"double": "transformer_blocks.1.", "single": "single_transformer_blocks.0."}


def graph_of(bundle: Path, kind: str, key: str) -> onnx.ModelProto:
    return onnx.load(str(bundle / f"blocks/transformer/{kind}.k{key}.onnx"))


def run_steps(steps: list[Any], values: dict[str, np.ndarray], top_k: int) -> dict[str, Any]:
    """Segments by ONNX Runtime, the op between them by the reference in float64."""
    for step in steps:
        if isinstance(step, Experts):
            given = [torch.tensor(values[row["name"]]).double() for row in step.inputs]
            x, logits = given[0].flatten(0, -2), given[1]
            weights = given[2:] if len(given) == 5 else [given[2], None, given[3]]
            y = routed_experts_reference(x, logits, *weights, top_k, step.activation)
            values[step.output["name"]] = y.reshape(given[0].shape).float().numpy()
            continue
        onnx.checker.check_model(step, full_check=True)
        opened = session(step)
        feed = {v.name: values[v.name].reshape(shape_like(v, values)) for v in opened.get_inputs()}
        values |= dict(zip([v.name for v in opened.get_outputs()], opened.run(None, feed)))
    return values


def shape_like(value: Any, values: dict[str, np.ndarray]) -> tuple[int, ...]:
    """The declared shape of a weight (fuse widens vectors), or the tensor's own."""
    known = all(isinstance(size, int) for size in value.shape)
    return tuple(value.shape) if known else values[value.name].shape


def block_values(bundle: Path, kind: str) -> dict[str, np.ndarray]:
    """A block's inputs at sizes that differ, and its weights."""
    record = manifest_of(bundle)["components"]["transformer"]
    row, width = record["types"][kind], 32
    rng = np.random.default_rng(3)
    shapes = {"temb": (2, width), "rope_cos": (13, 16), "rope_sin": (13, 16)}
    shapes |= {"hidden_states": (2, 8, width), "encoder_hidden_states": (2, 5, width)}
    values = {name: rng.standard_normal(shapes[name]).astype("f4") for name in row["inputs"]}
    weights = SafeTensors(bundle / record["weights"])
    return values | {
        name: weights.array(KINDS[kind] + name, spec["dtype"])
        for name, spec in row["weights"].items()
    }


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("key", ["1", "2", "4"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_segments_and_experts_are_the_block(
    tiny_bundle: Path, kind: str, key: str, fused: bool
) -> None:
    steps = cut(graph_of(tiny_bundle, kind, key))
    if fused:  # as they are compiled
        steps = [step if isinstance(step, Experts) else fuse(step) for step in steps]
    values = block_values(tiny_bundle, kind)
    wanted = run_block(tiny_bundle, "transformer", kind, key, KINDS[kind], values)
    found = run_steps(steps, dict(values), int(key))
    for name, array in zip(["encoder_hidden_states", "hidden_states"], wanted, strict=True):
        assert relative(found[f"out_{name}"], array) < 1e-5


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("geglu", True)])
def test_gated_experts_are_cut_out(activation: str, bias: bool) -> None:
    """Version 2 of the op, whose inputs stand in another order."""
    ffn = SparseFFN(16, 8, 4, 6, top_k=2, activation=activation, bias=bias)
    block = torch.nn.Sequential(torch.nn.LayerNorm(16), ffn).eval()
    if bias:
        torch.nn.init.normal_(ffn.experts.b1)
    spec = Spec(torch.float32, ("batch", "image_tokens", 16))
    graph = trace(block, lambda run, t: run(t["x"]), {"x": spec}, {"y": spec}, torch.float32)
    first, experts, last = cut(graph)
    assert (experts.activation, len(experts.inputs)) == (activation, 5 if bias else 4)
    roles = ["w1", "b1", "w2"] if bias else ["w1", "w2"]
    assert [row["name"] for row in experts.inputs[2:]] == [f"1.experts.{role}" for role in roles]
    x = torch.randn(2, 7, 16)
    values = {name: value.detach().numpy() for name, value in block.named_parameters()}
    for name in ("1.shared.fc1.weight", "1.shared.fc2.weight", "1.gate.weight"):
        values[name] = np.ascontiguousarray(values[name].T)
    found = run_steps([first, experts, last], values | {"x": x.numpy()}, 2)
    with torch.no_grad():
        assert relative(found["out_y"], block(x).numpy()) < 1e-5


def test_a_double_block_has_two_launches_between_two_segments(tiny_bundle: Path) -> None:
    steps = cut(graph_of(tiny_bundle, "double", "2"))
    kinds = ["experts" if isinstance(step, Experts) else "segment" for step in steps]
    assert kinds == ["segment", "experts", "experts", "segment"]
    image, text = steps[1], steps[2]
    assert [row["shape"] for row in image.inputs] == [
        ["batch", "image_tokens", 32],
        ["batch*image_tokens", 12],
        [12, 32, 8],
        [12, 8],
        [12, 8, 32],
    ]
    assert text.inputs[2]["name"] == "ff_context.experts.w1"
    assert text.output["shape"] == text.inputs[0]["shape"] == ["batch", "text_tokens", 32]


def test_attention_of_a_single_block_waits_for_the_second_segment(tiny_bundle: Path) -> None:
    first, experts, second = cut(graph_of(tiny_bundle, "single", "2"))
    count = lambda model, op: sum(node.op_type == op for node in model.graph.node)  # noqa: E731
    assert (count(first, "Softmax"), count(second, "Softmax")) == (0, 1)
    assert (count(first, "MatMul"), count(second, "MatMul")) == (1, 6)  # the router alone
    assert experts.inputs[0]["shape"] == ["batch", "tokens", 32]
    assert experts.inputs[1]["shape"][0] == "batch*image_tokens + batch*text_tokens"


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_size_and_no_view_passes_between_segments(tiny_bundle: Path, kind: str) -> None:
    steps = cut(graph_of(tiny_bundle, kind, "2"))
    first, last = steps[0], steps[-1]
    written = {row["name"]: row for row in tensors(first)["outputs"]}
    launches = [step for step in steps if isinstance(step, Experts)]
    used = {row["name"] for step in launches for row in step.inputs}
    used |= {row["name"] for row in tensors(last)["inputs"]}
    assert set(written) <= used  # nothing is written that nobody reads
    assert {row["dtype"] for row in written.values()} == {"float32"}
    views = {n.output[0] for n in first.graph.node if n.op_type == "Reshape"}
    assert not views & set(written)
    names = [value.name for value in (*first.graph.input, *last.graph.input)]
    assert not any(".experts." in name for name in names)


def test_segments_do_not_depend_on_top_k(tiny_bundle: Path) -> None:
    one, four = (cut(graph_of(tiny_bundle, "double", key)) for key in "14")
    assert one == four


def test_a_block_without_experts_is_one_segment(tiny_bundle: Path) -> None:
    """top_k 0 takes the op out: nothing to launch, nothing to cut."""
    graph = graph_of(tiny_bundle, "single", "0")
    (only,) = cut(graph)
    assert [n.op_type for n in only.graph.node] == [n.op_type for n in graph.graph.node]
    assert len(cut(with_top_k(graph_of(tiny_bundle, "double", "2"), 0))) == 1


def test_dimensions_are_sums_of_products() -> None:
    sizes = (7, "batch", "image_tokens + text_tokens", "batch*(image_tokens + text_tokens)")
    assert [plain(size) for size in sizes] == [
        *(7, "batch", "tokens"),
        "batch*image_tokens + batch*text_tokens",
    ]
