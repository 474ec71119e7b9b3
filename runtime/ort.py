"""ONNX Runtime: a component as one graph, or block by block with weights as inputs.

"graph" runs <component>.onnx, whose weights ONNX Runtime maps from the safetensors file itself;
it packs and folds them, once. "blocks" makes one session per block type and number of experts
and binds each block's weights to it: the same program that a GPU backend runs. The graph has the
default number of experts compiled in; any other top_k is served by blocks, opened when first
asked for. (Composing a graph per top_k would need onnx in the runtime and hold the weights once
per k; block sessions hold no weights, so all of them share one set.)

Measured (one core; transformers of 18 blocks at width 128, of 3 at width 1024): graphs step 10 to
20 % faster than blocks, for their weights are packed beforehand; blocks open in .1 s, graphs of
18 blocks in .6 s with basic optimisations and 1.0 s with all, which step no faster: programs of
several calls get the basic ones. The VAE gets all of them (12 against 17 ms for 8 images).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle import broken
from runtime.executor import check_inputs, graph_key, run_program
from runtime.groups import pieces, runs_of_all, starts_of
from runtime.onnxfile import check_onnx
from runtime.threads import thread_count

if TYPE_CHECKING:
    import onnxruntime

    from runtime.bundle import Bundle
    from runtime.executor import Executor
    from runtime.groups import Starts

PROVIDERS = ["CPUExecutionProvider"]
FOLDING_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"
FOLDING_SINCE = (1, 32)  # the oldest release on which the limit was seen to work


def open_component(
    bundle: Bundle, component: str, *, threads: int | None = None, mode: str = "graph"
) -> Executor:
    """An executor on the CPU; `mode` "graph" or "blocks" (see above)."""
    if mode not in ("graph", "blocks"):
        raise ValueError(f"the mode is {mode!r}, expected 'graph' or 'blocks'.")
    compute = bundle.manifest["compute_dtype"]
    if compute == "bfloat16":
        raise ValueError(
            f"bundle {bundle.path} computes in bfloat16, which ONNX Runtime cannot do on a CPU;"
            f" export it with --dtype fp32 (weights stay bfloat16 on disk)."
        )
    weights = bundle.manifest["files"][bundle.component(component)["weights"]]["size"]
    count = thread_count(threads, weights)
    return (Graph if mode == "graph" else Blocks)(bundle, component, count)


class Graph:
    """<component>.onnx in one session; other top_k through Blocks."""

    def __init__(self, bundle: Bundle, component: str, threads: int) -> None:
        self.bundle, self.name, self.threads = bundle, component, threads
        self.component = bundle.component(component)
        single = len(self.component["program"]) == 1
        self.session = open_session(bundle, self.component["onnx"], threads, fully=single)
        check_session(bundle, self.component["onnx"], self.session, self.component)
        self.default = bundle.manifest.get("top_k")
        keyed = any("" not in kind["graphs"] for kind in self.component["types"].values())
        self.routed = keyed and self.default is not None
        self.grouped = bool(self.component.get("groups"))
        self._blocks: Blocks | None = None
        self._lock = threading.Lock()

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        top_k: int | None = None,
        kappa: int | None = None,
        starts: Starts | None = None,
    ) -> dict[str, np.ndarray]:
        """See runtime.executor.Executor. The graph holds its routers: `starts` is not looked at."""
        if self.routed and top_k is not None and top_k != self.default:
            return self.blocks()(inputs, top_k, kappa, starts)
        check_inputs(self.component, inputs)
        feed = dict(inputs)
        if kappa is not None and self.grouped:
            feed["kappa"] = np.array(kappa, np.int64)
        names = list(self.component["outputs"])
        return dict(zip(names, self.session.run(names, feed), strict=True))

    def blocks(self) -> Blocks:
        """The same component block by block, opened once."""
        with self._lock:
            if self._blocks is None:
                self._blocks = Blocks(self.bundle, self.name, self.threads)
            return self._blocks


class Blocks:
    """A session per block type and top_k; weights are cast once and shared by all of them."""

    def __init__(self, bundle: Bundle, component: str, threads: int) -> None:
        self.bundle, self.threads = bundle, threads
        self.component = bundle.component(component)
        self.tensors = bundle.weights(component)
        self.default, self.kappa = bundle.manifest.get("top_k"), bundle.manifest.get("kappa")
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._weights: dict[str, onnxruntime.OrtValue] = {}
        self._bound: dict[tuple[str, str, str], Bound] = {}
        self._lock = threading.Lock()  # a binding holds one call's tensors

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        top_k: int | None = None,
        kappa: int | None = None,
        starts: Starts | None = None,
    ) -> dict[str, np.ndarray]:
        """See runtime.executor.Executor."""
        check_inputs(self.component, inputs)
        with self._lock:
            env = {name: ort_value(array) for name, array in inputs.items()}
            k = self.default if top_k is None else top_k
            kept = self.kappa if kappa is None else kappa
            known = dict(starts or {})
            for begin, end, group in pieces(self.component, kept, known):
                runs = runs_of_all(self.component, known, kept)
                env = run_program(
                    self.component, env, k, self.call, begin=begin, end=end, runs=runs, rows=ROWS
                )
                if group is not None and kept is not None:
                    known[group] = self.ask(self.component["groups"][group], env, kept)
            # numpy() of an output is a view that the next call would overwrite.
            return {name: env[name].numpy().copy() for name in self.component["outputs"]}

    def ask(self, group: Mapping[str, Any], env: Mapping[str, Any], kappa: int) -> np.ndarray:
        """What a group's router chooses, as runtime.groups.starts_of."""
        kind = group["type"]
        inputs = [env[name] for name in self.component["types"][kind]["inputs"]]
        (logits,) = self.call(-1, kind, "", group["prefix"], inputs)
        return starts_of(logits.numpy(), kappa)

    def block(
        self, kind: str, prefix: str, inputs: Mapping[str, np.ndarray], top_k: int | None = None
    ) -> dict[str, np.ndarray]:
        """One block alone, fed with given tensors (parity compares blocks one by one so)."""
        row = self.component["types"][kind]
        key = graph_key(row, self.default if top_k is None else top_k)
        with self._lock:
            values = [ort_value(inputs[name]) for name in row["inputs"]]
            outputs = self.call(-1, kind, key, prefix, values)
            return {
                name: value.numpy().copy()
                for name, value in zip(row["outputs"], outputs, strict=True)
            }

    def call(
        self, index: int, kind: str, key: str, prefix: str, inputs: list[Any]
    ) -> list[onnxruntime.OrtValue]:
        """run_program's callback: OrtValues in, OrtValues out."""
        row = self.component["types"][kind]
        place = (kind, key, prefix)
        if place not in self._bound:
            self._bound[place] = self.bind(kind, key, prefix)
        block = self._bound[place]
        for position, name in enumerate(row["inputs"]):
            if block.values[position] is not inputs[position]:  # rope, temb: bound already
                block.binding.bind_ortvalue_input(name, inputs[position])
                block.values[position] = inputs[position]
        # Anew each time, or the outputs of the call before would be overwritten.
        for name in block.outputs:
            block.binding.bind_output(name, "cpu")
        block.session.run_with_iobinding(block.binding)
        outputs: list[onnxruntime.OrtValue] = block.binding.get_outputs()
        return outputs

    def session(self, graph: str) -> onnxruntime.InferenceSession:
        """The session of a block graph, opened once."""
        if graph not in self._sessions:
            single = len(self.component["program"]) == 1
            self._sessions[graph] = open_session(self.bundle, graph, self.threads, fully=single)
        return self._sessions[graph]

    def bind(self, kind: str, key: str, prefix: str) -> Bound:
        """Bind one block's weights; they stay bound from step to step."""
        row = self.component["types"][kind]
        session = self.session(row["graphs"][key])
        check_session(self.bundle, row["graphs"][key], session, row, row["weights"])
        binding = session.io_binding()
        for local, weight in row["weights"].items():
            name = prefix + local
            if name not in self._weights:
                self._weights[name] = ort_value(self.tensors.array(name, weight["dtype"]))
            binding.bind_ortvalue_input(local, self._weights[name])
        # By position: a graph cannot read and write one name, so its outputs have others.
        outputs = [output.name for output in session.get_outputs()]
        return Bound(session, binding, outputs, [None] * len(row["inputs"]))


