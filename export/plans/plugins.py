"""TensorRT plugins of the routed experts' kernels, made from a package of them. Experimental.

A Python ahead-of-time plugin is one kernel, so the op becomes a body of five nodes, one per launch
of the kernels' plan (`plugin_body`), and each node's operator a plugin (`register`). TensorRT's
parser prefers a plugin to a model-local function of its name; the body itself stays a function, so
that the graph is the same elsewhere. Scratch tensors are ordinary tensors between the nodes.

`kernels` below is the manifest of `python -m d2m.kernels build` (d2m/kernels/package.py), `plan`
one entry of its `plans`. Shape letters: T tokens, D width, E experts, H expert hidden, K chosen.

Never run: TensorRT cannot be installed where this was written. Written against its documentation
(tensorrt.plugin.register, aot_impl, KernelLaunchParams, SymInt32). Not known: whether TensorRT
raises a kernel's limit of dynamic shared memory above 48 kB, which `up` and `down` need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Union

from export.op.schema import DOMAIN, OP, OPSET, inputs_of, version_of
from runtime.files.extras import need

if TYPE_CHECKING:
    import onnx

DTYPES = {"fp32": "float32", "i32": "int32", "fp16": "float16", "bf16": "bfloat16"}


def choose(kernels: Mapping[str, Any], sm: int, stream: str, top_k: int) -> dict[str, Any]:
    """The plan for one architecture, stream ("image" or "text") and number of experts."""
    for plan in kernels["plans"]:
        if (plan["sm"], plan["stream"], plan["top_k"]) == (sm, stream, top_k):
            return dict(plan)
    known = sorted({f"sm_{p['sm']} {p['stream']} k={p['top_k']}" for p in kernels["plans"]})
    raise ValueError(
        f"the kernels have no plan for sm_{sm} {stream} k={top_k}, only {', '.join(known)}; build"
        f" them with: python -m d2m.kernels build --sm {sm} --top-k {top_k} -o KERNELS"
    )


def operator(plan: Mapping[str, Any], launch: Mapping[str, Any]) -> str:
    """The plugin's name, an identifier that holds all its code depends on: up_image_k2_sm90."""
    entry = launch["kernel"].rpartition("/")[2].split("-")[0]
    return f"{entry}_{plan['stream']}_k{plan['top_k']}_sm{plan['sm']}"


def sides(
    kernels: Mapping[str, Any], launch: Mapping[str, Any]
) -> tuple[list[str], list[int | str], list[str]]:
    """(tensors read, integers, tensors written) of a launch in the order of its plugin's PTX."""
    kernel = kernels["kernels"][launch["kernel"]]
    values = {
        name: (kind, value)
        for (name, kind), value in zip(kernel["parameters"], launch["arguments"], strict=True)
    }
    read: list[str] = []
    numbers: list[int | str] = []
    written: list[str] = []
    first = [i for i, name in enumerate(kernel["plugin"]) if values[name][0][0] != "*"]
    last_read = first[0] if first else len(kernel["plugin"]) - 1  # without integers: one output
    for place, name in enumerate(kernel["plugin"]):
        kind, value = values[name]
        if kind[0] != "*":
            numbers.append(value)
        elif place < last_read:
            read.append(value)
        else:
            written.append(value)
    return read, numbers, written


def plugin_body(kernels: Mapping[str, Any], plan: Mapping[str, Any]) -> onnx.FunctionProto:
    """`d2m::RoutedExperts` as one node per launch; `y` comes out of the last."""
    from onnx import helper

    nodes = []
    for launch in plan["launches"]:
        read, _, written = sides(kernels, launch)
        nodes.append(
            helper.make_node(
                operator(plan, launch),
                read,
                written,
                name=operator(plan, launch),
                domain=DOMAIN,
                plugin_namespace=DOMAIN,
                plugin_version="1",
            )
        )
    kind = (kernels.get("activation", "gelu_tanh"), kernels.get("bias", True))
    version = version_of(*kind)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, version)]
    own = ["top_k"] if version == 1 else ["top_k", "activation"]
    return helper.make_function(DOMAIN, OP, list(inputs_of(*kind)), ["y"], nodes, opsets, own)


# ---------------------------------------------------------------- symbolic sizes


def extent(text: int | str, known: Mapping[str, Any]) -> Any:
    """A size as the manifest writes it, "6*tiles" or 3072, over symbols of TensorRT."""
    if isinstance(text, int):
        return text
    factor, _, name = text.rpartition("*")
    return known[name] * int(factor) if factor else known[name]


