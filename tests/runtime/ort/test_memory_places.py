"""ONNX Runtime on a device's memory: all but CUDA's provider, on host memory under a stand-in.

The provider itself has not run on a GPU; test_on_a_gpu waits for one.
"""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from runtime.bundle.directory import Bundle, open_bundle
from runtime.files.tensors import narrow
from runtime.opened import default_bundle
from runtime.ort import component as ort
from runtime.ort import memory_places as places
from runtime.ort.blocks import Blocks
from runtime.ort.memory_places import Cuda, Host
from runtime.ort.sessions import CPU, check_provider
from runtime.program.executor import gpu_count
from tests.cases.executor_inputs import inputs
from tests.stand_ins.device import HostDevice


class Stand(HostDevice):
    """Host memory with what streaming asks for beside."""

    def __init__(self) -> None:
        super().__init__()
        self.synchronized, self.pins = 0, 0

    def pinned(self, size: int) -> np.ndarray:
        self.pins += 1
        return np.full(size, 0xAB, np.uint8)

    def unpin(self, array: np.ndarray) -> None:
        self.pins -= 1
        array[:] = 0xCD

    def synchronize(self) -> None:
        self.synchronized += 1


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle(default_bundle())


def stood(offload: str | None, bundle: Bundle, component: str = "transformer") -> Any:
    """The executor that ort-cuda has, on a stand-in."""
    device, copier = Stand(), Stand()
    place = Cuda(device, copier, kind="cpu", providers=[CPU])
    return Blocks(bundle, component, 1, place, offload), device, copier


def watched(source: Any) -> list[tuple[str, str]]:
    """The calls whose weights are taken from a source from now on."""
    take, taken = source.take, []

    def watch(call: tuple[str, str]) -> Any:
        taken.append(call)
        return take(call)

    source.take = watch
    return taken


@pytest.mark.parametrize("offload", [None, "block"])
def test_a_device_gives_what_the_host_gives(bundle: Bundle, offload: str | None) -> None:
    given = inputs(bundle, "transformer", batch=3)
    executor, device, copier = stood(offload, bundle)
    taken = watched(executor.weights)
    for top_k in (None, 1):
        expected = Blocks(bundle, "transformer", 1)(given, top_k)
        for _ in range(2):
            for name, array in executor(given, top_k).items():
                np.testing.assert_array_equal(array, expected[name])
    if offload:
        assert len(device.memory) == 0 and len(copier.memory) == copier.pins == 2
        assert copier.uploads == len(taken) >= 4 * 14  # no call without an upload of its own
        kinds = {kind for kind, _ in taken}
        assert kinds == set(executor.component["types"])
    else:
        assert copier.uploads == 0 and device.memory
        weights = len(executor.place.memory.weights)
        assert device.uploads == weights + 4 * len(given)  # each weight once, for both top_k
    del executor
    gc.collect()  # the watched executor is part of a cycle
    assert not device.memory and not copier.memory and not copier.pins


def test_rows_are_taken_and_put_back() -> None:
    rng = np.random.default_rng(0)
    whole, part = rng.standard_normal((2, 4, 3, 5), np.float32)
    device = Stand()
    for place in (Host(), Cuda(device, kind="cpu", providers=[CPU])):
        value = place.value(whole, "float32")
        chosen = np.array([2, 0])
        np.testing.assert_array_equal(place.fetch(place.take(value, chosen)), whole[chosen])
        expected = whole.copy()
        expected[chosen] = part[:2]
        found = place.put(value, place.value(part[:2], "float32"), chosen)
        np.testing.assert_array_equal(place.fetch(found), expected)
        np.testing.assert_array_equal(place.fetch(value), whole)  # not overwritten
    assert device.synchronized == 2


