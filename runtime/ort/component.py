"""ONNX Runtime: a component as one graph, or block by block with weights as inputs.

"graph" runs <component>.onnx, whose weights ONNX Runtime maps from the safetensors file itself;
it packs and folds them, once. "blocks" makes one session per block type and number of experts
and binds each block's weights to it: the same program that a GPU backend runs. The graph has the
default number of experts compiled in, holds its weights packed and runs every step whole; any other
top_k, step caching, LoRAs and ControlNets are run by blocks, opened at the first such call.
(Composing a graph per top_k would need onnx in the runtime and hold the weights once per k; block
sessions hold no weights, so all of them share one set.)

Measured (one core; transformers of 18 blocks at width 128, of 3 at width 1024): graphs step 10 to
20 % faster than blocks, for their weights are packed beforehand; blocks open in .1 s, graphs of
18 blocks in .6 s with basic optimisations and 1.0 s with all, which step no faster: programs of
several calls get the basic ones. The VAE gets all of them (12 against 17 ms for 8 images).

With offload "block" a program of several calls is run by blocks, whose weights are streamed
(runtime.ort.block_weights). On CUDA everything is run by blocks: the weights are on the device
once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.ort.blocks import Blocks
from runtime.ort.memory_places import Cuda
from runtime.ort.sessions import check_session, errors_of, open_session
from runtime.program.backends import check_offload
from runtime.program.executor import check_inputs
from runtime.program.threads import thread_count

if TYPE_CHECKING:
    from runtime.bundle.block_groups import Starts
    from runtime.bundle.directory import Bundle
    from runtime.lora.placement import Adapters
    from runtime.program.executor import Executor
    from runtime.program.residuals import Residuals
    from runtime.program.step_cache import StepCache

log = logging.getLogger("runtime")
MODES = ("graph", "blocks")


def open_component(
    bundle: Bundle,
    component: str,
    *,
    threads: int | None = None,
    mode: str | None = None,
    offload: str | None = None,
) -> Executor:
    """An executor on the CPU; `mode` "graph" or "blocks" (see above), None: the faster one.

    `offload` "block" streams the weights of a program of several calls.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"the mode is {mode!r}, expected 'graph' or 'blocks'.")
    compute = bundle.manifest["compute_dtype"]
    if compute == "bfloat16":
        raise ValueError(
            f"bundle {bundle.path} computes in bfloat16, which ONNX Runtime cannot do on a CPU;"
            " export it with --dtype fp32 (weights stay bfloat16 on disk)."
        )
    row = bundle.component(component)
    count = thread_count(threads, bundle.manifest["files"][row["weights"]]["size"])
    streamed = check_offload(offload) == "block" and len(row["program"]) > 1
    if streamed and mode == "graph":
        raise ValueError(
            "the mode is 'graph' but offload is 'block', which streams blocks, expected mode"
            " 'blocks' or None."
        )
    if streamed or mode == "blocks":
        return Blocks(bundle, component, count, offload="block" if streamed else None)
    return Graph(bundle, component, count, arena=offload != "block")


def open_component_cuda(
    bundle: Bundle,
    component: str,
    *,
    threads: int | None = None,
    mode: str | None = None,
    offload: str | None = None,
) -> Executor:
    """An executor on onnxruntime-gpu's CUDA provider, in float32, float16 or bfloat16.

    Raises ImportError, OSError or ValueError with one sentence.
    """
    from runtime.cuda.device import Device, bindings, capability

    if mode == "graph":
        raise ValueError("the mode is 'graph' but the backend is ort-cuda, expected 'blocks'.")
    streamed = check_offload(offload) == "block" and len(bundle.component(component)["program"]) > 1
    log.info("%s: CUDA on a GPU of compute capability %s", component, capability(bindings()))
    preload()
    place = Cuda(Device(), Device() if streamed else None)
    count = thread_count(threads)  # for the few operators that stay on the CPU
    return Blocks(bundle, component, count, place, "block" if streamed else None)


def preload() -> None:
    """Let ONNX Runtime find CUDA's libraries in Python packages; what it prints goes to the log."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            onnxruntime.preload_dlls()
        if printed.getvalue():
            log.info("ONNX Runtime: %s", " ".join(printed.getvalue().split())[:300])


class Graph:
    """<component>.onnx in one session; other top_k, caching, LoRAs, ControlNets through Blocks."""

    def __init__(self, bundle: Bundle, component: str, threads: int, *, arena: bool = True) -> None:
        self.bundle, self.name, self.threads = bundle, component, threads
        self.component = bundle.component(component)
        graph, single = self.component["onnx"], len(self.component["program"]) == 1
        self.session = open_session(bundle, graph, threads, fully=single, arena=arena)
        check_session(bundle, graph, self.session, self.component)
        self.default = bundle.manifest.get("top_k")
        keyed = any("" not in kind["graphs"] for kind in self.component["types"].values())
        self.routed = keyed and self.default is not None
        self.grouped = bool(self.component.get("groups"))
        self._blocks: Blocks | None = None
        self.adapted = False  # by LoRAs, which its own packed weights have not
        self._lock = threading.Lock()

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        top_k: int | None = None,
        kappa: int | None = None,
        starts: Starts | None = None,
        cache: StepCache | None = None,
        residuals: Residuals | None = None,
    ) -> dict[str, np.ndarray]:
        """See runtime.program.executor.Executor; `starts` is ignored: the graph has its routers."""
        other = self.routed and top_k is not None and top_k != self.default
        if other or self.adapted or cache is not None or residuals is not None:
            return self.blocks()(inputs, top_k, kappa, starts, cache, residuals)
        check_inputs(self.component, inputs)
        feed = dict(inputs)
        if kappa is not None and self.grouped:
            feed["kappa"] = np.array(kappa, np.int64)
        names = list(self.component["outputs"])
        with errors_of(self.bundle, self.component["onnx"]):
            return dict(zip(names, self.session.run(names, feed), strict=True))

    def adapt(self, adapters: Adapters | None) -> None:
        """See runtime.program.executor.Adaptable."""
        if adapters is not None or self._blocks is not None:
            self.blocks().adapt(adapters)
        self.adapted = adapters is not None

    def values(self, inputs: Mapping[str, np.ndarray], slot: int = 0) -> dict[str, Any]:
        """See runtime.program.residuals.Adder."""
        place = self.blocks().place
        return {name: place.value(array, "") for name, array in self(inputs).items()}

    def add(self, inputs: list[Any]) -> list[Any]:
        """See runtime.program.residuals.Adder."""
        return self.blocks().add(inputs)

    def blocks(self) -> Blocks:
        """The same component block by block, opened once."""
        with self._lock:
            if self._blocks is None:
                self._blocks = Blocks(self.bundle, self.name, self.threads)
            return self._blocks
