"""Whole images through ONNX Runtime on the CPU: a sparse bundle against the dense model's.

    python -m scripts.bench.model [SPARSE_BUNDLE [DENSE_BUNDLE]] [--runs 5] [--json FILE]

Without DENSE_BUNDLE, models/shapes-dense is exported as bundles are (weights stored in bf16) to a
temporary directory. Both bundles take turns with the same prompts and seeds, so that a busy machine
slows both; ratios are medians over pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

BATCHES = (1, 8)
PROMPT = "a red circle above a blue square"


def drawn(pipeline: Any, batch: int, seed: int) -> dict[str, float]:
    """One call: seconds an image, and seconds a call of the transformer."""
    marks: list[float] = []

    def note(phase: str, done: int, total: int) -> None:
        if phase == "denoise":
            marks.append(time.perf_counter())

    start = time.perf_counter()
    pipeline(PROMPT, seed=seed, n=batch, progress=note)
    total = time.perf_counter() - start
    steps = pipeline.manifest["defaults"]["steps"]
    return {"image_s": total / batch, "step_s": (marks[-1] - marks[0]) / steps}


def measure(pipelines: dict[str, Any], batch: int, runs: int) -> dict[str, Any]:
    """Medians of both and of their ratios; the first turn only warms up."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    for turn in range(-1, runs):
        for name, pipeline in pipelines.items():
            row = drawn(pipeline, batch, seed=turn + 1)
            if turn >= 0:
                rows[name].append(row)
    answer: dict[str, Any] = {"batch": batch}
    for figure in ("image_s", "step_s"):
        for name, found in rows.items():
            answer[f"{name}_{figure}"] = round(statistics.median(r[figure] for r in found), 5)
        pairs = zip(rows["dense"], rows["sparse"], strict=True)
        ratios = [dense[figure] / sparse[figure] for dense, sparse in pairs]
        stem = figure.removesuffix("_s")
        answer[f"{stem}_speedup"] = round(statistics.median(ratios), 3)
        answer[f"{stem}_speedup_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return answer


def facts(pipeline: Any) -> dict[str, Any]:
    """What a bundle is."""
    names = ("name", "kind", "compute_dtype", "storage_dtype", "top_k", "parameters", "defaults")
    return {name: pipeline.manifest[name] for name in names}


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    import numpy
    import onnxruntime

    return {
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": threads,
        "load": [round(value, 1) for value in os.getloadavg()],
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def main() -> None:
    """Parse, export the dense model where no bundle of it is given, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sparse", nargs="?", default=str(ROOT / "runtime" / "default"))
    parser.add_argument("dense", nargs="?", help="default: models/shapes-dense, exported now")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: the runtime's own choice")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "cpu" / "bench_model.json")
    arguments = parser.parse_args()
    import runtime

    with tempfile.TemporaryDirectory(prefix="d2m-bench-") as folder:
        dense = arguments.dense
        if dense is None:
            from export.bundle import export_bundle

            dense = str(Path(folder) / "shapes-dense")
            export_bundle(ROOT / "models" / "shapes-dense", dense, storage="bf16")
        pipelines = {
            name: runtime.load(bundle, "ort", threads=arguments.threads)
            for name, bundle in (("dense", dense), ("sparse", arguments.sparse))
        }
        kinds = [pipelines[name].manifest["kind"] for name in ("sparse", "dense")]
        if kinds != ["sparse", "dense"]:
            raise SystemExit(f"error: the bundles are {kinds}, expected a sparse and a dense one.")
        from runtime.program.threads import thread_count

        manifest = pipelines["sparse"].manifest
        weights = manifest["files"][manifest["components"]["transformer"]["weights"]]["size"]
        threads = thread_count(arguments.threads, weights)
        rows = []
        columns = ("dense image s", "sparse image s", "speedup", "dense step s", "sparse step s")
        print(f"{'batch':>5}  " + "  ".join(f"{name:>14}" for name in (*columns, "speedup")))
        for batch in BATCHES:
            row = measure(pipelines, batch, arguments.runs)
            rows.append(row)
            figures = [row[f"{name}_image_s"] for name in pipelines] + [row["image_speedup"]]
            figures += [row[f"{name}_step_s"] for name in pipelines] + [row["step_speedup"]]
            print(f"{batch:>5}  " + "  ".join(f"{value:>14.4f}" for value in figures), flush=True)
        answer = {
            "command": " ".join(["python", "-m", "scripts.bench.model", *sys.argv[1:]]),
            "date": date.today().isoformat(),
            "machine": machine(threads),
            "bundles": {name: facts(pipeline) for name, pipeline in pipelines.items()},
            "runs": arguments.runs,
            "batches": rows,
        }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.json.with_name(f".{arguments.json.name}.tmp")
    temporary.write_text(json.dumps(answer, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, arguments.json)


if __name__ == "__main__":
    main()
