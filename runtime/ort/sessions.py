"""Sessions of ONNX Runtime on a bundle's graphs, each graph checked as data before it is opened."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from runtime.bundle.onnx_file import MAX_BYTES, check_onnx
from runtime.bundle.reading import broken
from runtime.files.checked_json import printable
from runtime.files.extras import command, need

if TYPE_CHECKING:
    import onnxruntime

    from runtime.bundle.directory import Bundle

FOLDING_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"
FOLDER = "session.model_external_initializers_file_folder_path"
FOLDING_SINCE = (1, 32)  # the oldest release on which the limit was seen to work
IN_PLACE_SINCE = (1, 32)  # ours: the oldest on which weights were seen to stay where they are
CPU = "CPUExecutionProvider"


def open_session(
    bundle: Bundle,
    graph: str,
    threads: int,
    *,
    fully: bool = True,
    providers: Sequence[Any] = (CPU,),
    arena: bool = True,
    extra: bytes = b"",
) -> onnxruntime.InferenceSession:
    """A deterministic session on one of the bundle's graphs; `fully`: with all optimisations.

    `providers`: where it computes; the first of them must take it. Without an `arena` memory on
    the CPU goes back after every call instead of staying with the session. `extra` is put behind
    the file's bytes (runtime.ort.router_outputs); such a graph names no tensors of other files.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(need("", "backend 'ort' needs onnxruntime")) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors; they are raised as well
    if not fully:
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_BASIC
    options.enable_cpu_mem_arena = arena
    data, weights = read_graph(bundle, graph)
    disabled = guard(bundle, graph, data, weights, options, onnxruntime.__version__)
    mapped = bind_weights(bundle, graph, options, onnxruntime.__version__)
    try:
        session = onnxruntime.InferenceSession(
            data + extra, options, providers=list(providers), disabled_optimizers=disabled
        )
    except Exception as error:  # its exceptions share no base class but Exception
        text = printable(" ".join(str(error).split()))[:300]
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {bundle.file(graph)} ({text});"
            " export the bundle again or install the version named in its constraints."
        ) from None
    check_provider(session, providers)
    session.mapped_weights = mapped  # it reads from this memory as long as it lives
    return session


def read_graph(bundle: Bundle, graph: str) -> tuple[bytes, dict[str, str]]:
    """A graph's bytes, and the files its tensors may lie in: name beside it -> listed name."""
    if not graph.endswith(".onnx"):  # by another suffix it is another format
        raise broken(bundle.path, f"its {graph} is not safe to open: it is no .onnx file")
    folder = PurePosixPath(graph).parent
    weights = {
        PurePosixPath(name).name: name
        for name in bundle.manifest["files"]
        if PurePosixPath(name).parent == folder and name.endswith(".safetensors")
    }
    return bundle.read(graph, MAX_BYTES), weights


def bind_weights(
    bundle: Bundle, graph: str, options: onnxruntime.SessionOptions, version: str
) -> list[Any]:
    """Let a whole graph's tensors be read from the mapped files whose hashes were checked.

    Returns the mappings. Releases that would copy all of it open the files by name.
    """
    if release_of(version) < IN_PLACE_SINCE:
        folder = str(bundle.file(graph).parent)
        options.add_session_config_entry(FOLDER, folder)
        return []
    components = bundle.manifest["components"].items()
    opened = [bundle.weights(name) for name, row in components if row.get("onnx") == graph]
    names = [path.name for each in opened for path in each.files]
    buffers = [mapped for each in opened for mapped in each.mapped]
    options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
    options.add_external_initializers_from_files_in_memory(names, buffers, list(map(len, buffers)))
    return buffers


@contextmanager
def errors_of(bundle: Bundle, what: str) -> Iterator[None]:
    """Within: what ONNX Runtime raises while it computes is one sentence, ValueError or OSError.

    what: the graph or block that runs. Its exceptions share no base class but Exception; they come
    from one module, and where inputs are bound they are RuntimeErrors.
    """
    try:
        yield
    except Exception as error:
        own = type(error).__module__.startswith("onnxruntime")
        if not own and not str(error).startswith("Error in execution"):
            raise
        text = printable(" ".join(str(error).split()))
        if re.search(r"allocat|bad_alloc|out of memory", text, re.IGNORECASE):
            raise OSError(
                f"there is not enough memory to run {what} of bundle {bundle.path} "
                f"({text[:160]}); generate a smaller image or fewer at once, or use --offload "
                "block."
            ) from None
        raise broken(bundle.path, f"ONNX Runtime fails to run its {what} ({text[:200]})") from None


def check_provider(session: onnxruntime.InferenceSession, wanted: Sequence[Any]) -> None:
    """OSError where a provider did not load and ONNX Runtime took the CPU without saying so."""
    first = wanted[0] if isinstance(wanted[0], str) else wanted[0][0]
    actual = session.get_providers()[0]
    if actual != first:
        raise OSError(
            f"ONNX Runtime opened the graph on {actual}, expected {first}: its CUDA libraries or"
            f" a GPU are missing; use --backend ort, or install them with: {command('gpu')}"
        )


def guard(
    bundle: Bundle,
    graph: str,
    data: bytes,
    weights: Mapping[str, str],
    options: onnxruntime.SessionOptions,
    version: str,
) -> list[str]:
    """Check a graph as data, and bound what ONNX Runtime may make of it while it opens.

    Releases that know a limit for constants computed beforehand get one (see
    runtime.bundle.onnx_constants), others compute none. Returns the optimisers to leave out;
    ValueError for a graph that should not be opened.
    """
    sizes = {name: bundle.manifest["files"][listed]["size"] for name, listed in weights.items()}
    try:
        totals = check_onnx(data, sizes)
    except ValueError as error:
        raise broken(bundle.path, f"its {graph} is not safe to open: {error}") from None
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry(FOLDING_LIMIT, str(totals.limit))
    return [] if release_of(version) >= FOLDING_SINCE else ["ConstantFolding"]


def release_of(version: str) -> tuple[int, ...]:
    """ "1.32.0" -> (1, 32)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


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
