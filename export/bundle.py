"""`d2m export`: a sparse (or dense) pipeline directory becomes a bundle that needs no torch.

The bundle is built under a temporary name next to its final one and appears whole or not at all.
The same input gives the same bytes: no dates, no machine's name, keys sorted.
"""

from __future__ import annotations

import errno
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m import __version__
from d2m.families import family_of
from export.checks import (
    DTYPES,
    check_arguments,
    check_plugin,
    check_quant,
    check_top_k,
    need_extra,
    plan_apis,
)
from runtime.bundle.trial import made_here
from runtime.files.atomic import replace_dir, temporary_dir, write_bytes, write_json, write_text
from runtime.files.hashes import sha256
from runtime.trt.launch_schedule import plan_key

if TYPE_CHECKING:
    import torch

    from export.checkpoint.pipeline import Component
    from export.graph.program import BlockType, Program

Progress = Callable[[str, int, int], None]


def export_bundle(
    sparse_dir: str | Path,
    out: str | Path,
    *,
    trt: bool = False,
    trt_rtx: bool = False,
    sm: Sequence[int] = (),
    top_k: Sequence[int] = (0, 1, 2, 4),
    dtype: str = "fp32",
    storage: str | None = None,
    plan_dtype: str | None = None,
    plugin: bool = False,
    cubins: bool = False,
    link: bool = False,
    portable: bool = False,
    quant: str = "none",
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export the pipeline in `sparse_dir` to the bundle `out`.

    Args:
        trt: build plans with TensorRT where it is importable, otherwise with TensorRT-RTX.
        trt_rtx: build plans with TensorRT-RTX.
        sm: compute capabilities of the plans, such as 86 or 120; none means portable.
        top_k: numbers of experts to export, 0 to E; the checkpoint's own is always among them.
            Ignored for a dense pipeline.
        dtype: what the graphs compute in, fp32, bf16 or fp16. ONNX Runtime on CPUs needs fp32.
        storage: what the weights are stored in; None: as the checkpoint stores them.
        plan_dtype: what the plans compute in; None: bf16 for an fp32 bundle (TensorRT fuses no
            attention in float32), else `dtype`.
        plugin: experimental; plans of TensorRT proper run the routed experts as plugins, made from
            the kernels of d2m/kernels (needs triton). The default is the portable body.
        cubins: sparse blocks also as plans of their segments with the experts' kernels between
            them, which the runtime launches where they fit its GPU (needs triton).
        link: shards of the checkpoint that enter the bundle unchanged are hard links to it
            (export/checkpoint/shared_shards.py); all else, and everything where links are
            impossible, is written.
        portable: portable plans too, besides those for `sm`.
        quant: the format of the transformer's weights, a row of export/quant/formats.py or "none".
        keep: patterns of weights' names that are not quantised, besides those that never are.
        progress: called as progress(phase, done, total).

    Returns the manifest's summary: out, name, kind, top_k_choices, parameters, files, bytes,
    linked_bytes (of bytes, on disk once for checkpoint and bundle), plans. Memory: the largest
    tensor and its copy, besides the libraries and the smaller components.

    Raises:
        FileNotFoundError, ValueError: `sparse_dir` is no pipeline of a known family, or a value is
            out of range.
        ImportError: an extra is missing; it is named.
        OSError: the disk is full or not writable. Nothing is left behind.
    """
    source, final = Path(sparse_dir), Path(out)
    check_arguments(source, final, dtype, storage, plan_dtype, sm, trt or trt_rtx)
    check_quant(quant, keep, dtype, plugin or cubins)
    if plugin:
        check_plugin(trt, trt_rtx)
    need_extra()
    from export.checkpoint.lora_map import write_lora_map
    from export.checkpoint.pipeline import open_components, open_pipeline
    from export.checkpoint.weights import place
    from export.plans.expert_kernels import check_cubins

    _, _, sparse = open_pipeline(source)
    if cubins:
        check_cubins(trt or trt_rtx, sparse, plugin, sm)
    choices = check_top_k(source, top_k) if sparse else []
    targets = [(), sm] if portable and sm else [sm]
    apis = plan_apis(trt, trt_rtx, targets)

    final.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(final), temporary_dir(final) as folder:
        components = open_components(source, sparse, choices, progress)
        manifest = new_manifest(source, components, sparse, choices, dtype, storage)
        # A component at a time, so that one traced program at most is in memory.
        hashes = {}
        for component in components:
            program = component.trace(torch_dtype(graph_dtype(component.name, dtype)))
            if program.beside and apis:
                raise ValueError(
                    f"{source} keeps keys and values of reference images, expected no plans, which"
                    " would hold the transformer's weights twice; leave --trt and --trt-rtx out."
                )
            if component.name == "transformer" and quant != "none":
                program, manifest["quant"] = quantise(program, quant, keep)
            shards, digest = write_weights(folder, component, program, storage, link, progress)
            hashes[f"{component.name}.safetensors"] = digest  # taken while it was written
            manifest["components"][component.name] = write_graphs(
                folder, component.name, program, manifest["top_k"], manifest.get("kappa"), shards
            )
            for name, other in program.beside.items():
                manifest["components"][name] = write_graphs(
                    folder, name, other, manifest["top_k"], None, shards, component.name
                )
            if component.name == "transformer" and quant == "none":
                wanted = place(program, component.checkpoint.dtype)
                manifest["lora"] = write_lora_map(folder, source, wanted)
        write_tokenizers(folder, source, manifest)
        if apis:
            kind = plan_dtype or ("bf16" if dtype == "fp32" else dtype)
            # Graphs of the bundle's own dtype serve the plans too; others are traced again.
            traced = None if kind == dtype and quant == "none" else components
            rest: tuple[Any, ...] = (progress, plugin, cubins, (quant, keep))
            write_plans(folder, manifest, apis, targets, kind, traced, *rest)
        # Last, for it hashes the rest; only what the runtime opens takes the bundle's place.
        write_manifest(folder, manifest, hashes, progress)
        replace_dir(folder, final)
    made_here(sha256(final / "manifest.json"))
    return summary(final, manifest)


def quantise(program: Program, quant: str, keep: Sequence[str]) -> tuple[Program, dict[str, Any]]:
    """The transformer with quantised weights, and the manifest's record of them."""
    from export.quant.formats import FORMATS
    from export.quant.program import quantised

    kind = FORMATS[quant]
    beside = {name: quantised(each, kind, keep) for name, each in program.beside.items()}
    program = replace(quantised(program, kind, keep), beside=beside)
    names = {
        prefix + part.weight
        for name, prefix in program.calls
        for part in program.types[name].parts.values()
    }
    if not names:
        raise ValueError(
            f"--keep {', '.join(keep)} leaves no weight to quantise, expected some; leave --quant"
            " out."
        )
    record = {"format": quant, "bits": kind.bits, "block": kind.block, "weights": len(names)}
    return program, {**record, "keep": list(keep)}


@contextmanager
def full_disk_named(final: Path) -> Iterator[None]:
    """A full disk is an OSError that names it and says what became of the bundle `final`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk of {final.parent} is full, expected room for the bundle {final.name};"
            " nothing was left behind, free some space and export again.",
        ) from error


def summary(final: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What `export_bundle` returns and `d2m export` prints."""
    sizes = [row["size"] for row in manifest["files"].values()]
    linked = [name for row in manifest["components"].values() for name in row.get("shards", ())]
    fields = ("name", "kind", "compute_dtype", "top_k", "top_k_choices", "parameters")
    return {
        "out": str(final),
        **{name: manifest[name] for name in fields},
        "files": len(sizes),
        "bytes": sum(sizes),
        "linked_bytes": sum(manifest["files"][name]["size"] for name in linked),
        "plans": {
            target: {"version": row["version"], "dtype": row["dtype"], "files": len(row["files"])}
            for target, row in manifest["plans"].items()
        },
    }


def graph_dtype(component: str, dtype: str) -> str:
    """What a component's ONNX graphs compute in: `dtype`, but a bf16 bundle's VAE float32.

    Of Conv (below opset 22), InstanceNormalization and Resize, ONNX Runtime's CUDA provider has
    no bfloat16 kernels (read: its docs/OperatorKernels.md); all else that we export it has.
    """
    return "fp32" if component.startswith("vae_") and dtype == "bf16" else dtype


def torch_dtype(name: str) -> torch.dtype:
    """fp32 -> torch.float32"""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def new_manifest(
    source: Path,
    components: Sequence[Component],
    sparse: bool,
    choices: Sequence[int],
    dtype: str,
    storage: str | None,
) -> dict[str, Any]:
    """The manifest without components, tokenizers, plans and files."""
    from export.checkpoint.pipeline import manifest_entries

    transformer = next(component for component in components if component.name == "transformer")
    own = str(transformer.checkpoint.main_dtype()).removeprefix("torch.")
    return {
        "format": 1,
        "d2m": __version__,
        "family": family_of(source).names.name,
        "kind": "sparse" if sparse else "dense",
        "name": source.resolve().name,
        "compute_dtype": DTYPES[dtype],
        "storage_dtype": DTYPES[storage] if storage else own,
        "components": {},
        "top_k_choices": list(choices),
        "plans": {},
        **manifest_entries(source, transformer.checkpoint, sparse),
    }


def write_weights(
    folder: Path,
    component: Component,
    program: Program,
    storage: str | None,
    link: bool,
    progress: Progress | None,
) -> tuple[list[str], str]:
    """<component>.safetensors; returns linked shards beside it, and its SHA-256."""
    from export.checkpoint.shared_shards import link_shards
    from export.checkpoint.weights import place, refuse_unknown, write

    wanted = torch_dtype(storage) if storage else None
    placed = place(program, lambda name: component.stored_dtype(name, wanted))
    shards: list[str] = []
    if component.name == "transformer":
        refuse_unknown(component.checkpoint, placed)
        if link:
            shards, placed = link_shards(folder, component.name, component.checkpoint, placed)
    return shards, write(folder / f"{component.name}.safetensors", placed, component.get, progress)


def write_graphs(
    folder: Path,
    name: str,
    program: Program,
    top_k: int | None,
    kappa: int | None = None,
    shards: Sequence[str] = (),
    of: str | None = None,
) -> dict[str, Any]:
    """The block graphs and <component>.onnx, checked; returns the component's record.

    of: the component whose weights it has, where they are not its own.
    """
    import onnx

    from export.graph.compose import compose

    types = {}
    for kind, row in program.types.items():
        paths = {}
        for key, graph in row.graphs.items():
            onnx.checker.check_model(graph)
            paths[key] = f"blocks/{plan_key(name, kind, key)}.onnx"
            write_bytes(folder / paths[key], graph.SerializeToString(deterministic=True))
        types[kind] = type_record(row, paths)
    weights = folder / f"{of or name}.safetensors"
    model = compose(program, weights, top_k, kappa, [folder / shard for shard in shards])
    path = folder / f"{name}.onnx"
    write_bytes(path, model.SerializeToString(deterministic=True))
    check_graph(path, [weights, *(folder / shard for shard in shards)])
    record = {
        "onnx": path.name,
        "weights": weights.name,
        **({"shards": list(shards)} if shards else {}),
        "inputs": {key: spec.json() for key, spec in program.inputs.items()},
        "outputs": {key: spec.json() for key, spec in program.outputs.items()},
        "types": types,
        "program": [
            {"type": kind, "prefix": prefix}
            | ({"outputs": list(program.names[index])} if index in program.names else {})
            for index, (kind, prefix) in enumerate(program.calls)
        ],
    }
    if program.depths:
        record["depths"] = program.depths
    groups = {
        key: {**vars(group), "calls": list(group.calls)} for key, group in program.groups.items()
    }
    return {**record, "groups": groups} if groups else record


def check_graph(path: Path, weights: Sequence[Path]) -> None:
    """onnx's checker on a model with external data in `weights`.

    It takes a file of two names for an attack (as onnx.load does; ONNX Runtime does not), so a
    linked shard is stood in for by a file of its size with nothing in it: the checker reads none.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix=".check.", dir=path.parent) as scratch:
        write_bytes(Path(scratch, path.name), path.read_bytes())
        for file in weights:
            with open(Path(scratch, file.name), "wb") as empty:
                empty.truncate(file.stat().st_size)
        onnx.checker.check_model(str(Path(scratch, path.name)))


def type_record(row: BlockType, paths: Mapping[str, str]) -> dict[str, Any]:
    """A block type as the manifest holds it."""
    from export.graph.program import BODY

    record = {
        "graphs": dict(paths),
        "inputs": list(row.inputs),
        "outputs": list(row.outputs),
        "weights": {name: spec.json() for name, spec in row.weights.items()},
    }
    return {**record, "body": BODY} if row.routed else record


def write_tokenizers(folder: Path, source: Path, manifest: dict[str, Any]) -> None:
    """tokenizer.json files and their records."""
    from export.checkpoint.pipeline import tokenizers

    manifest["tokenizers"] = {}
    for name, (record, text) in tokenizers(source).items():
        write_text(folder / record["file"], text)
        manifest["tokenizers"][name] = record


def write_plans(
    folder: Path,
    manifest: dict[str, Any],
    apis: Sequence[str],
    targets: Sequence[Sequence[int]],
    dtype: str,
    components: Sequence[Component] | None,
    progress: Progress | None,
    plugin: bool = False,
    cubins: bool = False,
    quant: tuple[str, Sequence[str]] = ("none", ()),
) -> None:
    """Plans of every block graph, for each list of compute capabilities in `targets`.

    `quant`: the format and what it leaves out. GPUs that multiply it get plans that do, others
    plans in 16 bits, for which the runtime dequantises weights.

    With `components` the graphs are traced again, computing in `dtype`: a graph in a half type is
    not the float32 one cast. Norms, rotary embedding, router and timestep stay in float32 inside
    it, by Casts that a float32 trace never had (20 in a double block, 13 in a single one and T5).
    """
    from export.plans.build import build_plans, default_profiles
    from export.plans.compiler import load_api, split_by_format
    from export.plans.expert_kernels import CutBlocks, build_kernels, cut_blocks, kernel_sm

    with tempfile.TemporaryDirectory(prefix=".graphs.", dir=folder) as scratch:
        profiles = default_profiles(manifest)
        where: dict[str | None, Path] = {None: folder}  # the bundle's own, where plans compute so
        if components is not None:
            where = {name: Path(scratch) / (name or "plain") for name in (None, quant[0])}
            for component in components:
                program = component.trace(torch_dtype(dtype))
                for name, root in where.items():
                    found = lowered(component.name, program, name, quant, profiles)
                    for kind, row in found.types.items():
                        record = manifest["components"][component.name]["types"][kind]
                        for key, path in record["graphs"].items():
                            write_bytes(root / path, row.graphs[key].SerializeToString())
        sets = {
            name: {
                plan_key(component, kind, key): root / path
                for component, row in manifest["components"].items()
                for kind, record in row["types"].items()
                for key, path in record["graphs"].items()
            }
            for name, root in where.items()
        }
        graphs, oldest = sets[None], newest_only(quant[0])
        # Kernels take the experts' place: as plugins inside plans, or between plans of segments.
        kernels = Path(scratch) / "kernels"
        pieces = cut_blocks(graphs, Path(scratch) / "segments") if plugin or cubins else CutBlocks()
        if plugin or cubins:
            numbers = kernel_sm(apis, targets[-1])
            build_kernels(
                kernels if plugin else folder, pieces, dtype, numbers, ptx=plugin, progress=progress
            )
        for api, sm in itertools.product(apis, targets):
            for cards, form in split_by_format(load_api(api), sm, oldest, quant[0]):
                built = build_plans(
                    sets[form] | (pieces.graphs if cubins else {}),
                    folder,
                    api=api,
                    sm=cards,
                    dtype=DTYPES[dtype],
                    profiles=profiles,
                    kernels=kernels if plugin else None,
                    quant=form,
                    progress=progress,
                )
                if cubins:
                    for target in built.values():
                        pieces.add_to(target, dtype)
                manifest["plans"] |= built


def newest_only(quant: str) -> int:
    """The oldest GPU that multiplies a format, 0 where none does."""
    from export.quant.formats import format_of

    kind = format_of(quant)
    return kind.sm if kind else 0


def lowered(
    component: str,
    program: Program,
    form: str | None,
    quant: tuple[str, Sequence[str]],
    profiles: Mapping[str, Sequence[int]],
) -> Program:
    """A component's program for plans in the format `form`, None for 16 bits."""
    from export.quant.formats import format_of
    from export.quant.program import SIXTEEN_BITS, quantised
    from export.quant.tensorrt import lowering

    name, keep = quant
    kind = format_of(name)
    if component != "transformer" or kind is None:
        return program
    if form is None or not kind.sm:
        return quantised(program, kind, keep, SIXTEEN_BITS)
    return quantised(program, kind, keep, lowering(profiles["image_tokens"][1]))


def write_manifest(
    folder: Path,
    manifest: dict[str, Any],
    hashes: Mapping[str, str],
    progress: Progress | None,
    controlnet: bool = False,
) -> None:
    """Hash every file that is not in `hashes`, write manifest.json, open the result as runtime."""
    from runtime.bundle.directory import open_bundle

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {}
    for done, path in enumerate(paths):
        if progress is not None:
            progress("hash", done, len(paths))
        name = path.relative_to(folder).as_posix()
        files[name] = {"sha256": hashes.get(name) or sha256(path), "size": path.stat().st_size}
    manifest["files"] = files
    write_json(folder / "manifest.json", manifest)
    open_bundle(folder, check="sizes", controlnet=controlnet)
    if progress is not None:
        progress("hash", len(paths), len(paths))
