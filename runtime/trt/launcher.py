"""Launches of plans with everything bound: contexts, addresses, shapes, working memory, recordings.

Weights go to the device once; each launch's list of (tensor, address) is made once and handed over
every time (setting some 30 addresses takes microseconds; an execution context per block would
compile its kernels per block).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.trt.launch_schedule import LaunchSchedule
from runtime.trt.launches import Copy, Launch

if TYPE_CHECKING:
    from runtime.cuda.arena import Buffer
    from runtime.cuda.memory import Memory


@dataclass
class BoundSchedule:
    """A launch schedule with its addresses: per launch the context and (tensor, address) pairs.

    `copies` of rows before a launch, by its index (and after the last): (target, source, bytes);
    `scratch` bytes of working memory are enough for every launch. `fixed_shapes`: no plan changes
    its shapes from launch to launch.
    """

    schedule: LaunchSchedule
    bindings: list[tuple[Launch, Any, list[tuple[str, int]]]] = field(default_factory=list)
    copies: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    scratch: int = 0
    fixed_shapes: bool = True
    runs: int = 0
    graph: Any = field(default=None, repr=False)


class Launcher:
    """One execution context per plan, and the shapes that it was given last.

    `graphs`: what has run once is recorded as a CUDA graph and replayed from then on. `target`
    names the plans in errors.
    """

    def __init__(self, device: Any, memory: Memory, target: str, *, graphs: bool = False) -> None:
        self.device, self.memory, self.target, self.graphs = device, memory, target, graphs
        self.contexts: dict[str, Any] = {}
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def bind(
        self,
        schedule: LaunchSchedule,
        tensors: Mapping[str, Any],
        load: Callable[[str], Any],
        *,
        keep: bool = False,
    ) -> BoundSchedule:
        """A schedule with weights uploaded, contexts loaded and addresses worked out.

        `tensors` are the manifest's of every plan; `load(plan)` gives its context; `keep`: what
        lies in the arena is still needed.
        """
        launches = [launch for launch in schedule.launches if isinstance(launch, Launch)]
        self.memory.upload_weights(
            (name, weight_dtype(tensors, launch.plan, tensor))
            for launch in launches
            for tensor, name in launch.weights.items()
        )
        base = self.memory.reserve("arena", schedule.arena, keep=keep)
        bound = BoundSchedule(schedule)
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for launch in schedule.launches:
            if isinstance(launch, Copy):
                bound.copies.setdefault(len(bound.bindings), []).extend(launch.moves(base))
                continue
            if launch.plan not in self.contexts:
                self.contexts[launch.plan] = load(launch.plan)
            context = self.contexts[launch.plan]
            if shapes.get(launch.plan) != shapes_of(launch):
                bound.fixed_shapes = bound.fixed_shapes and launch.plan not in shapes
                shapes[launch.plan] = shapes_of(launch)
                bound.scratch = max(bound.scratch, self.set_shapes(launch, context))
            buffers: dict[str, Buffer] = {**launch.inputs, **launch.outputs}
            pairs = [(tensor, base + buffer.offset) for tensor, buffer in buffers.items()]
            for tensor, name in launch.weights.items():
                dtype = weight_dtype(tensors, launch.plan, tensor)
                pairs.append((tensor, self.memory.weights[name, dtype]))
            bound.bindings.append((launch, context, pairs))
        return bound

    def run(self, bound: BoundSchedule) -> None:
        """Queue every launch, or replay their recording."""
        # Plans run one after the other on one stream, so the largest need is enough for all.
        scratch = self.memory.reserve("scratch", bound.scratch)
        if bound.graph is not None:
            self.device.replay(bound.graph)
            return
        # The first run compiles and allocates; a plan of two shapes would do so in every run.
        record = self.graphs and bound.runs > 0 and bound.fixed_shapes
        if record:
            for launch, context, _ in bound.bindings:
                self.prepare(launch, context, scratch)
            self.device.begin_capture()
        for index, (launch, context, pairs) in enumerate(bound.bindings):
            self.copy(bound.copies.get(index, ()))
            self.prepare(launch, context, scratch)
            for tensor, address in pairs:
                context.set_tensor_address(tensor, address)
            if not context.execute_async_v3(self.device.stream):
                raise OSError(
                    f"plan {launch.plan} of {self.target} did not start (the library's log says"
                    " why); use --backend ort, or build the plans again."
                )
        self.copy(bound.copies.get(len(bound.bindings), ()))
        bound.runs += 1
        if record:
            bound.graph = self.device.end_capture()
            self.device.replay(bound.graph)

    def copy(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Queue copies of rows: (target, source, bytes)."""
        for target, source, size in copies:
            self.device.move(target, source, size)

    def prepare(self, launch: Launch, context: Any, scratch: int) -> None:
        """Give a plan the shapes of a launch, and its working memory, unless it has them."""
        if self.shapes.get(launch.plan) != shapes_of(launch):
            self.set_shapes(launch, context)
            context.set_device_memory(scratch, self.memory.regions["scratch"][1])
            self.shapes[launch.plan] = shapes_of(launch)

    def set_shapes(self, launch: Launch, context: Any) -> int:
        """Give a plan the shapes of its inputs; the bytes of working memory that it then needs."""
        self.shapes.pop(launch.plan, None)
        for tensor, shape in shapes_of(launch).items():
            if not context.set_input_shape(tensor, shape):
                raise ValueError(
                    f"plan {launch.plan} of {self.target} refuses {tensor} of shape {list(shape)},"
                    " expected one inside its profile; export again."
                )
        return int(context.update_device_memory_size_for_shapes())


def shapes_of(launch: Launch) -> dict[str, tuple[int, ...]]:
    """The shape of every input of a launch but its weights."""
    return {tensor: buffer.shape for tensor, buffer in launch.inputs.items()}


def weight_dtype(tensors: Mapping[str, Any], plan: str, tensor: str) -> str:
    """The dtype in which a plan reads one of its weights (a router's may be wider)."""
    rows = tensors[plan]["inputs"]
    return next(str(row["dtype"]) for row in rows if row["name"] == tensor)
