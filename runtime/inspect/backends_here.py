"""What every backend lacks here, how it runs the routed experts, and where it has run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtime.program.backends import BACKENDS, GPU_BACKENDS, TRIED
from runtime.program.executor import missing_library, unavailable_reason

if TYPE_CHECKING:
    from runtime.bundle.directory import Bundle

# Why ONNX graphs have the body of d2m::RoutedExperts that they have (export.op.bodies).
BODIES = {
    "sorted": "pairs of token and expert sorted, two matmuls an expert",
    "every": "every expert on every token",
    "either": "every expert on few tokens of a narrow model, else sorted by expert",
    "portable": "experts padded to whole tiles, two batched matmuls",
}
MEASURED = "the fastest on CPUs of those that pass the op's test: results/cpu/bench_bodies.json"


def backends(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Every backend: what it lacks here (None: nothing), how it runs experts, where it was run."""
    body = onnx_body(bundle.manifest)
    what = BODIES.get(body, "unknown here")
    sparse = bundle.manifest["kind"] == "sparse"
    onnx, plans = f"body {body} ({what})", "the portable body, or cubins where they fit the GPU"
    experts = {
        "ort": f"{onnx}, {MEASURED}",
        "ort-cuda": f"{onnx}, not measured on a GPU",
        **dict.fromkeys(("trt-rtx", "trt"), f"{plans}; not measured on a GPU"),
    }
    return {
        name: {
            "lacks": unavailable_reason(bundle, name)
            if name in GPU_BACKENDS
            else missing_library(name),
            "experts": experts[name] if sparse else None,
            "tried": TRIED[name],
        }
        for name in BACKENDS
    }


def onnx_body(manifest: Mapping[str, Any]) -> str:
    """How the ONNX graphs spell the routed experts out (export.op.bodies names the bodies)."""
    kinds = manifest["components"]["transformer"]["types"].values()
    return ", ".join(sorted({str(kind["body"]) for kind in kinds if "body" in kind})) or "unknown"
