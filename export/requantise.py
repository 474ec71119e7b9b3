"""A bundle whose transformer is quantised, made from one that is not: nothing is traced again.

The block graphs and weights of the bundle are all that it takes, so a bundle without its pipeline
will do. Everything but the transformer stays as it is; plans are left out, for they read weights
in 16 bits: `d2m export` on the pipeline builds them.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.checks import check_quant
from runtime.bundle.directory import open_bundle
from runtime.bundle.trial import made_here, vouched_for
from runtime.files.atomic import replace_dir, temporary_dir
from runtime.files.hashes import sha256

if TYPE_CHECKING:
    from export.graph.program import Program
    from runtime.bundle.directory import Bundle

Progress = Callable[[str, int, int], None]


def quantise_bundle(
    source: str | Path,
    out: str | Path,
    *,
    quant: str,
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the bundle `source` to `out` with its transformer in the format `quant`.

    keep: patterns of weights' names that are not quantised. Returns what `export_bundle` does.
    Raises ValueError, FileNotFoundError, ImportError or OSError with one sentence.
    """
    import torch

    from export.bundle import full_disk_named, quantise, summary, write_graphs, write_manifest
    from export.checkpoint.weights import place, write

    bundle, final = open_bundle(source), Path(out)
    check_quant(quant, keep, "fp32", False)
    if "quant" in bundle.manifest or bundle.manifest["compute_dtype"] != "float32":
        what = bundle.manifest.get("quant", {}).get("format", bundle.manifest["compute_dtype"])
        raise ValueError(
            f"bundle {source} is {what}, expected one whose graphs compute in float32, not"
            " quantised; export the pipeline again with --quant."
        )
    if final.exists() and final.resolve() == Path(source).resolve():
        raise ValueError(f"{out} is the bundle itself, expected another output directory.")
    manifest = copy.deepcopy(bundle.manifest)
    manifest["plans"] = {}
    row = manifest["components"]["transformer"]
    program, manifest["quant"] = quantise(program_of(bundle, "transformer"), quant, keep)
    tensors, types = bundle.weights("transformer"), {"F32": torch.float32, "F16": torch.float16}
    types["BF16"] = torch.bfloat16

    def get(name: str) -> torch.Tensor:
        raw = torch.from_numpy(tensors.raw(name).copy())
        return raw.view(torch.bfloat16) if tensors.find(name).dtype == "BF16" else raw

    final.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(final), temporary_dir(final) as folder:
        own = {row["onnx"], row["weights"], *row.get("shards", ())}
        own |= {path for kind in row["types"].values() for path in kind["graphs"].values()}
        for name in bundle.manifest["files"].keys() - own:
            if not name.startswith(("plans/", "kernels/")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.file(name), folder / name)
        placed = place(program, lambda name: types[tensors.find(name).dtype])
        hashes = {row["weights"]: write(folder / row["weights"], placed, get, progress)}
        manifest["components"]["transformer"] = write_graphs(
            folder, "transformer", program, manifest["top_k"], manifest.get("kappa")
        )
        write_manifest(folder, manifest, hashes, progress)
        replace_dir(folder, final)
    if vouched_for(bundle):  # its other graphs are copies
        made_here(sha256(final / "manifest.json"))
    return summary(final, manifest)


def program_of(bundle: Bundle, component: str) -> Program:
    """A component's program, read back from the manifest and the block graphs."""
    import onnx
    import torch

    from export.graph.program import BlockType, Program
    from export.graph.routers import Group
    from export.graph.trace import OUT, Spec
    from export.plans.build import tensor_row

    def specs(rows: Mapping[str, Any]) -> dict[str, Spec]:
        return {n: Spec(getattr(torch, r["dtype"]), tuple(r["shape"])) for n, r in rows.items()}

    def spec_of(value: Any) -> Spec:
        row = tensor_row(value)
        return Spec(getattr(torch, row["dtype"]), tuple(row["shape"]))

    record = bundle.component(component)
    types = {}
    for name, row in record["types"].items():
        graphs = {
            key: onnx.load_from_string(bundle.read(path)) for key, path in row["graphs"].items()
        }
        graph = next(iter(graphs.values())).graph
        tensors = {value.name: value for value in (*graph.input, *graph.output)}
        read = {n: spec_of(tensors[n]) for n in row["inputs"] if n in tensors}
        written = {n: spec_of(tensors[OUT + n]) for n in row["outputs"]}
        # No linears: weights lie as products read them.
        types[name] = BlockType(name, read, written, specs(row["weights"]), frozenset(), graphs)
    groups = {
        name: Group(row["type"], row["prefix"], tuple(row["calls"]), row["alpha"])
        for name, row in record.get("groups", {}).items()
    }
    calls = [(call["type"], call["prefix"]) for call in record["program"]]
    ends = specs(record["inputs"]), specs(record["outputs"])
    return Program(types, calls, *ends, groups, depths=record.get("depths", {}))
