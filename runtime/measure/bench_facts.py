"""What a benchmark says of what it measured: the bundles, their memory, the machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.cuda.arena import SIZES, aligned
from runtime.latency_budget import releases
from runtime.measure.cold_start import peak
from runtime.program.executor import gpu_count
from runtime.program.threads import physical_cores

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

SAME = ("compute_dtype", "storage_dtype")  # in a fair comparison


def memory(pipeline: Pipeline, colds: list[dict[str, float | None]]) -> dict[str, Any]:
    """MiB: weights on disk, the most a new process held, what executors hold on a device.

    process_peak_mib is of this process, which has opened both bundles.
    """
    files = pipeline.manifest["files"].items()
    weights = sum(row["size"] for name, row in files if name.endswith(".safetensors"))
    peaks = [row["peak_mib"] for row in colds if row["peak_mib"] is not None]
    held = [device_bytes(pipeline.executor(name)) for name in pipeline.manifest["components"]]
    on_device = [size for size in held if size is not None]
    here = peak()
    return {
        "weights_mib": round(weights / (1 << 20), 1),
        "peak_mib": round(statistics.median(peaks), 1) if peaks else None,
        "device_mib": round(sum(on_device) / (1 << 20), 1) if on_device else None,
        "process_peak_mib": round(here, 1) if here is not None else None,
    }


def device_bytes(executor: Any) -> int | None:
    """What an executor of plans holds on its device; None for one that has no device memory."""
    held = getattr(executor, "memory", None)
    if held is None:
        return None
    weights = (aligned(held.tensors.find(name).size * SIZES[dtype]) for name, dtype in held.weights)
    return sum(weights) + sum(size for _, size in held.regions.values())


def facts(pipeline: Pipeline) -> dict[str, Any]:
    """What a bundle is, and what it ran on."""
    names = ("name", "kind", "compute_dtype", "storage_dtype", "top_k", "kappa", "parameters")
    return {
        "path": str(pipeline.bundle.path),
        "digest": pipeline.bundle.digest,
        "backend": pipeline.backend,
        **{name: pipeline.manifest.get(name) for name in names},
    }


def differences(opened: Mapping[str, Pipeline]) -> list[str]:
    """What else than the method differs: a ratio says less about it then."""
    ours, other = opened["bundle"], opened["vs"]
    rows = [
        f"{name}: {ours.manifest[name]} against {other.manifest[name]}"
        for name in SAME
        if ours.manifest[name] != other.manifest[name]
    ]
    if ours.backend != other.backend:
        rows.append(f"backend: {ours.backend} against {other.backend}")
    if other.manifest["kind"] != "dense":
        rows.append(f"kind: the baseline is {other.manifest['kind']}, expected dense")
    return rows


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": physical_cores(),
        "gpus": gpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        **releases("onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt"),
    }