@pytest.mark.parametrize("dtype", list(places.ELEMENTS))
def test_every_dtype_goes_there_and_back(dtype: str) -> None:
    """bfloat16 and FP8 as their bits, which numpy has no name for."""
    place = Cuda(Stand(), kind="cpu", providers=[CPU])
    numbers = np.random.default_rng(1).standard_normal((3, 4)) * 8
    if dtype == "float8_e4m3fn":
        array = numbers.astype(pytest.importorskip("ml_dtypes").float8_e4m3fn)
    else:
        array = narrow(numbers) if dtype == "bfloat16" else numbers.astype(dtype)
    value = place.value(array, dtype)
    assert value.element_type() == places.ELEMENTS[dtype]
    bits = array.view(np.uint8) if dtype == "float8_e4m3fn" else array
    np.testing.assert_array_equal(place.fetch(value), bits)


def test_a_component_in_bfloat16_is_bound_as_such(tmp_path: Path) -> None:
    """Graph inputs, weights and outputs in bfloat16 through bindings: what a bf16 bundle has.

    Of ONNX Runtime's CPU kernels few take bfloat16; Reshape and Concat do.
    """
    onnx = pytest.importorskip("onnx")
    graph = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 20]> g (bfloat16[n, 4] x, bfloat16[2, 4] w)'
        " => (bfloat16[m, 4] out_y) { out_y = Concat <axis = 0> (x, w) }"
    )
    (tmp_path / "g.onnx").write_bytes(graph.SerializeToString())
    weights = narrow(np.random.default_rng(0).standard_normal((2, 4)))
    header = b'{"b.w": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]}}'
    header += b" " * (-len(header) % 8)
    (tmp_path / "w.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + weights.tobytes()
    )
    tensor = {"dtype": "bfloat16", "shape": ["n", 4]}
    kind = {
        "graphs": {"": "g.onnx"},
        "inputs": ["x"],
        "outputs": ["y"],
        "weights": {"w": {"dtype": "bfloat16", "shape": [2, 4]}},
    }
    row = {
        "weights": "w.safetensors",
        "inputs": {"x": tensor},
        "outputs": {"y": {**tensor, "shape": ["m", 4]}},
        "types": {"t": kind},
        "program": [{"type": "t", "prefix": "b."}, {"type": "t", "prefix": "b."}],
    }
    files = {name: {"size": 1} for name in ("g.onnx", "w.safetensors")}
    made = Bundle(tmp_path, {"components": {"c": row}, "files": files}, "")
    x = narrow(np.arange(12.0).reshape(3, 4))
    for offload in (None, "block"):
        executor, *_ = stood(offload, made, "c")
        (found,) = executor({"x": x}).values()
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, np.concatenate([x, weights]))


def test_a_provider_that_does_not_load_is_refused(bundle: Bundle) -> None:
    """ONNX Runtime itself would go over to the CPU without a word."""
    session = onnxruntime.InferenceSession(
        str(bundle.file("vae_decoder.onnx")), providers=["CPUExecutionProvider"]
    )
    check_provider(session, [CPU])
    with pytest.raises(OSError, match=r"on CPUExecutionProvider, expected CUDA.*\[gpu\]"):
        check_provider(session, [(places.CUDA, {}), CPU])


def test_without_a_gpu_it_says_so(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="mode is 'graph' but the backend is ort-cuda"):
        ort.open_component_cuda(bundle, "transformer", mode="graph")
    if not gpu_count():
        with pytest.raises((ImportError, OSError), match="running on a GPU needs"):
            ort.open_component_cuda(bundle, "transformer")


@pytest.mark.gpu
def test_on_a_gpu(bundle: Bundle) -> None:
    """Every component on CUDA's provider against the CPU's, held and streamed."""
    if places.CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider: pip install -e '.[gpu]'")
    for component in bundle.manifest["components"]:
        given = inputs(bundle, component, batch=3, tokens=16)
        expected = Blocks(bundle, component, 1)(given)
        for offload in (None, "block"):
            found = ort.open_component_cuda(bundle, component, offload=offload)(given)
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4)