def symbols(
    plan: Mapping[str, Any], experts: int, read: Sequence[str], tensors: Sequence[Any]
) -> dict[str, Any]:
    """T, blocks and tiles out of the shapes of what a launch reads.

    The place of a symbol is found in the plan's shapes; what no shape holds follows from T. Without
    a minimum in TensorRT's expressions, the bound on tiles counts E experts also where T K < E:
    more tiles than needed, which kernels skip.
    """
    shapes = {**plan["inputs"], **plan["work"]}
    known: dict[str, Any] = {}
    for name, tensor in zip(read, tensors, strict=True):
        for axis, size in enumerate(shapes[name]["shape"]):
            if size in ("T", "blocks", "tiles"):
                known.setdefault(size, tensor.shape_expr[axis])
    if "T" in known:
        tokens, rows = known["T"], plan["block_t"]
        known.setdefault("blocks", (tokens + (rows - 1)) // rows)
        pairs, most = tokens * plan["top_k"], experts * (plan["block_m"] - 1)
        known.setdefault("tiles", (pairs + most) // plan["block_m"])
    return known


# ---------------------------------------------------------------- registration


def load_plugin_api() -> tuple[Any, Any]:
    """(tensorrt, tensorrt.plugin); ImportError where they are not there or too old."""
    try:
        import tensorrt
        import tensorrt.plugin as plugin
    except ImportError as error:
        raise ImportError(
            need(
                "trt",
                "--plugin needs tensorrt with its Python plugins; leave --plugin out (the portable"
                " body needs no plugin)",
                error,
            )
        ) from None
    if not hasattr(plugin, "aot_impl"):
        raise ImportError(
            f"--plugin needs tensorrt.plugin.aot_impl, which tensorrt {tensorrt.__version__} has"
            " not, expected 10.9 or later; leave --plugin out: the portable body needs no plugin."
        )
    return tensorrt, plugin


def register(
    trt: Any, trtp: Any, kernels: Mapping[str, Any], folder: str | Path, plan: Mapping[str, Any]
) -> list[str]:
    """Register a plugin per launch of `plan`; returns their ids, "d2m::up_image_k2_sm90".

    `trt`, `trtp`: the modules tensorrt and tensorrt.plugin. `folder` holds the kernels' files.
    """
    ids = []
    for launch in plan["launches"]:
        record = kernels["kernels"][launch["kernel"]]
        ptx = Path(folder, record["ptx"]).read_text(encoding="utf-8")
        row = SimpleNamespace(kernels=kernels, plan=plan, launch=launch, kernel=record, ptx=ptx)
        name = f"{DOMAIN}::{operator(plan, launch)}"
        describe, implement = functions(trt, trtp, row)
        trtp.register(name)(describe)
        trtp.aot_impl(name)(implement)
        ids.append(name)
    return ids


def functions(trt: Any, trtp: Any, row: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions of a plugin: what its outputs look like, and its kernel's launch."""
    read, numbers, written = sides(row.kernels, row.launch)
    experts = row.kernels["experts"]
    shapes = {**row.plan["work"], **row.plan["outputs"]}

    def describe(*given: Any, **named: Any) -> tuple[Any, ...]:
        tensors = [*given, *(named[name] for name in read[len(given) :])]
        known = symbols(row.plan, experts, read, tensors)
        outputs = []
        for name in written:
            sizes = shapes[name]["shape"]
            expressions = trtp.ShapeExprs(len(sizes))
            for axis, size in enumerate(sizes):
                expressions[axis] = extent(size, known)
            output = tensors[0].like()
            output.dtype = getattr(trt, DTYPES[shapes[name]["dtype"]])
            output.shape_expr = expressions
            outputs.append(output)
        return tuple(outputs)

    def implement(*given: Any, **named: Any) -> tuple[str, str, Any, Any]:
        tensors = [*given[: len(read)], *(named[name] for name in read[len(given) :])]
        known = symbols(row.plan, experts, read, tensors)
        launch = trtp.KernelLaunchParams()
        for axis, size in zip("xyz", row.launch["grid"]):
            setattr(launch, f"grid_{axis}", extent(size, known))
        launch.block_x = row.kernel["block"]
        launch.shared_mem = row.kernel["shared"]
        extra = trtp.SymIntExprs(len(numbers))
        for index, number in enumerate(numbers):
            extra[index] = trtp.SymInt32(extent(number, known))
        return row.kernel["entry"], row.ptx, launch, extra

    tensor = trtp.TensorDesc
    several = tuple[(tensor,) * len(written)]  # type: ignore[valid-type, misc]
    annotate(describe, dict.fromkeys(read, tensor), several)
    text = Union[str, bytes]  # noqa: UP007 (compared with what the documentation writes)
    result = tuple[text, text, trtp.KernelLaunchParams, trtp.SymExprs]  # type: ignore[valid-type, name-defined]
    named = {**dict.fromkeys(read, tensor), "outputs": several, "tactic": int}
    annotate(implement, named, result)
    return describe, implement


def annotate(function: Any, parameters: Mapping[str, Any], result: Any) -> None:
    """Give a function of *args the signature that tensorrt.plugin reads names and types from."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    rows = [inspect.Parameter(name, kind, annotation=type_) for name, type_ in parameters.items()]
    function.__signature__ = inspect.Signature(rows, return_annotation=result)
    function.__annotations__ = {**parameters, "return": result}
