"""Backends, and the interpreter of block programs that all of them share.

An executor runs one component: `executor(inputs, top_k, kappa) -> outputs`, dicts of numpy arrays
by the names that the manifest gives. Inside, a component is a program: a list of calls of block
types. Every backend compiles a type once and is called once per block with that block's weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from runtime.bundle.block_groups import per_sample
from runtime.bundle.control_record import ADD
from runtime.bundle.trial import try_foreign
from runtime.files.extras import need
from runtime.files.tensors import numpy_dtype
from runtime.program.backends import BACKENDS, CUDA_LIBRARIES, GPU_BACKENDS, MODULES, PLAN_BACKENDS
from runtime.program.residuals import TENSOR

if TYPE_CHECKING:
    import numpy as np

    from runtime.bundle.block_groups import Runs, Starts
    from runtime.bundle.directory import Bundle
    from runtime.lora.placement import Adapters
    from runtime.program.residuals import Added, Residuals
    from runtime.program.step_cache import StepCache

log = logging.getLogger("runtime")
Value = TypeVar("Value")


class Rows(Protocol[Value]):
    """How a backend takes some samples' rows of a value, and puts results back in their places."""

    def take(self, value: Value, chosen: np.ndarray) -> Value:
        """The rows `chosen`, in their order."""

    def put(self, value: Value, part: Value, chosen: np.ndarray) -> Value:
        """`value` with `part` in the rows `chosen`."""


class Executor(Protocol):
    """Runs one component of a bundle."""

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        top_k: int | None = None,
        kappa: int | None = None,
        starts: Starts | None = None,
        cache: StepCache | None = None,
        residuals: Residuals | None = None,
    ) -> dict[str, np.ndarray]:
        """Outputs by name; None of `top_k` and `kappa` means the bundle's default.

        `starts`: what groups chose before the first step (runtime.program.block_forecast); their
        routers are not run again. `cache`: the generation's, which may leave blocks out.
        `residuals`: what ControlNets add in this step.
        """


class Adaptable(Executor, Protocol):
    """One whose weights LoRAs may change between calls."""

    def adapt(self, adapters: Adapters | None) -> None:
        """Weights are with these adapters from the next call on; None: as they are stored."""


def choose_backend(
    bundle: Bundle, backend: str = "auto", offload: str | None = None
) -> tuple[str, str]:
    """The backend to use and why. Cheap: no GPU library is imported for it.

    Raises ValueError for a backend that does not exist, ImportError where its library is
    missing. "auto" takes a GPU backend only where its library is installed, the driver shows a
    device and, for TensorRT, the bundle has plans for it and no block is to be streamed.
    """
    if backend == "auto":
        reasons: list[str] = []
        for name in GPU_BACKENDS:
            reason = unavailable_reason(bundle, name)
            if offload == "block" and name in PLAN_BACKENDS:
                reason = "it streams no blocks"
            if reason is None:
                return name, "; ".join([*reasons, f"{name}: what it needs is there"])
            reasons.append(f"not {name}: {reason}")
        return "ort", "; ".join(reasons)
    if backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"the backend is {backend!r}, expected one of {known}.")
    module, extra = MODULES[backend]
    if missing := missing_library(backend):
        raise ImportError(need(extra, f"backend {backend!r} needs {module}; {missing}"))
    return backend, "requested"


def unavailable_reason(bundle: Bundle, backend: str) -> str | None:
    """Why a GPU backend cannot be used here, as far as that is known without importing it."""
    module, _ = MODULES[backend]
    plans = bundle.manifest.get("plans", {})
    if backend in PLAN_BACKENDS and not any(plan["api"] == module for plan in plans.values()):
        return "the bundle has no plans for it"
    form = bundle.manifest.get("quant", {}).get("format", "int4")
    if backend == "ort-cuda" and form != "int4":  # whose operator both of its providers have
        return f"ONNX Runtime has no product of {form} on CUDA"
    if missing := missing_library(backend):
        return missing
    if not gpu_count():
        return "no GPU is visible"
    return None


def missing_library(backend: str) -> str | None:
    """What is missing of a backend's library, looked for without importing it."""
    module, _ = MODULES[backend]
    spec = importlib.util.find_spec(module)
    if spec is None:
        return f"{module} is not installed"
    if backend == "ort-cuda":
        folders = [Path(folder, "capi") for folder in spec.submodule_search_locations or ()]
        if not any((folder / name).is_file() for folder in folders for name in CUDA_LIBRARIES):
            return "this onnxruntime has no CUDA provider"
    return None


