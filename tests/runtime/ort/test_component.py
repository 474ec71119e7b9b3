"""ONNX Runtime: the whole graph and the block program give the same tensors."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.directory import Bundle, open_bundle
from runtime.ort import component as ort
from runtime.ort.component import Blocks, Graph, open_component
from runtime.ort.memory_places import Host
from tests.cases.executor_inputs import inputs


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def graph(bundle: Bundle) -> Any:
    return open_component(bundle, "transformer", threads=1)


@pytest.fixture(scope="module")
def blocks(bundle: Bundle) -> Any:
    return open_component(bundle, "transformer", threads=1, mode="blocks")


def close(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        error = np.linalg.norm(first[name] - second[name])
        assert error <= 1e-5 * np.linalg.norm(second[name]), name


def test_graph_and_blocks_agree(bundle: Bundle, graph: Graph, blocks: Blocks) -> None:
    for batch in (1, 3):
        given = inputs(bundle, "transformer", batch=batch)
        close(graph(given), blocks(given))


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_components_of_one_block(bundle: Bundle, component: str) -> None:
    given = inputs(bundle, component, tokens=16, text_tokens=16)
    whole = open_component(bundle, component, threads=1)
    close(whole(given), open_component(bundle, component, threads=1, mode="blocks")(given))


def test_vae_decoder(bundle: Bundle) -> None:
    given = inputs(bundle, "vae_decoder")
    whole = open_component(bundle, "vae_decoder", threads=1)
    close(whole(given), open_component(bundle, "vae_decoder", threads=1, mode="blocks")(given))


def test_every_top_k(bundle: Bundle, graph: Graph, blocks: Blocks) -> None:
    given = inputs(bundle, "transformer")
    outputs = {k: blocks(given, k) for k in bundle.manifest["top_k_choices"]}
    close(blocks(given), outputs[bundle.manifest["top_k"]])
    arrays = [next(iter(out.values())) for out in outputs.values()]
    for i, first in enumerate(arrays):
        assert all(np.abs(first - other).max() > 1e-3 for other in arrays[:i])
    for k, expected in outputs.items():
        close(graph(given, k), expected)
    with pytest.raises(ValueError, match="top_k is 3, expected one of 0, 1, 2, 4"):
        graph(given, 3)


def test_weights_are_shared_by_all_top_k(bundle: Bundle) -> None:
    blocks = Blocks(bundle, "transformer", 1)
    given = inputs(bundle, "transformer")
    blocks(given, 2)
    assert isinstance(blocks.place, Host)
    before = dict(blocks.place.weights)
    blocks(given, 4)
    assert before and blocks.place.weights.keys() == before.keys()
    assert all(blocks.place.weights[name] is value for name, value in before.items())


def test_weights_stored_as_they_are_computed_with_are_not_copied(bundle: Bundle) -> None:
    """They lie in the mapped file, where all sessions read them."""
    blocks = Blocks(bundle, "transformer", 1)
    blocks(inputs(bundle, "transformer"))
    assert isinstance(blocks.place, Host)
    mapped = bundle.weights("transformer")
    for (name, dtype), array in blocks.place.weights.items():
        assert dtype == "float32" and np.shares_memory(array, mapped.raw(name))


def test_one_block_alone(bundle: Bundle, blocks: Blocks) -> None:
    """Fed with what the program feeds it, a block gives what it gives in the program."""
    seen: list[tuple[Any, ...]] = []
    call = blocks.call

    def watch(index: int, kind: str, key: str, prefix: str, values: list[Any]) -> list[Any]:
        outputs = call(index, kind, key, prefix, values)
        arrays = [[v.numpy().copy() for v in side] for side in (values, outputs)]
        seen.append((kind, prefix, *arrays))
        return outputs

    blocks.call = watch  # type: ignore[method-assign]
    try:
        blocks(inputs(bundle, "transformer"))
    finally:
        blocks.call = call  # type: ignore[method-assign]
    assert len(seen) == len(bundle.component("transformer")["program"])
    for kind, prefix, given, expected in seen:
        row = bundle.component("transformer")["types"][kind]
        found = blocks.block(kind, prefix, dict(zip(row["inputs"], given, strict=True)))
        for name, array in zip(row["outputs"], expected, strict=True):
            np.testing.assert_array_equal(found[name], array)


def test_results_are_not_overwritten_by_the_next_call(bundle: Bundle, blocks: Blocks) -> None:
    first = blocks(inputs(bundle, "transformer", seed=0))
    kept = {name: array.copy() for name, array in first.items()}
    blocks(inputs(bundle, "transformer", seed=1))
    for name in first:
        np.testing.assert_array_equal(first[name], kept[name])


def test_wrong_inputs(bundle: Bundle, graph: Graph, blocks: Blocks) -> None:
    given = inputs(bundle, "transformer")
    given["timestep"] = given["timestep"][:1]
    for executor in (graph, blocks):
        with pytest.raises(ValueError, match=r"is float32 \[.*\], expected float32 \['batch'"):
            executor(given)


def test_a_graph_that_is_none_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    bad = Bundle(tmp_path, {"files": {"bad.onnx": {}}}, "")
    with pytest.raises(ValueError, match="bad.onnx is not safe to open: it is no protocol buffer"):
        ort.open_session(bad, "bad.onnx", 1)


def test_wrong_options(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="mode is 'fast', expected 'graph' or 'blocks'"):
        open_component(bundle, "transformer", mode="fast")
    half = Bundle(bundle.path, {**bundle.manifest, "compute_dtype": "bfloat16"}, "")
    with pytest.raises(ValueError, match="computes in bfloat16, .*--dtype fp32"):
        open_component(half, "transformer")


def test_a_graph_that_is_not_the_manifests(bundle: Bundle) -> None:
    words = r"its .*onnx and its manifest\.json differ in"
    changed = copy.deepcopy(bundle.manifest)
    changed["components"]["transformer"]["inputs"].pop("guidance")
    with pytest.raises(ValueError, match=f"{words} guidance"):
        open_component(Bundle(bundle.path, changed, ""), "transformer")
    changed = copy.deepcopy(bundle.manifest)
    kinds = changed["components"]["transformer"]["types"]
    kinds["double"]["weights"].pop("attn.to_qkv.weight")
    blocks = open_component(Bundle(bundle.path, changed, ""), "transformer", mode="blocks")
    with pytest.raises(ValueError, match=f"{words} attn.to_qkv.weight"):
        blocks(inputs(bundle, "transformer"))
    kinds["embed"]["outputs"].pop()
    blocks = open_component(Bundle(bundle.path, changed, ""), "transformer", mode="blocks")
    with pytest.raises(ValueError, match=f"{words} the number of outputs"):
        blocks(inputs(bundle, "transformer"))
