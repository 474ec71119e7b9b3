"""Blocks of a component in ONNX Runtime: a session per block type and top_k, weights as inputs.

The program is run by the interpreter that all backends share (runtime.program.executor).
Everything is bound by address: a block's weights where runtime.ort.block_weights says, the values
between blocks where the blocks left them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle.block_groups import first_calls, rows_by_call, sections
from runtime.bundle.control_record import ADD
from runtime.files.tensors import cast
from runtime.ort.block_weights import HeldWeights, StreamedWeights, Weights
from runtime.ort.memory_places import ELEMENTS, NAMES, Host, Place
from runtime.ort.sessions import check_session, errors_of, open_session
from runtime.program.backends import check_offload
from runtime.program.executor import check_inputs, graph_key, run_program
from runtime.program.residuals import TENSOR

if TYPE_CHECKING:
    import onnxruntime

    from runtime.bundle.block_groups import Runs, Starts
    from runtime.bundle.directory import Bundle
    from runtime.lora.placement import Adapters
    from runtime.program.residuals import Residuals
    from runtime.program.step_cache import StepCache


class Blocks:
    """See runtime.program.executor.Executor. `place` is where it computes, None for the CPU.

    `share`: another executor of the component, whose place, weights and lock are taken.
    """

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        threads: int,
        place: Place | None = None,
        offload: str | None = None,
        share: Blocks | None = None,
    ) -> None:
        self.bundle, self.threads = bundle, threads
        self.component = bundle.component(component)
        self.default, self.kappa = bundle.manifest.get("top_k"), bundle.manifest.get("kappa")
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._bound: dict[tuple[str, str, Any], Bound] = {}
        self.place: Place = share.place if share else place or Host()
        self.streamed: bool = share.streamed if share else check_offload(offload) == "block"
        self.arena = not self.streamed  # of memory that stays with the sessions
        source = StreamedWeights if self.streamed else HeldWeights
        tensors = bundle.weights(component)
        self.weights: Weights = (
            share.weights if share else source(self.component, tensors, self.place)
        )
        # A binding holds one call's tensors, and streamed weights come for one call at a time.
        self._lock: threading.Lock = share._lock if share else threading.Lock()

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        top_k: int | None = None,
        kappa: int | None = None,
        starts: Starts | None = None,
        cache: StepCache | None = None,
        residuals: Residuals | None = None,
    ) -> dict[str, np.ndarray]:
        """See runtime.program.executor.Executor."""
        found = self.locked(inputs, top_k, kappa, starts, cache, residuals)
        return {name: self.place.fetch(value) for name, value in found.items()}

    def values(self, inputs: Mapping[str, np.ndarray], slot: int = 0) -> dict[str, Any]:
        """See runtime.program.residuals.Adder: OrtValues, of new memory each time."""
        return self.locked(inputs, None, None, None)

    def add(self, inputs: list[Any]) -> list[Any]:
        """See runtime.program.residuals.Adder."""
        key = (ADD, "", "")
        with self._lock:
            block = self._bound[key] = self._bound.get(key) or self.bind(ADD, "", [])
            return self.launch(block, self.component["types"][ADD], inputs, ADD)

    def locked(
        self, inputs: Mapping[str, np.ndarray], *knobs: Any
    ) -> dict[str, onnxruntime.OrtValue]:
        """The component's outputs; one call at a time."""
        check_inputs(self.component, inputs)
        with self._lock:
            try:
                return self.run(inputs, *knobs)
            except BaseException:
                self.weights.forget()
                raise

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        top_k: int | None,
        kappa: int | None,
        starts: Starts | None,
        cache: StepCache | None = None,
        residuals: Residuals | None = None,
    ) -> dict[str, onnxruntime.OrtValue]:
        """The program section by section; the lock is held."""
        rows = self.component["inputs"]
        env = {name: self.place.value(array, rows[name]["dtype"]) for name, array in inputs.items()}
        top_k = self.default if top_k is None else top_k
        kappa = self.kappa if kappa is None else kappa
        starts, call = dict(starts or {}), self.call
        if residuals is not None:
            env, call = env | dict(residuals.values), residuals.calls(call)
        for begin, end, group in sections(
            self.component, kappa, starts, cache.cuts if cache else ()
        ):
            runs: Runs = rows_by_call(self.component, starts, kappa)
            if cache is None or cache.wants(begin, end):
                runs = cache.restrict(runs, begin, end) if cache else runs
                self.weights.expect(self.coming(begin, end, group, runs))
                bounds: dict[str, Any] = {"begin": begin, "end": end, "runs": runs}
                bounds |= {"rows": self.place, "added": residuals.added if residuals else None}
                env = run_program(self.component, env, top_k, call, **bounds)
                if group is not None and kappa is not None:
                    logits = self.run_router(self.component["groups"][group], env)
                    starts[group] = first_calls(logits, kappa)
            if cache is not None and cache.due(end):
                value = env[TENSOR]
                changed = cache.reach(self.place.fetch(value))
                if changed is not None:
                    env[TENSOR] = self.place.value(changed, NAMES[value.element_type()])
        return {name: env[name] for name in self.component["outputs"]}

    def adapt(self, adapters: Adapters | None) -> None:
        """See runtime.program.executor.Adaptable."""
        with self._lock:
            self.weights.adapt(adapters)

    def run_router(self, group: Mapping[str, Any], env: Mapping[str, Any]) -> np.ndarray:
        """The logits of a group's router, [B, m]."""
        inputs = [env[name] for name in self.component["types"][group["type"]]["inputs"]]
        (logits,) = self.call(-1, group["type"], "", group["prefix"], inputs)
        return self.place.fetch(logits)

    def coming(self, begin: int, end: int, group: str | None, runs: Runs) -> list[tuple[str, str]]:
        """What a section calls: the blocks that a sample has chosen, then the router at its end."""
        program = self.component["program"]
        called = [program[i] for i in range(begin, end) if i not in runs or len(runs[i])]
        if group is not None:
            called.append(self.component["groups"][group])
        return [(row["type"], row["prefix"]) for row in called]

    def block(
        self, kind: str, prefix: str, inputs: Mapping[str, np.ndarray], top_k: int | None = None
    ) -> dict[str, np.ndarray]:
        """One block alone, on given tensors, cast to what its graph reads (parity compares so)."""
        row = self.component["types"][kind]
        key = graph_key(row, self.default if top_k is None else top_k)
        with self._lock:
            try:
                self.weights.expect([(kind, prefix)])
                types = input_types(self.session(row["graphs"][key]))
                values = [
                    self.place.value(cast(inputs[name], types[name]), types[name])
                    for name in row["inputs"]
                ]
                outputs = self.call(-1, kind, key, prefix, values)
            except BaseException:
                self.weights.forget()
                raise
            return dict(zip(row["outputs"], map(self.place.fetch, outputs), strict=True))

    def call(
        self, index: int, kind: str, key: str, prefix: str, inputs: list[Any]
    ) -> list[onnxruntime.OrtValue]:
        """run_program's callback: OrtValues in, OrtValues out."""
        row = self.component["types"][kind]
        where, addresses = self.weights.take((kind, prefix))
        found = self._bound.get((kind, key, where))
        block = found if found and found.addresses == addresses else self.bind(kind, key, addresses)
        self._bound[kind, key, where] = block
        outputs = self.launch(block, row, inputs, prefix or kind)
        self.weights.release(where)
        return outputs

    def launch(
        self, block: Bound, row: Mapping[str, Any], inputs: list[Any], name: str
    ) -> list[onnxruntime.OrtValue]:
        """Run a bound block on OrtValues; `row`: its type."""
        for position, tensor in enumerate(row["inputs"]):
            if block.values[position] is not inputs[position]:  # rope and temb are bound already
                block.binding.bind_ortvalue_input(tensor, inputs[position])
                block.values[position] = inputs[position]
        # New outputs each time, or those of the call before would be overwritten.
        for output in block.outputs:
            block.binding.bind_output(output, self.place.kind)
        with errors_of(self.bundle, f"block {name}"):
            block.session.run_with_iobinding(block.binding)
        outputs: list[onnxruntime.OrtValue] = block.binding.get_outputs()
        if self.streamed:  # few rooms: a binding would hold its outputs until the next step
            block.binding.clear_binding_outputs()
        return outputs

    def session(self, graph: str) -> onnxruntime.InferenceSession:
        """The session of a block graph, opened once."""
        if graph not in self._sessions:
            options: dict[str, Any] = {"fully": len(self.component["program"]) == 1}
            options |= {"providers": self.place.providers, "arena": self.arena}
            extra = self.extra_outputs(graph)
            self._sessions[graph] = open_session(
                self.bundle, graph, self.threads, **options, extra=extra
            )
        return self._sessions[graph]

    def extra_outputs(self, graph: str) -> bytes:
        """What gives a graph more outputs when it is opened (runtime.ort.router_outputs): none."""
        return b""

    def expected(self, kind: str, graph: str) -> Mapping[str, Any]:
        """The inputs and outputs that a type's graph must have."""
        row: Mapping[str, Any] = self.component["types"][kind]
        return row

    def bind(self, kind: str, key: str, addresses: list[int]) -> Bound:
        """Bind weights to a block's graph; they stay bound from step to step."""
        row = self.component["types"][kind]
        graph = row["graphs"][key]
        session = self.session(graph)
        check_session(self.bundle, graph, session, self.expected(kind, graph), row["weights"])
        binding = session.io_binding()
        for (local, weight), address in zip(row["weights"].items(), addresses, strict=True):
            element, shape = ELEMENTS[weight["dtype"]], weight["shape"]
            binding.bind_input(local, self.place.kind, 0, element, shape, address)
        # By position: a graph cannot read and write one name, so its outputs have others.
        outputs = [output.name for output in session.get_outputs()]
        return Bound(session, binding, outputs, [None] * len(row["inputs"]), addresses)


@dataclass
class Bound:
    """A block ready to run: its session, its weights in a binding, what was bound last."""

    session: onnxruntime.InferenceSession
    binding: onnxruntime.IOBinding
    outputs: list[str]
    values: list[Any]
    addresses: list[int]  # of the weights


def input_types(session: onnxruntime.InferenceSession) -> dict[str, str]:
    """Input of a graph -> the manifest's name of its dtype."""
    names = {"tensor(float)": "float32", "tensor(double)": "float64"}
    return {
        value.name: names.get(value.type, value.type.removeprefix("tensor(").removesuffix(")"))
        for value in session.get_inputs()
    }
