"""TensorRT and TensorRT-RTX: a component as launches of compiled plans, weights bound by prefix.

Every plan is loaded once and serves all blocks of its type; weights go to the device once; each
block's list of (tensor, address) is made once and handed over at each launch (setting some 30
addresses takes microseconds; an execution context per block would compile its kernels per block).
All launches go to one stream, nothing in between waits for the host.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.cubins import Cubins
from runtime.device import Device, bindings, capability
from runtime.executor import check_inputs, graph_key
from runtime.experts import ExpertsContext, experts_of
from runtime.loader import Loader
from runtime.memory import Memory, cast, numpy_dtype
from runtime.schedule import (
    Buffer,
    Launch,
    Schedule,
    check_profiles,
    make_schedule,
    one_call,
    plan_key,
    sizes_of,
)
from runtime.targets import choose_target

if TYPE_CHECKING:
    from runtime.bundle import Bundle

log = logging.getLogger("runtime")


def open_component(
    bundle: Bundle, component: str, *, threads: int | None = None, experts: str = "auto"
) -> Plans:
    """An executor on TensorRT proper (backend "trt"); `threads` has no meaning here."""
    return open_plans(bundle, component, "tensorrt", experts)


def open_component_rtx(
    bundle: Bundle, component: str, *, threads: int | None = None, experts: str = "auto"
) -> Plans:
    """An executor on TensorRT-RTX (backend "trt-rtx"); `threads` has no meaning here."""
    return open_plans(bundle, component, "tensorrt_rtx", experts)


def open_plans(bundle: Bundle, component: str, api: str, experts: str = "auto") -> Plans:
    """Check library, release, driver and GPU against the manifest, in this order; then load.

    `experts`: whole blocks ("plans"), or kernels between their segments ("cubins"), or "auto".
    Raises ImportError, ValueError or OSError with one sentence that names the cure.
    """
    try:
        trt = importlib.import_module(api)
    except ImportError as error:
        extra = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}[api]
        raise ImportError(
            f"running plans needs {api} ({error}); install it with: pip install 'd2m[{extra}]'"
        ) from None
    choose_target(bundle, api, trt.__version__)
    sm = capability(bindings())
    target = choose_target(bundle, api, trt.__version__, sm)
    log.info("%s: plans %s on a GPU of compute capability %s", component, target, sm)
    device = shared_device()
    kernels = experts_of(bundle, component, target, sm, experts)
    cubins = {folder: Cubins(opened, device) for folder, opened in kernels.items()}
    return Plans(bundle, component, target, device, Loader(trt), cubins=cubins)


@functools.lru_cache(maxsize=1)
def shared_device() -> Device:
    """One device object, and so one stream, for all components of a process."""
    return Device()


@dataclass
class Ready:
    """A schedule with its addresses: per launch the context and (tensor, address) pairs."""

    schedule: Schedule
    sizes: tuple[tuple[str, int], ...]
    bindings: list[tuple[Launch, Any, list[tuple[str, int]]]]
    runs: int = 0
    graph: Any = field(default=None, repr=False)


class Plans:
    """A component of a bundle on a device; see runtime.executor.Executor.

    `device` is runtime.device.Device or an object with its methods, `load(path)` gives a plan's
    execution context (see Loader): both are arguments, so that all else runs without a GPU. With
    `cubins` (by their directory in the bundle), sparse blocks run as segments with these kernels
    between them, else as whole plans.
    With `graphs`, what has run once is recorded as a CUDA graph and replayed from then on.
    """

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        target: str,
        device: Any,
        load: Callable[[str], Any],
        *,
        cubins: Mapping[str, Cubins] | None = None,
        graphs: bool = False,
    ) -> None:
        self.bundle, self.name, self.target = bundle, component, target
        self.component = bundle.component(component)
        self.plans: Mapping[str, Any] = bundle.manifest["plans"][target]
        self.device, self.load, self.cubins, self.graphs = device, load, cubins, graphs
        self.segments: Mapping[str, Any] = self.plans.get("segments", {}) if cubins else {}
        self.default = bundle.manifest.get("top_k")
        self._contexts: dict[str, Any] = {}
        self._shapes: dict[str, tuple[Any, ...]] = {}
        self._ready: dict[tuple[Any, ...], Ready] = {}
        # A weak reference: a cycle would keep the memory until the garbage collector runs.
        me = weakref.ref(self)
        self.memory = Memory(device, bundle.weights(component), lambda region: forget(me(), region))
        self._lock = threading.Lock()

    def __call__(
        self, inputs: Mapping[str, np.ndarray], top_k: int | None = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name; `top_k` None means the bundle's default."""
        check_inputs(self.component, inputs)
        with self._lock:
            return self.feed(self.component, inputs, top_k, ())

    def block(
        self, kind: str, prefix: str, inputs: Mapping[str, np.ndarray], top_k: int | None = None
    ) -> dict[str, np.ndarray]:
        """One block alone, fed with given tensors (parity compares blocks one by one so)."""
        k = self.default if top_k is None else top_k
        key = plan_key(self.name, kind, graph_key(self.component["types"][kind], k))
        rows = self.plans["tensors"][key]
        single = one_call(self.component, kind, prefix, rows)
        with self._lock:
            return self.feed(single, inputs, top_k, (kind, prefix))

    def feed(
        self,
        component: Mapping[str, Any],
        inputs: Mapping[str, np.ndarray],
        top_k: int | None,
        place: tuple[str, ...],
    ) -> dict[str, np.ndarray]:
        """Upload, launch, download."""
        sizes = sizes_of(component, inputs)
        k = self.default if top_k is None else top_k
        ready = self.prepare(component, sizes, k, place)
        base = self.memory.regions["arena"][0]
        for name, buffer in ready.schedule.inputs.items():
            self.device.upload(base + buffer.offset, cast(inputs[name], buffer.dtype))
        self.run(ready)
        outputs = {}
        for name, buffer in ready.schedule.outputs.items():
            array = np.empty(buffer.shape, numpy_dtype(buffer.dtype))
            self.device.download(base + buffer.offset, array)
            wanted = component["outputs"][name]["dtype"]
            outputs[name] = cast(array, wanted)
        return outputs

    def prepare(
        self,
        component: Mapping[str, Any],
        sizes: Mapping[str, int],
        top_k: int | None,
        place: tuple[str, ...] = (),
    ) -> Ready:
        """The schedule for these sizes with weights, contexts and addresses; made once."""
        key = (tuple(sorted(sizes.items())), top_k, place)
        if key in self._ready:
            return self._ready[key]
        check_profiles(self.target, self.name, self.plans, sizes)
        schedule = make_schedule(self.name, component, self.plans, sizes, top_k, self.segments)
        self.memory.upload_weights(
            (name, weight_dtype(self.plans, launch.plan, tensor))
            for launch in schedule.launches
            for tensor, name in launch.weights.items()
        )
        base = self.memory.reserve("arena", schedule.arena)
        ready = Ready(schedule, key[0], [])
        for launch in schedule.launches:
            if launch.plan not in self._contexts:
                self._contexts[launch.plan] = self.open(launch.plan)
            buffers: dict[str, Buffer] = {**launch.inputs, **launch.outputs}
            pairs = [(tensor, base + buffer.offset) for tensor, buffer in buffers.items()]
            for tensor, name in launch.weights.items():
                dtype = weight_dtype(self.plans, launch.plan, tensor)
                pairs.append((tensor, self.memory.weights[name, dtype]))
            ready.bindings.append((launch, self._contexts[launch.plan], pairs))
        self._ready[key] = ready
        return ready

    def open(self, plan: str) -> Any:
        """What launches a plan, or the experts' kernels."""
        if plan in self.plans["files"]:
            return self.load(str(self.bundle.file(self.plans["files"][plan])))
        assert self.cubins is not None, plan  # only segments name such launches
        row = self.plans["experts"][plan]
        tensors = self.plans["tensors"][plan]
        return ExpertsContext(self.cubins[row["kernels"]], tensors, row["top_k"])

    def run(self, ready: Ready) -> None:
        """Queue every launch, or replay their recording."""
        if any(self._shapes.get(launch.plan) != ready.sizes for launch, _, _ in ready.bindings):
            self.reshape(ready)
        if ready.graph is not None:
            self.device.replay(ready.graph)
            return
        record = self.graphs and ready.runs > 0  # the first run compiles and allocates
        if record:
            self.device.begin_capture()
        for launch, context, pairs in ready.bindings:
            for tensor, address in pairs:
                context.set_tensor_address(tensor, address)
            if not context.execute_async_v3(self.device.stream):
                raise OSError(
                    f"plan {launch.plan} of {self.target} did not start (the library's log says"
                    f" why); use --backend ort, or build the plans again."
                )
        ready.runs += 1
        if record:
            ready.graph = self.device.end_capture()
            self.device.replay(ready.graph)

    def reshape(self, ready: Ready) -> None:
        """Tell plans the shapes of their inputs; give them all the same working memory.

        They run one after the other on one stream, so the largest need is enough for all.
        """
        plans = {launch.plan: (launch, context) for launch, context, _ in ready.bindings}
        need = 0
        for launch, context in plans.values():
            for tensor, buffer in launch.inputs.items():
                if not context.set_input_shape(tensor, buffer.shape):
                    raise ValueError(
                        f"plan {launch.plan} of {self.target} refuses {tensor} of shape"
                        f" {list(buffer.shape)}, expected one inside its profile; export again."
                    )
            need = max(need, context.update_device_memory_size_for_shapes())
        address = self.memory.reserve("scratch", need)
        for plan, (_, context) in plans.items():
            context.set_device_memory(address, self.memory.regions["scratch"][1])
            self._shapes[plan] = ready.sizes


def forget(executor: Plans | None, region: str) -> None:
    """A region has moved: drop addresses made from the old one, and recordings of them."""
    if executor is None:
        return
    for ready in executor._ready.values():
        if ready.graph is not None:
            executor.device.discard(ready.graph)
            ready.graph = None
    if region == "arena":
        executor._ready.clear()
    executor._shapes.clear()


def weight_dtype(plans: Mapping[str, Any], plan: str, tensor: str) -> str:
    """The dtype in which a plan reads one of its weights (a router's may be wider)."""
    for row in plans["tensors"][plan]["inputs"]:
        if row["name"] == tensor:
            return str(row["dtype"])
    raise KeyError(f"{plan} has no input {tensor}")  # a launch names inputs of its plan only
