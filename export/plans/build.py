"""Block graphs compiled to TensorRT plans: one per block type and number of experts.

Weights are inputs of a block graph, so a plan holds code and no weights: a few megabytes, built in
about a second, shared by every block of its type, and any top_k is another plan. TensorRT-RTX
builds ahead of time on a machine without a GPU; TensorRT proper builds on the GPU it runs on.
For several compute capabilities one plan is built for the list, not one each: the kernels of
TensorRT-RTX are finished at load time, so a plan for three is as large as a plan for one
(measured: 2.91 MB against 2.90 MB), and a directory less per machine can go wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from export.families import FAMILIES
from export.op.bodies import with_body
from export.plans.compiler import build, check_sm, load_api, target_name
from export.plans.fuse import attentions, fuse
from export.plans.layers import check_plan, host_tensors, layers
from export.quant.products import PRODUCT
from export.quant.tensorrt import spelled_out
from runtime.families import FAMILIES as RUNTIME_FAMILIES
from runtime.families import is_guided
from runtime.files.atomic import write_bytes
from runtime.files.checked_json import read_json
from runtime.trt.launch_schedule import dimension_size, dimension_terms, profile_of

log = logging.getLogger("export")
Progress = Callable[[str, int, int], None]
Profiles = Mapping[str, Sequence[int]]
REFERENCES = 4  # of the largest size, which plans have room for
SHAPES = ((7000, 7000), (7000, 3000), (3000, 7000))  # of references; Kontext's list ends at 7 : 3
WORKERS = 2  # builds at a time; one takes about a second of one core and .3 GB


def build_plans(
    block_graphs: Mapping[str, str | Path],
    out_dir: str | Path,
    *,
    api: str = "auto",
    sm: Sequence[int] = (),
    dtype: str = "bfloat16",
    profiles: Profiles,
    kernels: str | Path | None = None,
    quant: str | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Compile every graph and write `out_dir`/plans/<target>/<component>/<type>[.k<K>].plan.

    block_graphs: "transformer/double.k2" -> an ONNX file with weights as inputs. api: "tensorrt",
    "tensorrt_rtx", or "auto" (TensorRT where it is importable, otherwise TensorRT-RTX). sm:
    compute capabilities such as 86 or 120; none means portable (TensorRT-RTX: 8.0, 8.6, 8.9, 12.0
    and later; TensorRT: this machine's GPU). dtype: what the graphs compute in. profiles: name of
    a dimension, or "component.name" -> (min, opt, max); image_tokens is always needed. Every plan
    is checked: attention fused, no conditional, no copy to the host. kernels: a package of kernels
    that the routed experts of TensorRT proper run as plugins (experimental); none: portable body.
    quant: the format of the graphs' weights (export/quant), None for 16 bits.

    Returns the manifest's `plans`: {target: {api, version, compute_capabilities, dtype, profiles,
    files, tensors, layers}}. Raises ImportError, OSError or ValueError with one sentence.
    """
    trt = load_api(api)
    name = trt.__name__
    capabilities = check_sm(trt, sm)
    target = target_name(name, capabilities, quant)
    log.info("building %d plans with %s %s", len(block_graphs), name, trt.__version__)
    entry: dict[str, Any] = {
        "api": name,
        "version": trt.__version__,
        "compute_capabilities": list(capabilities),
        "dtype": dtype,
        **({"quant": quant} if quant else {}),
        "profiles": {},
        "files": {},
        "tensors": {},
        "layers": {},
    }
    used: set[str] = set()
    report = progress or (lambda phase, done, total: None)
    report(f"plans ({name})", 0, len(block_graphs))

    # Read here, in one thread (onnx's registry of schemas is not safe in two), built side by side.
    tokens = profiles["image_tokens"][1]
    plugins = {
        key: plugin_plan(block_graphs[key], kernels, capabilities, tokens)
        for key in sorted(block_graphs)
    }
    models = {
        key: load_graph(block_graphs[key], tokens=tokens, plugin=plugins[key])
        for key in sorted(block_graphs)
    }

    def compile_one(key: str) -> tuple[str, bytes, str]:
        shapes = bounds(tensors(models[key]), profiles, key)
        return key, *build(
            trt, models[key], shapes, sm=capabilities, name=key, kernels=plugins[key]
        )

    with ThreadPoolExecutor(WORKERS) as pool:
        for done, (key, plan, dump) in enumerate(pool.map(compile_one, models), 1):
            model = models[key]
            if host := host_tensors(dump):
                raise ValueError(
                    f"plan {key} wants {', '.join(host)} in host memory, expected none there; a"
                    " shape in the block's graph is an input."
                )
            wanted = attentions(model)
            entry["layers"][key] = check_plan(key, layers(dump), dtype=dtype, attentions=wanted)
            entry["tensors"][key] = io = tensors(model)
            entry["files"][key] = f"plans/{target}/{key}.plan"
            write_bytes(Path(out_dir) / entry["files"][key], plan)
            used.update(names_in((*io["inputs"], *io["outputs"])))
            report(f"plans ({name})", done, len(block_graphs))
    needed = (dim for dim in sorted(profiles) if dim.rpartition(".")[2] in used)
    entry["profiles"] = {dim: list(profiles[dim]) for dim in needed}
    return {target: entry}


