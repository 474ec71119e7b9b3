"""A bundle whose blocks also return their routers' logits: what parity reads a choice from.

The op `d2m::RoutedExperts` takes the logits as its second input. A tapped block graph gives that
tensor as one more output; nothing else of it changes. For ONNX Runtime the bundle's own graphs are
tapped; plans are built anew, from tapped graphs, by the release and for the GPUs of the bundle's.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from d2m.families import FAMILIES, Family
from export.graph.trace import OUT
from export.op.schema import DOMAIN, OP
from runtime.bundle.directory import Bundle
from runtime.files.atomic import write_bytes
from runtime.files.tensors import SafeTensors
from runtime.trt.launch_schedule import plan_key

# Rows of a site's logits, by the tokens that pass it.
ROWS = {
    "image": "batch*image_tokens",
    "text": "batch*text_tokens",
    "both": "batch*image_tokens + batch*text_tokens",
}


def tap(model: Any, family: Family) -> tuple[Any, list[str]]:
    """A copy of a block graph of a family that also returns its routers' logits, and their names.

    A router is named by its weights: "ff" for the node that reads ff.experts.w1. The outputs are
    called out_<router>.logits, float32 [tokens, E].
    """
    import onnx
    from onnx import helper

    streams = {site.module: site.stream for site in family.blocks.sites}
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    names = []
    for node in list(tapped.graph.node):
        if (node.domain, node.op_type.partition("_")[0]) != (DOMAIN, OP):
            continue
        site = node.input[2].rpartition(".experts.")[0]
        experts = next(
            value.type.tensor_type.shape.dim[0].dim_value
            for value in tapped.graph.input
            if value.name == f"{site}.experts.w1"
        )
        out = f"{OUT}{site}.logits"
        tapped.graph.node.append(helper.make_node("Identity", [node.input[1]], [out], name=out))
        shape = [ROWS[streams[site]], experts]
        tapped.graph.output.append(
            helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, shape)
        )
        names.append(f"{site}.logits")
    return tapped, names


def tapped_bundle(bundle: Bundle, folder: Path, top_k: int) -> Bundle:
    """The bundle with tapped transformer blocks for `top_k`, written to `folder`; weights shared.

    A block type's `outputs` then name the logits too, so any executor returns them.
    """
    manifest = copy.deepcopy(bundle.manifest)
    kinds = manifest["components"]["transformer"]["types"]
    own = manifest["compute_dtype"]
    for (kind, key), graph in block_graphs(bundle, top_k, "", own).items():
        model, names = tap(graph, family_of(bundle))
        write_bytes(folder / kinds[kind]["graphs"][key], model.SerializeToString())
        kinds[kind]["outputs"] = [*kinds[kind]["outputs"], *names]
    return Bundle(folder, manifest, bundle.digest, _weights=weights_of(bundle))


def tapped_plans(
    bundle: Bundle, folder: Path, top_k: int, sparse_dir: str | Path, target: str
) -> Bundle:
    """The same for a bundle's plans `target`.

    Where the plans compute in another type than the bundle's graphs, these are traced anew.
    """
    from export.plans.build import build_plans

    row = bundle.manifest["plans"][target]
    manifest = copy.deepcopy(bundle.manifest)
    kinds = manifest["components"]["transformer"]["types"]
    graphs = {}
    for (kind, key), graph in block_graphs(bundle, top_k, sparse_dir, row["dtype"]).items():
        name = plan_key("transformer", kind, key)
        model, names = tap(graph, family_of(bundle))
        graphs[name] = write_bytes(folder / f"{name}.onnx", model.SerializeToString())
        kinds[kind]["outputs"] = [*kinds[kind]["outputs"], *names]
    plans = build_plans(
        graphs,
        folder,
        api=row["api"],
        sm=row["compute_capabilities"],
        dtype=row["dtype"],
        profiles=row["profiles"],
    )
    manifest["plans"] = plans
    manifest["files"] |= {path: {} for entry in plans.values() for path in entry["files"].values()}
    return Bundle(folder, manifest, bundle.digest, _weights=weights_of(bundle))


def weights_of(bundle: Bundle) -> dict[str, SafeTensors]:
    """The transformer's weights, shared with another bundle."""
    return {"transformer": bundle.weights("transformer")}


def family_of(bundle: Bundle) -> Family:
    """d2m's row of a bundle's family."""
    return next(family for family in FAMILIES if family.names.name == bundle.manifest["family"])


def block_graphs(
    bundle: Bundle, top_k: int, sparse_dir: str | Path, dtype: str
) -> dict[tuple[str, str], Any]:
    """(type, key) -> the transformer's block graphs for `top_k`, computing in `dtype`."""
    if dtype == bundle.manifest["compute_dtype"]:
        import onnx

        return {
            (kind, key): onnx.load(str(bundle.file(path)))
            for kind, row in bundle.component("transformer")["types"].items()
            for key, path in row["graphs"].items()
            if key in ("", str(top_k))
        }
    import torch

    from export.checkpoint.pipeline import empty_transformer
    from export.families import export_family
    from export.graph.blocks import transformer_program

    skeleton = empty_transformer(Path(sparse_dir))
    tracing = export_family(skeleton).tracing
    program = transformer_program(skeleton, tracing, getattr(torch, dtype), (top_k,))
    return {
        (kind, key): graph
        for kind, found in program.types.items()
        for key, graph in found.graphs.items()
    }
