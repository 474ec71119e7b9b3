"""What is used of a CUDA device: memory, copies, one stream, graphs. No other file calls CUDA.

Through cuda-bindings (no torch; its import takes 0.1 s). An executor takes such an object as an
argument, so that its tests run on host memory.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from runtime.files.extras import need


class Device:
    """The current CUDA device with one stream of its own. Methods raise OSError."""

    def __init__(self) -> None:
        self.cuda = bindings()
        self.capability = capability(self.cuda)
        # Not synchronised with the legacy default stream, as TensorRT recommends.
        flags = self.cuda.cudaStreamNonBlocking
        made = self.cuda.cudaStreamCreateWithFlags(flags)
        self.stream = int(self.check("making a stream", *made))

    def malloc(self, size: int) -> int:
        """Address of `size` new bytes, a multiple of 256."""
        error, address = self.cuda.cudaMalloc(max(size, 1))
        if int(error) == int(self.cuda.cudaError_t.cudaErrorMemoryAllocation):
            free = self.check("reading the free memory", *self.cuda.cudaMemGetInfo())[0]
            raise OSError(
                f"the GPU has {free >> 20} MiB free, expected {size >> 20} MiB more; generate"
                " smaller images or fewer at once, or use --backend ort."
            )
        return int(self.check("allocating memory", error, address))

    def free(self, address: int) -> None:
        """Give back memory from `malloc`, after everything queued has run."""
        self.synchronize()
        self.check("freeing memory", *self.cuda.cudaFree(address))

    def pinned(self, size: int) -> np.ndarray:
        """`size` bytes of host memory that stay where they are, so that copies need no detour."""
        pointer = self.check("pinning memory", *self.cuda.cudaHostAlloc(max(size, 1), 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(pointer)))

    def unpin(self, array: np.ndarray) -> None:
        """Give back memory from `pinned`, after everything queued has run."""
        self.synchronize()
        self.check("freeing memory", *self.cuda.cudaFreeHost(array.ctypes.data))

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a C-contiguous array to the device; it may be changed once this returns."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.copy("uploading", address, array.ctypes.data, array.nbytes, kind)

    def download(self, address: int, array: np.ndarray) -> None:
        """Fill a C-contiguous array from the device, after everything queued has run."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.copy("downloading", array.ctypes.data, address, array.nbytes, kind)

    def move(self, target: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes from one place of the device to another."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        done = self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream)
        self.check("copying on the GPU", *done)

    def copy(self, what: str, target: int, source: int, size: int, kind: Any) -> None:
        """A copy on the stream, waited for: host memory is pageable and belongs to numpy."""
        done = self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream)
        self.check(what, *done)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.check("waiting for the GPU", *self.cuda.cudaStreamSynchronize(self.stream))

    def begin_capture(self) -> None:
        """Record what is queued from now on instead of running it."""
        mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.check("recording a CUDA graph", *self.cuda.cudaStreamBeginCapture(self.stream, mode))

    def end_capture(self) -> Any:
        """What was recorded, ready for `replay`."""
        graph = self.check("recording a CUDA graph", *self.cuda.cudaStreamEndCapture(self.stream))
        ready = self.check("building a CUDA graph", *self.cuda.cudaGraphInstantiate(graph, 0))
        self.check("building a CUDA graph", *self.cuda.cudaGraphDestroy(graph))
        return ready

    def replay(self, graph: Any) -> None:
        """Queue a recorded graph."""
        self.check("running a CUDA graph", *self.cuda.cudaGraphLaunch(graph, self.stream))

    def discard(self, graph: Any) -> None:
        """Give a recorded graph back."""
        self.check("freeing a CUDA graph", *self.cuda.cudaGraphExecDestroy(graph))

    def load_kernel(self, cubin: bytes, entry: str, shared: int) -> Any:
        """A function of a cubin, allowed `shared` bytes of dynamic shared memory a program."""
        cuda = driver()
        limit = self.cuda.cudaDeviceAttr.cudaDevAttrMaxSharedMemoryPerBlockOptin
        device = self.check("reading the current GPU", *self.cuda.cudaGetDevice())
        have = self.check(
            "reading the shared memory", *self.cuda.cudaDeviceGetAttribute(limit, device)
        )
        if shared > have:
            raise OSError(
                f"kernel {entry} takes {shared} bytes of shared memory, expected at most {have} on"
                " this GPU; build the kernels for its own compute capability."
            )
        what = f"loading kernel {entry}"
        module = self.check(what, *cuda.cuModuleLoadData(cubin))
        function = self.check(what, *cuda.cuModuleGetFunction(module, entry.encode()))
        attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.check(what, *cuda.cuFuncSetAttribute(function, attribute, shared))
        return function

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        values: list[tuple[int, str]],
    ) -> None:
        """Queue a kernel; `values` in order, each with its type: "i32", or a pointer "*..."."""
        numbers = tuple(value for value, _ in values)
        kinds = tuple(ctypes.c_int32 if kind == "i32" else ctypes.c_void_p for _, kind in values)
        done = driver().cuLaunchKernel(
            function, *grid, block, 1, 1, shared, self.stream, (numbers, kinds), 0
        )
        self.check("starting a kernel", *done)

    def check(self, what: str, error: Any, *values: Any) -> Any:
        """The value of a CUDA call, the values where there are several."""
        if int(error):
            raise OSError(f"{what} failed with CUDA error {int(error)} ({text(self.cuda, error)}).")
        return values[0] if len(values) == 1 else values


def bindings() -> Any:
    """The module cuda.bindings.runtime; ImportError says what installs it."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise ImportError(need("trt-rtx", "running on a GPU needs cuda-bindings")) from None
    return runtime


def driver() -> Any:
    """The module cuda.bindings.driver: cubins are loaded and launched through the driver."""
    from cuda.bindings import driver

    return driver


def capability(cuda: Any) -> int:
    """Compute capability of the current device, 89 for 8.9; OSError where there is none."""
    error, count = cuda.cudaGetDeviceCount()
    if int(error) or not count:
        reason = text(cuda, error) if int(error) else "the driver shows no device"
        raise OSError(
            "running on a GPU needs an NVIDIA one with its driver, which this machine does"
            f" not have ({reason}); use --backend ort."
        )
    error, device = cuda.cudaGetDevice()
    numbers = []
    for part in ("Major", "Minor"):
        attribute = getattr(cuda.cudaDeviceAttr, f"cudaDevAttrComputeCapability{part}")
        error, value = cuda.cudaDeviceGetAttribute(attribute, device)
        if int(error):
            raise OSError(f"reading the GPU's compute capability failed ({text(cuda, error)}).")
        numbers.append(int(value))
    return 10 * numbers[0] + numbers[1]


def text(cuda: Any, error: Any) -> str:
    """CUDA's own words for an error, of the runtime or of the driver."""
    if type(error).__name__ == "CUresult":
        _, words = driver().cuGetErrorString(error)
    else:
        _, words = cuda.cudaGetErrorString(error)
    return words.decode() if isinstance(words, bytes) else str(words)
