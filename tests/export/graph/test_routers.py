"""Groups of blocks in a bundle against torch: whole graphs, blocks, routers; skipped is not run."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from d2m.model.block_group import block_groups, set_kappa
from d2m.model.surgery import set_top_k
from export.bundle import export_bundle
from export.graph.block_choice import choose_function
from runtime.bundle.directory import open_bundle
from runtime.files.tensors import read_header
from runtime.ort.component import open_component
from tests.tiny.bundle import manifest_of, relative, run_block, session
from tests.tiny.grouped import (
    GROUPS,
    KAPPAS,
    chosen,
    differing,
    feed_of,
    grouped_pipeline,
    load_transformer,
)
from tests.tiny.pipeline import tiny_inputs

Pair = tuple[Any, Path]
LIMIT = 1e-4  # of a relative error, as parity's; another block or expert is 1e-2 and more


@pytest.fixture(scope="module", params=["alpha .5", "alpha 0"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Torch's transformer and the bundle of it."""
    name = "grouped" if request.param == "alpha .5" else "forecast"
    model = load_transformer(request.getfixturevalue(f"tiny_{name}_dir"))
    return model, request.getfixturevalue(f"tiny_{name}_bundle")


def torchs(model: Any, inputs: dict[str, torch.Tensor], kappa: int, top_k: int = 2) -> Any:
    set_kappa(model, kappa)
    set_top_k(model, top_k)
    with torch.no_grad():
        return model(**inputs).sample


@pytest.mark.parametrize("mode", ["graph", "blocks"])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_bundles_are_torch(pair: Pair, mode: str, kappa: int) -> None:
    """A batch whose samples choose differently, and one alone; the default kappa is the model's."""
    model, path = pair
    executor = open_component(open_bundle(path), "transformer", threads=1, mode=mode)
    mixed = differing(model)
    for inputs, top_k in ((mixed, 2), (mixed, 1), (tiny_inputs(5, batch=1, image_tokens=25), 2)):
        expected = torchs(model, inputs, kappa, top_k)
        found = executor(feed_of(model, inputs), top_k, kappa)["sample"]
        assert relative(found, expected) < LIMIT
        if kappa == 1:
            np.testing.assert_array_equal(found, executor(feed_of(model, inputs), top_k)["sample"])


def test_all_blocks_are_the_model_without_groups(tiny_grouped_bundle: Path, tmp_path: Path) -> None:
    """The identity case: kappa = m is the export of the same weights without groups."""
    plain = grouped_pipeline(tmp_path / "plain", 0.5, grouped=False)
    export_bundle(plain, tmp_path / "bundle", top_k=(2,))
    manifest = manifest_of(tmp_path / "bundle")
    assert "groups" not in manifest["components"]["transformer"] and "kappa" not in manifest
    assert len(manifest["components"]["transformer"]["program"]) == 10  # one block is left out
    model = load_transformer(plain)
    feed = feed_of(model, tiny_inputs(1, batch=3))
    grouped, alone = (
        open_component(open_bundle(path), "transformer", threads=1)
        for path in (tiny_grouped_bundle, tmp_path / "bundle")
    )
    np.testing.assert_array_equal(grouped(feed, 2, 3)["sample"], alone(feed, 2)["sample"])
    assert relative(grouped(feed, 2, 1)["sample"], alone(feed, 2)["sample"]) > 0.1


def test_the_program_names_its_groups(pair: Pair) -> None:
    model, path = pair
    manifest = manifest_of(path)
    record, header = (
        manifest["components"]["transformer"],
        read_header(path / "transformer.safetensors"),
    )
    assert manifest["kappa"] == 1 and set(record["groups"]) == set(GROUPS)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert manifest["parameters"]["total"] == total
    assert manifest["parameters"]["activated"] < total
    assert "single_transformer_blocks.4." not in [call["prefix"] for call in record["program"]]
    for name, group in record["groups"].items():
        blocks = [record["program"][call]["prefix"] for call in group["calls"]]
        assert blocks == [f"{name}.blocks.{index}." for index in GROUPS[name][1]]
        router = block_groups(model)[name].router
        kind = record["types"][group["type"]]
        streams = ["hidden_states", "encoder_hidden_states"] if router.alpha else []
        assert kind["inputs"] == [*streams, "temb"] and group["alpha"] == router.alpha
        assert header[f"{name}.router.tokens.weight"].dtype == "F32"
    assert {g["type"] for g in record["groups"].values()} == {"router"}, "one type, one graph"


def test_routers_are_torch(pair: Pair) -> None:
    model, path = pair
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (2, 9, 32), "encoder_hidden_states": (2, 5, 32), "temb": (2, 32)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, group in block_groups(model).items():
        feed = {key: value.numpy() for key, value in inputs.items()}
        (found,) = run_block(path, "transformer", "router", "", f"{name}.", feed)
        assert found.dtype == np.float32
        assert relative(found, group.router(**inputs).detach()) < 1e-6


