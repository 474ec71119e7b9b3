"""TensorRT and TensorRT-RTX: a component as launches of compiled plans, weights bound by prefix.

Every plan is loaded once and serves all blocks of its type. All launches go to one stream
(runtime.trt.launcher). Nothing in between waits for the host, but for one small download per group
of blocks whose router reads the image: what was not chosen is not launched.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle.block_groups import Runs, Starts, first_calls, rows_by_call, sections
from runtime.bundle.control_record import ADD, COMPONENT
from runtime.cuda.arena import Buffer, aligned
from runtime.cuda.device import Device, bindings, capability
from runtime.cuda.memory import Memory
from runtime.files.extras import need
from runtime.files.tensors import cast, numpy_dtype
from runtime.lora.placement import Adapted, Adapters
from runtime.program.executor import check_inputs, graph_key
from runtime.program.residuals import TENSOR, Added
from runtime.trt.expert_kernels import Cubins
from runtime.trt.experts import ExpertsContext, experts_of
from runtime.trt.launch_schedule import (
    check_profiles,
    make_launch_schedule,
    one_call,
    plan_key,
    sizes_of,
)
from runtime.trt.launcher import BoundSchedule, Launcher
from runtime.trt.launches import Section
from runtime.trt.plan_choice import choose_target
from runtime.trt.plan_loader import Loader

if TYPE_CHECKING:
    from runtime.bundle.directory import Bundle
    from runtime.program.residuals import Residuals
    from runtime.program.step_cache import StepCache

log = logging.getLogger("runtime")


def open_plans(
    bundle: Bundle, component: str, api: str, *, threads: int | None = None, experts: str = "auto"
) -> Plans:
    """Check library, release, driver and GPU against the manifest, in this order; then load.

    `api` "tensorrt" or "tensorrt_rtx"; `threads` has no meaning here; `experts`: whole blocks
    ("plans"), or kernels between their segments ("cubins"), or "auto". Raises ImportError,
    ValueError or OSError with one sentence that names the cure.
    """
    try:
        trt = importlib.import_module(api)
    except ImportError as error:
        extra = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}[api]
        raise ImportError(need(extra, f"running plans needs {api}", error)) from None
    choose_target(bundle, api, trt.__version__)
    sm = capability(bindings())
    target = choose_target(bundle, api, trt.__version__, sm)
    log.info("%s: plans %s on a GPU of compute capability %s", component, target, sm)
    device = shared_device()
    kernels = experts_of(bundle, component, target, sm, experts)
    cubins = {folder: Cubins(opened, device) for folder, opened in kernels.items()}
    return Plans(bundle, component, target, device, Loader(trt), cubins=cubins)


def open_component(bundle: Bundle, component: str, **options: Any) -> Plans:
    """An executor on TensorRT proper (backend "trt")."""
    return open_plans(bundle, component, "tensorrt", **options)


def open_component_rtx(bundle: Bundle, component: str, **options: Any) -> Plans:
    """An executor on TensorRT-RTX (backend "trt-rtx")."""
    return open_plans(bundle, component, "tensorrt_rtx", **options)


@functools.lru_cache(maxsize=1)
def shared_device() -> Device:
    """One device object, and so one stream, for all components of a process."""
    return Device()


@dataclass(frozen=True)
class DeviceValue:
    """A tensor in a device's memory, the memory of another executor."""

    address: int
    shape: tuple[int, ...]
    dtype: str


MAX_READY = 256  # launch schedules; every choice of blocks is one, a hundred kilobytes at most


