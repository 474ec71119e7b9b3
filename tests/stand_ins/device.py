"""A device and plans without a GPU: what the executor of plans is tested on.

`HostDevice` has the methods of runtime.cuda.device.Device on memory of the process; a "plan" is the
ONNX graph that a plan would be built from, run by ONNX Runtime on the very addresses that are
bound.
"""

import copy
import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.directory import Bundle, open_bundle
from runtime.trt.launch_schedule import plan_key
from tests.cases.executor_inputs import SIZES as SIZES
from tests.cases.executor_inputs import inputs as inputs
from tests.stand_ins import kernels as hostkernels

TARGET = "trt-rtx-portable"
PROFILES = {"batch": [1, 1, 4], "image_tokens": [4, 16, 64], "text_tokens": [4, 16, 16]}


class HostDevice:
    """Host memory; work is done when it is queued, or kept while recording."""

    def __init__(self) -> None:
        self.stream = 7
        self.memory: dict[int, np.ndarray] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.uploads = 0
        self.capability = 90

    def malloc(self, size: int) -> int:
        array = np.full(size + 256, 0xAB, np.uint8)  # what is read unwritten will show
        address = -(-array.ctypes.data // 256) * 256
        self.memory[address] = array
        return address

    def free(self, address: int) -> None:
        self.memory.pop(address)[:] = 0xCD

    def upload(self, address: int, array: np.ndarray) -> None:
        self.uploads += 1
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def move(self, target: int, source: int, size: int) -> None:
        self.queue(lambda: ctypes.memmove(target, source, size))

    def queue(self, work: Callable[[], object]) -> None:
        work() if self.recording is None else self.recording.append(work)

    def load_kernel(self, cubin: bytes, entry: str, shared: int) -> bytes:
        assert json.loads(cubin)["kernel"] == entry and shared >= 0
        return cubin

    def launch(
        self,
        function: bytes,
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        values: list[tuple[int, str]],
    ) -> None:
        """The kernel in numpy (tests/stand_ins/kernels.py); types must be those it was compiled
        for."""
        kinds = [kind for _, kind in json.loads(function)["kinds"]]
        assert [kind for _, kind in values][: len(kinds)] == kinds and block % 32 == 0
        assert all(value % 16 == 0 for value, kind in values if kind[0] == "*")
        numbers = [value for value, _ in values]
        self.queue(lambda: hostkernels.run(function, grid, numbers))

    def begin_capture(self) -> None:
        self.recording = []

    def end_capture(self) -> list[Callable[[], None]]:
        graph, self.recording = self.recording, None
        return graph or []

    def replay(self, graph: list[Callable[[], None]]) -> None:
        for work in graph:
            work()

    def discard(self, graph: list[Callable[[], None]]) -> None:
        graph.clear()


class HostContext:
    """What the executor uses of an execution context, with ONNX Runtime behind it."""

    def __init__(self, path: str, device: HostDevice) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.device = device
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 + sum(sum(shape) for shape in self.shapes.values())

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.device.stream and self.memory in self.device.memory
        shapes, addresses = dict(self.shapes), dict(self.addresses)

        def work() -> None:
            feed = {}
            for value in self.session.get_inputs():
                shape = shapes.get(value.name, value.shape)
                dtype = {"tensor(float)": "f4", "tensor(int64)": "i8"}[value.type]
                feed[value.name] = view(addresses[value.name], shape, dtype).copy()
            names = [value.name for value in self.session.get_outputs()]
            for name, array in zip(names, self.session.run(names, feed), strict=True):
                view(addresses[name], array.shape, array.dtype)[...] = array

        self.device.queue(work)
        return True


def view(address: int, shape: Any, dtype: Any) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


def bundle_with_plans(source: Path, root: Path) -> Bundle:
    """A copy of a bundle with "plans" for every block graph, fused and with the portable body."""
    import onnx

    from export.plans.build import load_graph, tensors

    shutil.copytree(source, root)
    opened = open_bundle(root, controlnet=None)
    row: dict[str, Any] = {
        "api": "tensorrt_rtx",
        "version": "1.7.1.116",
        "compute_capabilities": [],
        "dtype": "float32",
        "profiles": PROFILES,
        "files": {},
        "tensors": {},
    }
    for component, record in opened.manifest["components"].items():
        for kind, entry in record["types"].items():
            for key, graph in entry["graphs"].items():
                name = plan_key(component, kind, key)
                model = load_graph(root / graph, tokens=16)
                row["files"][name] = f"plans/{TARGET}/{name}.plan"
                row["tensors"][name] = tensors(model)
                (root / row["files"][name]).parent.mkdir(parents=True, exist_ok=True)
                onnx.save(model, str(root / row["files"][name]))
    manifest = copy.deepcopy(opened.manifest)
    manifest["plans"] = {TARGET: row}
    manifest["files"] |= {path: {} for path in row["files"].values()}
    return Bundle(root, manifest, opened.digest)