def test_choosing_is_torchs() -> None:
    """Every kappa, ties among the logits: the windows' mean, the lowest index of the largest."""
    rng = np.random.default_rng(0)
    blocks = onnx.helper.make_tensor_value_info("logits", 1, ["batch", "blocks"])
    nodes = [onnx.helper.make_node("choose", ["logits", "kappa"], ["runs", "any"], domain="x")]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [blocks, onnx.helper.make_tensor_value_info("kappa", 7, [])],
        [onnx.helper.make_tensor_value_info(name, 9, None) for name in ("runs", "any")],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("x", 1)]
    model = onnx.helper.make_model(
        graph, functions=[choose_function("x")], opset_imports=opsets, ir_version=10
    )
    run = session(model)
    for m in (2, 3, 5):
        logits = rng.integers(0, 3, (16, m)).astype(np.float32)
        for kappa in range(1, m + 1):
            windows = torch.from_numpy(logits).unfold(-1, kappa, 1).mean(-1)
            starts = windows.argmax(-1).numpy()
            place = np.arange(m)[:, None]
            expected = (place >= starts) & (place < starts + kappa)
            runs, some = run.run(None, {"logits": logits, "kappa": np.array(kappa)})
            assert runs.shape == (m, 16, 1, 1)
            np.testing.assert_array_equal(runs[:, :, 0, 0], expected)
            np.testing.assert_array_equal(some, expected.any(1))


def test_a_skipped_block_does_not_run(pair: Pair, tmp_path: Path) -> None:
    """NaN in what nobody chooses is never read, and the profile holds no node of it."""
    model, path = pair
    inputs = tiny_inputs(3, batch=1)
    expected = torchs(model, inputs, 1)
    first = [starts[0] for starts in chosen(model, inputs, 1)]
    groups = manifest_of(path)["components"]["transformer"]["groups"]
    calls = {
        call: i == start
        for g, start in zip(GROUPS, first)
        for i, call in enumerate(groups[g]["calls"])
    }
    program = manifest_of(path)["components"]["transformer"]["program"]
    skipped = tuple(program[call]["prefix"] for call, runs in calls.items() if not runs)
    assert len(skipped) == 4
    shutil.copytree(path, tmp_path / "bundle")
    poison(tmp_path / "bundle" / "transformer.safetensors", skipped)

    options = ort.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.profile_file_prefix = str(tmp_path / "profile")
    graph = str(tmp_path / "bundle" / "transformer.onnx")
    opened = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = feed_of(model, inputs)
    (found,) = opened.run(["sample"], feed)
    assert np.isfinite(found).all() and relative(found, expected) < LIMIT
    events = [
        (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
        for event in json.loads(Path(opened.end_profiling()).read_text())
        if event["name"].endswith("_kernel_time")
    ]
    names = [name for name, _ in events]
    for call, runs in calls.items():
        end = names.index(f"{program[call]['prefix']}if")
        # Nodes inside an If come before it; before those come other Ifs and what they read.
        outer = (i for i in range(end) if names[i].endswith((".mask", ".wanted", ".if")))
        inside = [op for _, op in events[max(outer) + 1 : end]]
        if runs:
            assert inside.count("MatMul") > 3 and "Softmax" in inside
        else:
            assert inside == ["Identity", "Identity"]
    (poisoned,) = opened.run(["sample"], {**feed, "kappa": np.array(3)})
    assert np.isnan(poisoned).any(), "the poison is poison"


def poison(file: Path, prefixes: tuple[str, ...]) -> None:
    """NaN into every tensor of a safetensors file whose name begins so."""
    data = bytearray(file.read_bytes())
    for name, tensor in read_header(file).items():
        if name.startswith(prefixes):
            data[tensor.start : tensor.end] = b"\xff" * (tensor.end - tensor.start)
    file.write_bytes(data)


def test_the_block_program_calls_a_block_once_with_those_that_chose_it(pair: Pair) -> None:
    model, path = pair
    bundle = open_bundle(path)
    executor = open_component(bundle, "transformer", threads=1, mode="blocks")
    called: list[tuple[str, int]] = []
    call = executor.call

    def spy(index: int, kind: str, key: str, prefix: str, inputs: list[Any]) -> Any:
        called.append((prefix, inputs[0].shape()[0]))
        return call(index, kind, key, prefix, inputs)

    executor.call = spy
    inputs = differing(model)
    for kappa in KAPPAS:
        called.clear()
        executor(feed_of(model, inputs), 2, kappa)
        found = dict(called)
        assert len(found) == len(called) - 1, "embed and final have no prefix, all others run once"
        for (name, (_, blocks)), starts in zip(
            GROUPS.items(), chosen(model, inputs, min(kappa, 2))
        ):
            assert (f"{name}." in found) == (kappa < 3), "kappa = m asks no router"
            for offset, block in enumerate(blocks):
                rows = sum(start <= offset < start + kappa for start in starts)
                rows = 4 if kappa == 3 else rows
                assert found.get(f"{name}.blocks.{block}.", 0) == rows


def test_graphs_keep_their_calls(pair: Pair) -> None:
    """The If's branches: a call and Where, or Identity; every group's router outside of them."""
    _, path = pair
    onnx.checker.check_model(str(path / "transformer.onnx"), full_check=True)
    model = onnx.load(str(path / "transformer.onnx"), load_external_data=False)
    ifs = [node for node in model.graph.node if node.op_type == "If"]
    assert len(ifs) == 6 and [n.op_type for n in model.graph.node].count("router") == 2
    for node in ifs:
        branches = {a.name: [n.op_type for n in a.g.node] for a in node.attribute}
        assert branches["then_branch"][1:] == ["Where", "Where"]
        assert branches["then_branch"][0] in ("double", "single")
        assert branches["else_branch"] == ["Identity", "Identity"]