class Plans:
    """A component of a bundle on a device; see runtime.program.executor.Executor.

    `device` is runtime.cuda.device.Device or an object with its methods, `load(data, path)` gives a
    plan's execution context (see Loader): both are arguments, so that all else runs without a GPU.
    With `cubins` (by their directory in the bundle), sparse blocks run as segments with these
    kernels between them, else as whole plans.
    With `graphs`, what has run once is recorded as a CUDA graph and replayed from then on.
    """

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        target: str,
        device: Any,
        load: Callable[[bytes, str], Any],
        *,
        cubins: Mapping[str, Cubins] | None = None,
        graphs: bool = False,
    ) -> None:
        self.bundle, self.name, self.target = bundle, component, target
        self.component = bundle.component(component)
        self.plans: Mapping[str, Any] = bundle.manifest["plans"][target]
        self.device, self.load, self.cubins = device, load, cubins
        self.segments: Mapping[str, Any] = self.plans.get("segments", {}) if cubins else {}
        self.default, self.kappa = bundle.manifest.get("top_k"), bundle.manifest.get("kappa")
        self._ready: dict[tuple[Any, ...], BoundSchedule] = {}
        # A weak reference: a cycle would keep the memory until the garbage collector runs.
        me = weakref.ref(self)
        self.tensors = Adapted(bundle.weights(component))
        self.memory = Memory(device, self.tensors, lambda region: drop_addresses(me(), region))
        self.launcher = Launcher(device, self.memory, target, graphs=graphs)
        self._lock = threading.Lock()
        self._adder: Any = None  # the executor of the ControlNet whose plan adds residuals

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        top_k: int | None = None,
        kappa: int | None = None,
        starts: Starts | None = None,
        cache: StepCache | None = None,
        residuals: Residuals | None = None,
    ) -> dict[str, np.ndarray]:
        """See runtime.program.executor.Executor; with all groups in `starts` no step waits for the
        host."""
        check_inputs(self.component, inputs)
        kappa = self.kappa if kappa is None else kappa
        with self._lock:
            return self.run(self.component, inputs, top_k, (), kappa, starts, cache, residuals)

    def values(self, inputs: Mapping[str, np.ndarray], slot: int = 0) -> dict[str, DeviceValue]:
        """See runtime.program.residuals.Adder; outputs are moved to a region of the slot's own."""
        check_inputs(self.component, inputs)
        with self._lock:
            outputs = self.launched(self.component, inputs, None, ())
            arena, region = self.memory.regions["arena"][0], f"values {slot}"
            sizes = [aligned(buffer.size) for buffer in outputs.values()]
            address, found = self.memory.reserve(region, sum(sizes)), {}
            for (name, buffer), size in zip(outputs.items(), sizes):
                self.device.move(address, arena + buffer.offset, buffer.size)
                found[name] = DeviceValue(address, buffer.shape, buffer.dtype)
                address += size
        return found

    def add(self, inputs: list[Any]) -> list[Any]:
        """See runtime.program.residuals.Adder."""
        raise NotImplementedError("plans are launched by the transformer's executor")

    def adapt(self, adapters: Adapters | None) -> None:
        """See runtime.program.executor.Adaptable; weights change where they are on the device."""
        with self._lock:
            before, self.tensors = self.tensors, Adapted(self.tensors.base, adapters)
            self.memory.renew(self.tensors, before.changed | self.tensors.changed)

    def block(
        self, kind: str, prefix: str, inputs: Mapping[str, np.ndarray], top_k: int | None = None
    ) -> dict[str, np.ndarray]:
        """One block alone, on given tensors (parity compares blocks one by one so)."""
        k = self.default if top_k is None else top_k
        key = plan_key(self.name, kind, graph_key(self.component["types"][kind], k))
        single = one_call(self.component, kind, prefix, self.plans["tensors"][key])
        with self._lock:
            return self.run(single, inputs, top_k, (kind, prefix))

    def run(
        self,
        component: Mapping[str, Any],
        inputs: Mapping[str, np.ndarray],
        top_k: int | None,
        block: tuple[str, ...],
        kappa: int | None = None,
        starts: Starts | None = None,
        cache: StepCache | None = None,
        residuals: Residuals | None = None,
    ) -> dict[str, np.ndarray]:
        """Upload, launch section by section, download; `block`: (type, prefix) of one run alone."""
        found = self.launched(component, inputs, top_k, block, kappa, starts, cache, residuals)
        return {
            name: cast(self.fetch(buffer), component["outputs"][name]["dtype"])
            for name, buffer in found.items()
        }

    def launched(
        self,
        component: Mapping[str, Any],
        inputs: Mapping[str, Any],
        top_k: int | None,
        block: tuple[str, ...],
        kappa: int | None = None,
        starts: Starts | None = None,
        cache: StepCache | None = None,
        residuals: Residuals | None = None,
    ) -> Mapping[str, Buffer]:
        """As `run`, but outputs stay in the arena."""
        sizes = sizes_of(component, inputs)
        top_k = self.default if top_k is None else top_k
        starts, env, added = dict(starts or {}), None, None
        if residuals is not None:
            self._adder, added = residuals.adder, residuals.added
            component = with_residuals(component, residuals)
            inputs = {**inputs, **residuals.values}
        for begin, end, group in sections(component, kappa, starts, cache.cuts if cache else ()):
            if cache is None or cache.wants(begin, end):
                chosen: Runs = rows_by_call(component, starts, kappa)
                chosen = cache.restrict(chosen, begin, end) if cache else chosen
                runs = {call: rows for call, rows in chosen.items() if begin <= call < end}
                router = None if group is None else component["groups"][group]
                section = Section(begin, end, runs, env, router)
                bound = self.prepare(component, sizes, top_k, block, section, added)
                for name, buffer in bound.schedule.inputs.items():
                    self.bring(inputs[name], buffer)
                self.launcher.run(bound)
                env = bound.schedule.env
                # What the router at the section's end chose decides which launches come next.
                if group is not None and kappa is not None and bound.schedule.logits is not None:
                    starts[group] = first_calls(self.fetch(bound.schedule.logits), kappa)
            if cache is not None and cache.due(end):
                buffer = bound.schedule.env[TENSOR]
                changed = cache.reach(self.fetch(buffer))
                if changed is not None:
                    base = self.memory.regions["arena"][0]
                    self.device.upload(base + buffer.offset, changed)
        return bound.schedule.outputs

    def bring(self, value: Any, buffer: Buffer) -> None:
        """An input into the arena: from the host, or from another executor's memory."""
        address = self.memory.regions["arena"][0] + buffer.offset
        if not isinstance(value, DeviceValue):
            self.device.upload(address, cast(value, buffer.dtype))
        elif value.dtype == buffer.dtype:
            self.device.move(address, value.address, buffer.size)
        else:
            raise ValueError(
                f"the ControlNet's plans compute in {value.dtype}, the transformer's in"
                f" {buffer.dtype}, expected the same; export the ControlNet with --plan-dtype."
            )

    def fetch(self, buffer: Buffer) -> np.ndarray:
        """A tensor of the arena, after everything queued has run."""
        array = np.empty(buffer.shape, numpy_dtype(buffer.dtype))
        self.device.download(self.memory.regions["arena"][0] + buffer.offset, array)
        return array

    def prepare(
        self,
        component: Mapping[str, Any],
        sizes: Mapping[str, int],
        top_k: int | None,
        block: tuple[str, ...] = (),
        section: Section | None = None,
        added: Added | None = None,
    ) -> BoundSchedule:
        """The launch schedule for these sizes with weights, contexts and addresses; made once."""
        section = section or Section()
        places = tuple((call, *names) for call, names in sorted((added or {}).items()))
        key = (tuple(sorted(sizes.items())), top_k, block, section.key, places)
        if key in self._ready:
            self._ready[key] = self._ready.pop(key)  # the newest is last
            return self._ready[key]
        check_profiles(self.target, self.name, self.plans, sizes)
        plans = self.plans
        if added:
            row = self._adder.plans["tensors"][f"{COMPONENT}/{ADD}"]
            plans = {**plans, "tensors": {**plans["tensors"], f"{self.name}/{ADD}": row}}
        options: dict[str, Any] = {"section": section, "added": added}
        schedule = make_launch_schedule(
            self.name, component, plans, sizes, top_k, self.segments, **options
        )
        # What the sections before have left in the arena is read further on.
        keep = section.env is not None
        bound = self.launcher.bind(schedule, self.plans["tensors"], self.open, keep=keep)
        while len(self._ready) >= MAX_READY:
            oldest = self._ready.pop(next(iter(self._ready)))
            if oldest.graph is not None:
                self.device.discard(oldest.graph)
        self._ready[key] = bound
        return bound

    def open(self, plan: str) -> Any:
        """What launches a plan, or the experts' kernels."""
        if plan in self.plans["files"]:
            file = self.plans["files"][plan]
            return self.load(self.bundle.read(file), str(self.bundle.file(file)))
        if plan == f"{self.name}/{ADD}":
            return self._adder.open(f"{COMPONENT}/{ADD}")
        assert self.cubins is not None, plan  # only segments name such launches
        row, tensors = self.plans["experts"][plan], self.plans["tensors"][plan]
        return ExpertsContext(self.cubins[row["kernels"]], tensors, row["top_k"])


def drop_addresses(executor: Plans | None, region: str) -> None:
    """A region has moved: drop addresses made from the old one, and recordings of them."""
    if executor is None:
        return
    for bound in executor._ready.values():
        if bound.graph is not None:
            executor.device.discard(bound.graph)
            bound.graph = None
    if region == "arena":
        executor._ready.clear()
    executor.launcher.shapes.clear()


def with_residuals(component: Mapping[str, Any], residuals: Residuals) -> dict[str, Any]:
    """A component that reads residuals as inputs, and has the type that adds them."""
    shape = ["batch", "image_tokens"]
    read = {
        name: {"dtype": value.dtype, "shape": [*shape, value.shape[-1]]}
        for name, value in residuals.values.items()
    }
    types: Mapping[str, Any] = residuals.adder.component["types"]
    return {
        **component,
        "inputs": {**component["inputs"], **read},
        "types": {**component["types"], ADD: types[ADD]},
    }