def plugin_plan(
    path: str | Path, kernels: str | Path | None, capabilities: Sequence[int], tokens: int
) -> dict[str, Any] | None:
    """{"folder", "plan"} of the kernels that a graph's experts run as plugins, or None."""
    if kernels is None:
        return None

    import onnx

    from export.op.bodies import routings
    from export.plans.plugins import choose

    found = {routing.top_k for routing in routings(onnx.load(str(path)))}
    if not found:
        return None
    manifest = read_json(Path(kernels, "kernels.json"))
    stream = "image" if tokens >= 2048 else "text"  # tiles differ, any number of tokens runs
    return {
        "folder": kernels,
        "plan": choose(manifest, capabilities[0], stream, found.pop()),
        "manifest": manifest,
    }


def load_graph(path: str | Path, *, tokens: int, plugin: Mapping[str, Any] | None = None) -> Any:
    """A block graph with the portable body, in the form that fuses best (see export.plans.fuse).

    With `plugin` (see plugin_plan) the body is the plugins' nodes.
    """
    import onnx

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file, expected a block graph in ONNX format.")
    if plugin is None:
        model = with_body(onnx.load(str(path)), "portable", tokens=tokens)
        quantised = any(each.name.startswith(f"{PRODUCT}_") for each in model.functions)
        return fuse(spelled_out(model) if quantised else model)
    from export.plans.plugins import plugin_body

    model = with_body(onnx.load(str(path)), None)
    model.functions.append(plugin_body(plugin["manifest"], plugin["plan"]))
    return fuse(model)


def tensors(model: Any) -> dict[str, list[dict[str, Any]]]:
    """A graph's inputs and outputs in order: {"inputs": [{"name", "dtype", "shape"}], "outputs"}.

    Dimensions are numbers or names; the runtime sizes its buffers by them without a device.
    """
    graph = model.graph
    return {
        "inputs": [tensor_row(value) for value in graph.input],
        "outputs": [tensor_row(value) for value in graph.output],
    }


def tensor_row(value: Any) -> dict[str, Any]:
    """One input or output of a graph as the manifest writes it."""
    from onnx import TensorProto

    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim]
    dtype = TensorProto.DataType.Name(kind.elem_type).lower()
    names = {"float": "float32", "double": "float64"}
    names |= {"float8e4m3fn": "float8_e4m3fn", "float4e2m1": "float4_e2m1"}
    return {"name": value.name, "dtype": names.get(dtype, dtype), "shape": shape}


def bounds(
    io: Mapping[str, Sequence[Mapping[str, Any]]], profiles: Profiles, key: str
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """(min, opt, max) shapes of every input that has a named dimension."""
    ranges: dict[str, Sequence[int]] = {}
    for row in (*io["inputs"], *io["outputs"]):
        for dim in names_in([row]):
            found = profile_of(profiles, key.split("/")[0], dim)
            if found is None:
                raise ValueError(
                    f"plan {key} has a tensor {row['name']!r} of shape {row['shape']}, expected a"
                    f" profile for {dim!r} besides {', '.join(sorted(profiles))}."
                )
            ranges[dim] = found
    points = [{dim: found[point] for dim, found in ranges.items()} for point in range(3)]
    return {
        row["name"]: tuple(
            tuple(dimension_size(size, sizes) for size in row["shape"]) for sizes in points
        )
        for row in io["inputs"]
        if any(isinstance(size, str) for size in row["shape"])
    }


def names_in(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The dimensions that need a profile among tensors' shapes."""
    found = (term for row in rows for size in row["shape"] for term in dimension_terms(size))
    return sorted({name for _, names in found for name in names})


def default_profiles(manifest: Mapping[str, Any]) -> dict[str, list[int]]:
    """Profiles around a bundle's default image: batch 1 to 8, sides from a quarter to 1.5 times.

    `manifest` needs `defaults` (height, width), `latents` (vae_scale_factor) and `tokenizers`.
    """
    side = manifest["latents"]["vae_scale_factor"]
    rows, columns = (manifest["defaults"][name] // side for name in ("height", "width"))
    image = rows * columns // manifest["latents"]["patch"] ** 2
    lengths = {name: row["max_length"] for name, row in manifest["tokenizers"].items()}
    found = FAMILIES[manifest["family"]].text_tokens(lengths)
    text, an_image = found.pop(""), 1 + is_guided(manifest)  # rows an image
    usual, most, longest = reference_room(manifest)
    return {
        "batch": [1, an_image, 8 * an_image],
        "image_tokens": [max(1, image // 16), image + usual, image * 9 // 4 + most],
        "text_tokens": [min(8, text), text, text],
        **{f"{name}.text_tokens": [length] * 3 for name, length in found.items()},
        "latent_height": [max(2, rows // 4), rows, max(rows * 3 // 2, longest)],
        "latent_width": [max(2, columns // 4), columns, max(columns * 3 // 2, longest)],
    }


def reference_room(manifest: Mapping[str, Any]) -> tuple[int, int, int]:
    """Room for references behind the noise: tokens usually and at most, and the longest side of
    one in latent pixels. A model that sees one is made for it; of several, plans take REFERENCES.
    """
    family, latents = RUNTIME_FAMILIES[manifest["family"]], manifest["latents"]
    most = family.references(manifest)
    if not most:
        return 0, 0, 0
    sizes = [family.reference_size(manifest, *shape)[1] for shape in SHAPES]
    side = latents["vae_scale_factor"]
    tokens = max(height * width for height, width in sizes) // (side * latents["patch"]) ** 2
    longest = max(max(size) for size in sizes) // side
    return tokens if most == 1 else 0, tokens * min(most, REFERENCES), longest