@dataclass
class Bound:
    """A block ready to run: its session, its weights in a binding, what else was bound last."""

    session: onnxruntime.InferenceSession
    binding: onnxruntime.IOBinding
    outputs: list[str]
    values: list[Any]


class OrtRows:
    """Rows of OrtValues on the CPU, copied."""

    def take(self, value: Any, chosen: np.ndarray) -> Any:
        """See runtime.executor.Rows."""
        return ort_value(value.numpy()[chosen])

    def put(self, value: Any, part: Any, chosen: np.ndarray) -> Any:
        """See runtime.executor.Rows."""
        whole = value.numpy().copy()
        whole[chosen] = part.numpy()
        return ort_value(whole)


ROWS = OrtRows()


def ort_value(array: np.ndarray) -> onnxruntime.OrtValue:
    """An OrtValue on the array's own memory (kept alive by the value)."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def open_session(
    bundle: Bundle, graph: str, threads: int, *, fully: bool = True
) -> onnxruntime.InferenceSession:
    """A deterministic session on one of the bundle's graphs; `fully`: with all optimisations."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "backend 'ort' needs onnxruntime; install it with: pip install onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors; they are raised as well
    if not fully:
        basic = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.graph_optimization_level = basic
    path = bundle.file(graph)
    disabled = guard(bundle, graph, options, onnxruntime.__version__)
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=PROVIDERS, disabled_optimizers=disabled
        )
    except Exception as error:  # its exceptions share no base class but Exception
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {path} ({text});"
            f" export the bundle again or install the version named in its constraints."
        ) from None


