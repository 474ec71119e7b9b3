"""Whole images through ONNX Runtime on the CPU: a sparse bundle against the dense model's.

    python -m scripts.bench.model [SPARSE_BUNDLE [DENSE_BUNDLE]] [--runs 5] [--json FILE]

Without DENSE_BUNDLE, models/shapes-dense is exported as bundles are (weights stored in bf16) to a
temporary directory. Both bundles take turns with the same prompts and seeds, so that a busy machine
slows both; ratios are medians over pairs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.figures import ROOT, in_turns, machine, options, ratios, write_figures

BATCHES = (1, 8)
PROMPT = "a red circle above a blue square"


def generate(pipeline: Any, batch: int, seed: int) -> dict[str, float]:
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
    works = {
        name: lambda turn, pipeline=pipeline: generate(pipeline, batch, seed=turn + 1)
        for name, pipeline in pipelines.items()
    }
    rows = in_turns(works, runs)
    answer: dict[str, Any] = {"batch": batch}
    for figure in ("image_s", "step_s"):
        seconds = {name: [row[figure] for row in found] for name, found in rows.items()}
        for name, found in seconds.items():
            answer[f"{name}_{figure}"] = round(statistics.median(found), 5)
        name = f"{figure.removesuffix('_s')}_speedup"
        answer |= ratios(seconds["dense"], seconds["sparse"], name)
    return answer


def facts(pipeline: Any) -> dict[str, Any]:
    """What a bundle is."""
    names = ("name", "kind", "compute_dtype", "storage_dtype", "top_k", "parameters", "defaults")
    return {name: pipeline.manifest[name] for name in names}


def main() -> None:
    """Parse, export the dense model where no bundle of it is given, measure, print, write."""
    parser = options(__doc__, "cpu/bench_model.json")
    parser.add_argument("sparse", nargs="?", default=str(ROOT / "runtime" / "default"))
    parser.add_argument("dense", nargs="?", help="default: models/shapes-dense, exported now")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: the runtime's own choice")
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
            "machine": machine(threads, "numpy", "onnxruntime"),
            "bundles": {name: facts(pipeline) for name, pipeline in pipelines.items()},
            "runs": arguments.runs,
            "batches": rows,
        }
    write_figures(arguments.json, "scripts.bench.model", answer)


if __name__ == "__main__":
    main()
