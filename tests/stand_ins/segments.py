"""A bundle whose sparse blocks are also cut at their experts, with kernels that run on the host."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from d2m.kernels import package
from export.bundle import write_manifest
from export.plans.build import load_graph, tensors
from export.plans.expert_kernels import build_kernels, cut_blocks
from runtime.bundle.directory import Bundle, open_bundle
from runtime.trt.component import Plans
from runtime.trt.expert_kernels import Cubins
from runtime.trt.experts import open_experts
from tests.stand_ins.device import TARGET, HostContext, HostDevice, bundle_with_plans
from tests.stand_ins.kernels import stand_in

SM = (80, 90)  # HostDevice calls itself a 90


def bundle_with_segments(source: Path, root: Path) -> Bundle:
    """As export.bundle.write_plans makes it, ONNX graphs for plans, stand-ins for cubins."""
    import onnx

    made = bundle_with_plans(source, root)
    row, record = made.manifest["plans"][TARGET], made.component("transformer")
    graphs = {
        f"transformer/{kind}.k{key}": root / path
        for kind, entry in record["types"].items()
        for key, path in entry["graphs"].items()
        if key
    }
    pieces = cut_blocks(graphs, root.parent / "segments")
    for name, path in pieces.graphs.items():
        model = load_graph(path, tokens=16)
        row["files"][name] = f"plans/{TARGET}/{name}.plan"
        row["tensors"][name] = tensors(model)
        onnx.save(model, str(root / row["files"][name]))
    pieces.add_to(row, "fp32")
    build = functools.partial(package.build, compile=stand_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "triton_version", lambda: "3.7.1")
        patch.setattr(package, "build", build)
        build_kernels(root, pieces, "fp32", SM)
    (root / "manifest.json").unlink()
    write_manifest(root, made.manifest, {}, None)
    return open_bundle(root)


def plans_with_cubins(bundle: Bundle, **options: Any) -> Plans:
    """The executor of the transformer on the host: segments by ONNX Runtime, kernels by numpy."""
    device = HostDevice()
    opened = open_experts(bundle, TARGET, device.capability)
    cubins = {folder: Cubins(kernels, device) for folder, kernels in opened.items()}
    load = lambda _, path: HostContext(path, device)  # noqa: E731
    return Plans(bundle, "transformer", TARGET, device, load, cubins=cubins, **options)


def rewrite(bundle: Bundle, change: Any) -> Path:
    """Change a bundle's manifest on disk."""
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    change(manifest)
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    return bundle.path