def guard(
    bundle: Bundle, graph: str, options: onnxruntime.SessionOptions, version: str
) -> list[str]:
    """Check a graph as data, and bound what ONNX Runtime may make of it while it opens.

    Releases that know a limit for constants computed beforehand get one (see runtime.folding),
    others compute none. Returns the optimisers to leave out; ValueError for a graph that should
    not be opened.
    """
    folder = PurePosixPath(graph).parent
    beside = {
        PurePosixPath(name).name: row["size"]
        for name, row in bundle.manifest["files"].items()
        if PurePosixPath(name).parent == folder and name.endswith(".safetensors")
    }
    try:
        totals = check_onnx(bundle.file(graph), beside)
    except ValueError as error:
        raise broken(bundle.path, f"its {graph} is not to be opened: {error}") from None
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry(FOLDING_LIMIT, str(totals.limit))
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return [] if release >= FOLDING_SINCE else ["ConstantFolding"]


def check_session(
    bundle: Bundle,
    graph: str,
    session: onnxruntime.InferenceSession,
    row: Mapping[str, Any],
    weights: Iterable[str] = (),
) -> None:
    """A graph takes what the manifest says and gives as many tensors as it says."""
    found = {tensor.name for tensor in session.get_inputs()}
    named = {*row["inputs"], *weights}
    if found != named or len(session.get_outputs()) != len(row["outputs"]):
        differ = ", ".join(sorted(found ^ named)) or "the number of outputs"
        raise ValueError(
            f"bundle {bundle.path} cannot be used: its {graph} and its manifest.json differ in"
            f" {differ[:200]}; fetch it or export it again."
        )