def gpu_count() -> int:
    """CUDA devices that the driver shows, 0 where there is no driver (read through ctypes)."""
    import ctypes

    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value


def batch_limit(bundle: Bundle, backend: str) -> int:
    """The largest batch that a backend's plans were built for."""
    plans = bundle.manifest.get("plans", {}).values()
    module, _ = MODULES[backend]
    profiles = [plan.get("profiles", {}).get("batch") for plan in plans if plan["api"] == module]
    return min((int(profile[2]) for profile in profiles if profile), default=1 << 16)


def open_component(
    bundle: Bundle, component: str, backend: str, *, threads: int | None = None, **options: Any
) -> Executor:
    """The executor of one component on a backend that `choose_backend` named.

    Graphs of a foreign bundle are tried first, in a process of its own (runtime.bundle.trial).
    """
    if backend not in PLAN_BACKENDS:
        try_foreign(bundle, backend, threads, options)
    module, _, factory = BACKENDS[backend].partition(":")
    make = getattr(importlib.import_module(module), factory)
    executor: Executor = make(bundle, component, threads=threads, **options)
    return executor


def graph_key(kind: Mapping[str, Any], top_k: int | None) -> str:
    """Which of a block type's graphs to run: "" where it has one, else the number of experts."""
    if "" in kind["graphs"]:
        return ""
    key = str(top_k)
    if key not in kind["graphs"]:
        known = ", ".join(sorted(kind["graphs"], key=int))
        raise ValueError(
            f"top_k is {top_k}, expected one of {known}, which this bundle was exported with;"
            " export again with --top-k to have others."
        )
    return key


def run_program(
    component: Mapping[str, Any],
    env: Mapping[str, Value],
    top_k: int | None,
    call: Callable[[int, str, str, str, list[Value]], list[Value]],
    *,
    begin: int = 0,
    end: int | None = None,
    runs: Runs | None = None,
    rows: Rows[Value] | None = None,
    added: Added | None = None,
) -> dict[str, Value]:
    """Run a component's program; returns the whole environment, the component's outputs in it.

    `env` names the component's inputs. `call(index, kind, key, prefix, inputs)` runs one block:
    its index in the program, type, graph key, weight prefix and inputs in the type's order; it
    returns the outputs in the type's order. Values may be of any kind: arrays, OrtValues,
    device buffers. A new value under an old name replaces it, as hidden_states from block to block.

    With `begin` and `end` the calls between them alone. A call in `runs` is made with its samples'
    rows, which `rows` takes from and puts back into values, or left out where none chose it.
    After a call, made or left out, the values that `added` names for it are added to TENSOR in
    every row, by calls of the type ADD.
    """
    values = dict(env)
    for index, step in enumerate(component["program"][begin:end], begin):
        kind = component["types"][step["type"]]
        chosen = runs.get(index) if runs else None
        if chosen is None or len(chosen):
            names, written = kind["inputs"], step.get("outputs", kind["outputs"])
            inputs = [values[name] for name in names]
            if chosen is not None:
                assert rows is not None, "a choice of samples needs a way to take them"
                inputs = [
                    rows.take(value, chosen) if per_sample(component, name) else value
                    for name, value in zip(names, inputs)
                ]
            outputs = call(index, step["type"], graph_key(kind, top_k), step["prefix"], inputs)
            if chosen is not None and rows is not None:
                old = (values[name] for name in written)
                outputs = [rows.put(*pair, chosen) for pair in zip(old, outputs, strict=True)]
            values.update(zip(written, outputs, strict=True))
        for name in added.get(index, ()) if added else ():
            (values[TENSOR],) = call(-1, ADD, "", "", [values[TENSOR], values[name]])
    return values


def check_inputs(component: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> None:
    """Names, dtypes and shapes against the manifest; symbolic dimensions must agree."""
    expected = component["inputs"]
    if set(inputs) != set(expected):
        raise ValueError(f"the inputs are {sorted(inputs)}, expected {sorted(expected)}.")
    sizes: dict[str, int] = {}
    for name, row in expected.items():
        array = inputs[name]
        fits = len(array.shape) == len(row["shape"]) and all(
            size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            for size, dim in zip(array.shape, row["shape"], strict=True)
        )
        dtype = numpy_dtype(row["dtype"])
        if not fits or array.dtype.name != dtype:
            raise ValueError(
                f"input {name!r} is {array.dtype.name} {list(array.shape)},"
                f" expected {dtype} {row['shape']}."
            )
