"""The program interpreter, and how a backend is chosen."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.directory import Bundle
from runtime.program import backends, executor
from runtime.program.executor import check_inputs, choose_backend, graph_key, run_program

COMPONENT: dict[str, Any] = {
    "types": {
        "start": {"graphs": {"": "s"}, "inputs": ["x"], "outputs": ["y", "z"]},
        "step": {"graphs": {"0": "a", "2": "b"}, "inputs": ["z", "y"], "outputs": ["z"]},
    },
    "program": [
        {"type": "start", "prefix": ""},
        {"type": "step", "prefix": "blocks.0."},
        {"type": "step", "prefix": "blocks.1."},
    ],
}


def test_a_program_passes_values_by_name() -> None:
    calls = []

    def call(index: int, kind: str, key: str, prefix: str, inputs: list[int]) -> list[int]:
        calls.append((index, kind, key, prefix, inputs))
        return [inputs[0] + 1, inputs[0] + 10] if kind == "start" else [10 * inputs[0] + inputs[1]]

    env = {"x": 1}
    values = run_program(COMPONENT, env, 2, call)
    assert calls == [
        (0, "start", "", "", [1]),
        (1, "step", "2", "blocks.0.", [11, 2]),
        (2, "step", "2", "blocks.1.", [112, 2]),
    ]
    assert values == {"x": 1, "y": 2, "z": 1122} and env == {"x": 1}


def test_a_block_that_returns_too_little_is_our_fault() -> None:
    with pytest.raises(ValueError, match="zip"):
        run_program(COMPONENT, {"x": 1}, 2, lambda *_: [1])


def test_graph_key() -> None:
    assert graph_key(COMPONENT["types"]["start"], 7) == ""
    assert graph_key(COMPONENT["types"]["step"], 0) == "0"
    for wrong in (1, None, 22):
        with pytest.raises(ValueError, match=f"top_k is {wrong}, expected one of 0, 2.*--top-k"):
            graph_key(COMPONENT["types"]["step"], wrong)


INPUTS = {
    "inputs": {
        "x": {"dtype": "float32", "shape": ["batch", "tokens", 4]},
        "t": {"dtype": "bfloat16", "shape": ["batch"]},
    }
}


def test_inputs_are_checked() -> None:
    x, t = np.zeros((2, 3, 4), np.float32), np.zeros(2, np.uint16)
    check_inputs(INPUTS, {"x": x, "t": t})
    for wrong, words in (
        ({"x": x}, r"inputs are \['x'\], expected \['t', 'x'\]"),
        ({"x": x, "t": t[:1]}, r"input 't' is uint16 \[1\], expected uint16 \['batch'\]"),
        ({"x": x[..., :3], "t": t}, "input 'x' is"),
        ({"x": x[0], "t": t}, "input 'x' is"),
        ({"x": x.astype(np.float64), "t": t}, "input 'x' is float64"),
    ):
        with pytest.raises(ValueError, match=words):
            check_inputs(INPUTS, wrong)


def bundle(*apis: str) -> Bundle:
    plans = {f"target{i}": {"api": api} for i, api in enumerate(apis)}
    return Bundle(Path("nowhere"), {"plans": plans}, "0" * 64)


def test_auto_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed: set[str] = set()
    folder: list[str] = []

    class Spec:
        submodule_search_locations = folder

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: Spec() if name in installed else None
    )
    monkeypatch.setattr(executor, "gpu_count", lambda: gpus)
    gpus = 0
    name, reason = choose_backend(bundle())
    assert name == "ort" and reason.count("the bundle has no plans for it") == 2
    assert "not ort-cuda: onnxruntime is not installed" in reason
    installed.add("onnxruntime")
    assert "not ort-cuda: this onnxruntime has no CUDA provider" in choose_backend(bundle())[1]
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / backends.CUDA_LIBRARIES[0]).touch()
    folder.append(str(tmp_path))
    assert "not ort-cuda: no GPU is visible" in choose_backend(bundle())[1]
    assert "tensorrt_rtx is not installed" in choose_backend(bundle("tensorrt_rtx"))[1]
    installed.add("tensorrt_rtx")
    name, reason = choose_backend(bundle("tensorrt_rtx"))
    assert name == "ort" and "no GPU is visible" in reason
    gpus = 1
    name, reason = choose_backend(bundle("tensorrt_rtx"))
    assert name == "trt-rtx" and reason == "trt-rtx: what it needs is there"
    name, reason = choose_backend(bundle("tensorrt_rtx"), offload="block")
    assert name == "ort-cuda" and "not trt-rtx: it streams no blocks" in reason
    assert choose_backend(bundle("tensorrt"))[0] == "ort-cuda"
    installed.add("tensorrt")
    assert choose_backend(bundle("tensorrt"))[0] == "trt"
    assert choose_backend(bundle("tensorrt", "tensorrt_rtx"))[0] == "trt-rtx"


def test_a_backend_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(bundle(), "ort") == ("ort", "requested")
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of auto, ort, ort-cuda"):
        choose_backend(bundle(), "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'trt-rtx' needs tensorrt_rtx; .*\[trt-rtx\]"):
        choose_backend(bundle(), "trt-rtx")
    with pytest.raises(ImportError, match=r"'ort-cuda' needs onnxruntime; .*\[gpu\]"):
        choose_backend(bundle(), "ort-cuda")


def test_where_a_backend_has_run_is_said_of_each() -> None:
    assert backends.TRIED.keys() == backends.BACKENDS.keys() == backends.MODULES.keys()


def test_every_backend_names_a_function() -> None:
    for row in backends.BACKENDS.values():
        module, _, factory = row.partition(":")
        source = (Path(executor.__file__).parents[2] / f"{module.replace('.', '/')}.py").read_text()
        assert f"def {factory}(" in source


def test_a_quantised_bundle_goes_where_its_products_are(tmp_path: Path) -> None:
    """ONNX Runtime multiplies int8, fp8 and nvfp4 on CPUs alone; int4 on CUDA too."""
    for form in ("int8", "fp8", "nvfp4"):
        bundle = Bundle(tmp_path, {"quant": {"format": form}}, "")
        reason = executor.unavailable_reason(bundle, "ort-cuda")
        assert reason == f"ONNX Runtime has no product of {form} on CUDA"
    bundle = Bundle(tmp_path, {"quant": {"format": "int4"}}, "")
    assert "product" not in str(executor.unavailable_reason(bundle, "ort-cuda"))
