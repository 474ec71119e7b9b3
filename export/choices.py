"""Which experts a backend chooses: its routers' logits, tapped, against torch's.

The op `d2m::RoutedExperts` takes the logits as its second input. A tapped block graph gives that
tensor as one more output; nothing else of it changes. Where two experts' gates are closer than
rounding, the choice may differ and the image with it: so agreement is told together with the
margin, the difference between the last gate chosen and the first one left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.schema import DOMAIN, OP
from runtime.bundle import Bundle

OUT = "out_"  # block graphs' outputs are named so


def tap(model: Any) -> tuple[Any, list[str]]:
    """A copy of a block graph that also returns its routers' logits, and their names.

    A router is named by its weights: "ff" for the node that reads ff.experts.w1. The outputs are
    called out_<router>.logits, float32 [tokens, E].
    """
    import onnx
    from onnx import helper

    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    names = []
    for node in tapped.graph.node:
        if (node.domain, node.op_type) != (DOMAIN, OP):
            continue
        name = node.input[2].rpartition(".experts.")[0] + ".logits"
        experts = next(
            value.type.tensor_type.shape.dim[0].dim_value
            for value in tapped.graph.input
            if value.name == node.input[2]
        )
        out = f"{OUT}{name}"
        tapped.graph.node.append(helper.make_node("Identity", [node.input[1]], [out], name=out))
        tapped.graph.output.append(
            helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, ["rows", experts])
        )
        names.append(name)
    return tapped, names


def tapped_bundle(bundle: Bundle, folder: Path, top_k: int) -> Bundle:
    """The bundle with tapped transformer blocks for `top_k`, written to `folder`; weights shared.

    A block type's `outputs` then name the logits too, so any executor returns them.
    """
    import onnx

    manifest = copy.deepcopy(bundle.manifest)
    kinds = manifest["components"]["transformer"]["types"]
    for kind in kinds.values():
        for key, path in kind["graphs"].items():
            if key not in ("", str(top_k)):
                continue
            model, names = tap(onnx.load(str(bundle.file(path))))
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            onnx.save(model, str(target))
            kind["outputs"] = [*kind["outputs"], *names]
    weights = {"transformer": bundle.weights("transformer")}
    return Bundle(folder, manifest, bundle.digest, weights)


def chosen(logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, E] -> sorted experts chosen [T, K], margin [T] (infinite where all are chosen).

    Softmax in float64, ties to the lowest index, as the op is defined.
    """
    logits = np.asarray(logits, np.float64)
    gates = np.exp(logits - logits.max(-1, keepdims=True))
    gates /= gates.sum(-1, keepdims=True)
    order = np.argsort(-gates, axis=-1, kind="stable")
    ranked = np.take_along_axis(gates, order, -1)
    last = logits.shape[-1]
    margin = (
        np.full(len(logits), np.inf) if top_k >= last else ranked[:, top_k - 1] - ranked[:, top_k]
    )
    return np.sort(order[:, :top_k], axis=-1), margin


def agreement(
    sites: Sequence[tuple[str, np.ndarray, np.ndarray]], top_k: int, margin: float
) -> dict[str, Any]:
    """Torch's and a backend's choices, over (site, torch's logits, backend's logits).

    `sure` counts tokens whose margin in torch exceeds `margin`; `flips` are tokens whose set of
    experts differs. Sites are listed worst first.
    """
    rows: list[dict[str, Any]] = []
    for name, expected, found in sites:
        first, gap = chosen(expected, top_k)
        second, _ = chosen(found, top_k)
        flipped = (first != second).any(-1)
        sure = gap > margin
        finite = gap[flipped]
        rows.append(
            {
                "site": name,
                "tokens": len(gap),
                "sure": int(sure.sum()),
                "flips": int(flipped.sum()),
                "sure_flips": int((flipped & sure).sum()),
                "largest_flip_margin": float(finite.max(initial=0.0)),
                "logits_max_abs": float(np.abs(expected - found).max(initial=0.0)),
            }
        )
    tokens, sure = (sum(row[name] for row in rows) for name in ("tokens", "sure"))
    flips, sure_flips = (sum(row[name] for row in rows) for name in ("flips", "sure_flips"))
    rows.sort(key=lambda row: (-row["sure_flips"], -row["flips"], -row["logits_max_abs"]))
    return {
        "top_k": top_k,
        "margin": margin,
        "tokens": tokens,
        "agreement": 1 - flips / max(tokens, 1),
        "sure_tokens": sure,
        "sure_agreement": 1 - sure_flips / max(sure, 1),
        "flips": flips,
        "largest_flip_margin": max((row["largest_flip_margin"] for row in rows), default=0.0),
        "sites": rows,
    }
