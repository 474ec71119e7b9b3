"""Where ONNX Runtime computes: in the process's memory (CPU), or on a CUDA device.

Blocks are bound by address, weights and values alike, so that what runs them (runtime.ort.blocks)
makes no difference: a Place makes values (OrtValues), fetches them, moves rows of them, and holds
weights. Its Room is memory for one block's weights at a time, at an address that stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.cuda.arena import ALIGN
from runtime.cuda.memory import Memory
from runtime.files.tensors import numpy_dtype
from runtime.lora.placement import Adapted
from runtime.ort.sessions import CPU

if TYPE_CHECKING:
    import onnxruntime

CUDA = "CUDAExecutionProvider"
# ONNX's numbers of element types.
ELEMENTS = {
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "float64": 11, "bfloat16": 16, "float8_e4m3fn": 17,
}  # fmt: skip
NAMES = {number: name for name, number in ELEMENTS.items()}


class Host:
    """The process's memory. Weights stored as they are computed with stay mapped from the file."""

    kind = "cpu"

    def __init__(self) -> None:
        self.providers: list[Any] = [CPU]
        self.weights: dict[tuple[str, str], np.ndarray] = {}

    def value(self, array: np.ndarray, dtype: str) -> onnxruntime.OrtValue:
        """A value on the array's own memory, which it keeps alive; bfloat16 as its bits, uint16."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def fetch(self, value: Any) -> np.ndarray:
        """A value's numbers, bfloat16 as uint16; a copy, since a later call would overwrite it."""
        array: np.ndarray = value.numpy().copy()
        return array

    def take(self, value: Any, chosen: np.ndarray) -> Any:
        """See runtime.program.executor.Rows."""
        return self.value(value.numpy()[chosen], "")

    def put(self, value: Any, part: Any, chosen: np.ndarray) -> Any:
        """See runtime.program.executor.Rows."""
        whole = self.fetch(value)
        whole[chosen] = part.numpy()
        return self.value(whole, "")

    def keep(self, tensors: Adapted, wanted: Iterable[tuple[str, str]]) -> list[int]:
        """Addresses of weights (name, dtype) that are held from now on, each of them once."""
        addresses = []
        for name, dtype in wanted:
            if (name, dtype) not in self.weights:
                self.weights[name, dtype] = np.ascontiguousarray(tensors.array(name, dtype))
            addresses.append(int(self.weights[name, dtype].ctypes.data))
        return addresses

    def renew(self, tensors: Adapted, names: Iterable[str]) -> None:
        """The weights `names` have changed: they are made anew when they are next asked for."""
        stale = set(names)
        self.weights = {key: held for key, held in self.weights.items() if key[0] not in stale}

    def room(self, size: int) -> HostRoom:
        """Room for `size` bytes."""
        return HostRoom(size)


class HostRoom:
    """Weights are written to `host` (uint8), where they are read."""

    def __init__(self, size: int) -> None:
        memory = np.empty(size + ALIGN, np.uint8)
        skip = -memory.ctypes.data % ALIGN
        self.host = memory[skip : skip + size]
        self.address = int(self.host.ctypes.data)

    def send(self, used: int) -> None:
        """Make the first `used` bytes of `host` those at `address`."""


class Cuda:
    """A CUDA device's memory; copies go through `device`, a runtime.cuda.device.Device.

    `copier` is another, whose stream fills rooms while blocks run. Not run on a GPU so far: `kind`
    and `providers` are arguments, so that all of it but the provider itself is tested on a CPU.
    """

    def __init__(
        self, device: Any, copier: Any = None, kind: str = "cuda", providers: Any = None
    ) -> None:
        self.device, self.copier, self.kind = device, copier or device, kind
        # Convolutions are chosen without timing them, matmuls do not round to TF32: the same
        # inputs give the same bits.
        options = {"device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        self.providers = [(CUDA, options), CPU] if providers is None else providers
        self.memory: Memory | None = None

    def value(self, array: np.ndarray, dtype: str) -> onnxruntime.OrtValue:
        """See Host."""
        value = self.empty(array.shape, ELEMENTS[dtype])
        self.device.upload(value.data_ptr(), np.ascontiguousarray(array))
        return value

    def empty(self, shape: Iterable[int], element: int) -> onnxruntime.OrtValue:
        """A value on the device, not written yet."""
        import onnxruntime

        # 0 and up: the index of the device that is current, which is the only one ORT is given.
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), element, self.kind, 0)

    def fetch(self, value: Any) -> np.ndarray:
        """See Host."""
        array = np.empty(value.shape(), numpy_dtype(NAMES[value.element_type()]))
        self.device.download(value.data_ptr(), array)
        return array

    def take(self, value: Any, chosen: np.ndarray) -> Any:
        """See runtime.program.executor.Rows; the rows are copied on the device."""
        shape = value.shape()
        part = self.empty([len(chosen), *shape[1:]], value.element_type())
        size = value.tensor_size_in_bytes() // shape[0]
        for index, row in enumerate(chosen.tolist()):
            self.device.move(part.data_ptr() + index * size, value.data_ptr() + row * size, size)
        self.device.synchronize()  # ONNX Runtime has streams of its own
        return part

    def put(self, value: Any, part: Any, chosen: np.ndarray) -> Any:
        """See runtime.program.executor.Rows; the rows are copied on the device."""
        whole = self.empty(value.shape(), value.element_type())
        total = value.tensor_size_in_bytes()
        size = total // value.shape()[0]
        self.device.move(whole.data_ptr(), value.data_ptr(), total)
        for index, row in enumerate(chosen.tolist()):
            self.device.move(whole.data_ptr() + row * size, part.data_ptr() + index * size, size)
        self.device.synchronize()
        return whole

    def keep(self, tensors: Adapted, wanted: Iterable[tuple[str, str]]) -> list[int]:
        """See Host; from the mapped file to the device, cast on the way where they must be."""
        if self.memory is None:
            self.memory = Memory(self.device, tensors, lambda region: None)
        named = list(wanted)
        self.memory.upload_weights(named)
        return [self.memory.weights[key] for key in named]

    def renew(self, tensors: Adapted, names: Iterable[str]) -> None:
        """See Host; they change where they are."""
        if self.memory is not None:
            self.memory.renew(tensors, names)

    def room(self, size: int) -> CudaRoom:
        """See Host."""
        return CudaRoom(self.copier, size)


class CudaRoom:
    """Device memory, and pinned host memory from which it is filled at the bus's full speed."""

    def __init__(self, device: Any, size: int) -> None:
        self.device = device
        self.host: np.ndarray = device.pinned(size)
        self.address = int(device.malloc(size))

    def __del__(self) -> None:
        self.device.free(self.address)
        self.device.unpin(self.host)

    def send(self, used: int) -> None:
        """See HostRoom; waited for, by the thread that loads."""
        self.device.upload(self.address, self.host[:used])


Place = Host | Cuda
Room = HostRoom | CudaRoom
