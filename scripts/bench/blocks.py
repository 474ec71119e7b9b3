"""What a skipped block costs in ONNX Runtime on the CPU: a bundle's transformer at every kappa.

    python -m scripts.bench.blocks BUNDLE [--batch 1] [--runs 20] [--threads N] [--json FILE]

BUNDLE has groups of blocks. The whole graph and the block program take turns with the same inputs
at every kappa. Beside the time on the clock there is the processor time of the process, which a
busy machine does not stretch; ratios are of its medians, against all blocks.
A skipped block is an `If` whose branch hands its inputs on: the profile says how long that takes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.model import facts
from scripts.figures import in_turns, machine, options, write_figures

PROMPT = "a red circle above a blue square"


def inputs_of(pipeline: Any, batch: int) -> dict[str, np.ndarray]:
    """The transformer's inputs half-way through a generation of the bundle's default image."""
    from runtime.request import check_request
    from runtime.sampling import encode, feeds_of, prepare_latents

    request = check_request(pipeline.manifest, PROMPT, n=batch)
    conditions = encode(pipeline, request.prompts)
    noise = prepare_latents(pipeline, range(batch), request.latent_size)
    sigma = np.array([0.5], np.float32)
    size = request.latent_size, request.guidance
    (feed,) = feeds_of(pipeline, noise, conditions, sigma, *size)
    return pipeline.cast(feed)


def measure(pipeline: Any, batch: int, runs: int, threads: int) -> list[dict[str, Any]]:
    """A row per kappa: blocks run, milliseconds of both modes, ratios to all blocks."""
    from runtime.bundle.block_groups import smallest
    from runtime.ort.component import open_component

    bundle, feed = pipeline.bundle, inputs_of(pipeline, batch)
    component = bundle.component("transformer")
    kappas = range(1, smallest(component) + 1)
    modes = ("graph", "blocks")
    opened = {m: open_component(bundle, "transformer", threads=threads, mode=m) for m in modes}
    clocks = (time.perf_counter, time.process_time)

    def once(mode: str, kappa: int) -> list[float]:
        start = [clock() for clock in clocks]
        opened[mode](feed, None, kappa)
        return [1000 * (clock() - began) for clock, began in zip(clocks, start)]

    works = {(m, k): lambda turn, m=m, k=k: once(m, k) for m in modes for k in kappas}
    times = in_turns(works, runs, warm_up=2)
    middle = {
        key: [statistics.median(column) for column in zip(*found)] for key, found in times.items()
    }
    groups = component["groups"].values()
    blocks = len(component["program"]) - 2  # but for the calls before and after the blocks
    rows = []
    for kappa in kappas:
        skipped = sum(len(group["calls"]) - kappa for group in groups)
        row: dict[str, Any] = {"kappa": kappa, "blocks_run": blocks - skipped, "blocks": blocks}
        row["share_of_blocks"] = round((blocks - skipped) / blocks, 3)
        for mode in modes:
            wall, cpu = middle[mode, kappa]
            row[f"{mode}_ms"], row[f"{mode}_cpu_ms"] = round(wall, 3), round(cpu, 3)
            row[f"{mode}_ratio"] = round(cpu / middle[mode, max(kappas)][1], 3)
        rows.append(row)
    return rows


def skipped_blocks(pipeline: Any, threads: int, runs: int = 10) -> dict[str, Any]:
    """Microseconds of the `If`s that skipped their block, by the profile of one sample at kappa 1.

    As many ran as there are groups; they are the slowest and are left out.
    """
    import onnxruntime

    bundle, feed = pipeline.bundle, inputs_of(pipeline, 1)
    component = bundle.component("transformer")
    with tempfile.TemporaryDirectory(prefix="d2m-bench-") as folder:
        settings = onnxruntime.SessionOptions()
        settings.enable_profiling, settings.log_severity_level = True, 3
        settings.intra_op_num_threads = threads
        settings.profile_file_prefix = str(Path(folder) / "profile")
        basic = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        settings.graph_optimization_level = basic
        path = str(bundle.file(component["onnx"]))
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        for _ in range(runs + 2):
            session.run(None, {**feed, "kappa": np.array(1)})
        events = json.loads(Path(session.end_profiling()).read_text())
    members = {
        f"{component['program'][call]['prefix']}if"
        for group in component["groups"].values()
        for call in group["calls"]
    }
    found: dict[str, list[int]] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if name in members and event["name"].endswith("_kernel_time"):
            found.setdefault(name, []).append(event["dur"])
    middle = {name: statistics.median(durations[2:]) for name, durations in found.items()}
    rest = sorted(middle.values())[: len(middle) - len(component["groups"])]
    return {"skipped_us": round(statistics.median(rest), 1), "skipped_us_most": round(max(rest), 1)}


def main() -> None:
    """Parse, measure, print, write."""
    parser = options(__doc__, "cpu/bench_blocks.json")
    parser.add_argument("bundle")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, help="default: the physical cores")
    arguments = parser.parse_args()
    from runtime.pipeline import Pipeline
    from runtime.program.threads import thread_count

    threads = thread_count(arguments.threads)
    pipeline = Pipeline(arguments.bundle, "ort", threads=threads)
    if not pipeline.bundle.component("transformer").get("groups"):
        raise SystemExit(f"error: {arguments.bundle} has no groups of blocks, expected some.")
    rows = measure(pipeline, arguments.batch, arguments.runs, threads)
    columns = list(rows[0])
    print("  ".join(f"{name:>16}" for name in columns))
    for row in rows:
        print("  ".join(f"{row[name]:>16}" for name in columns))
    first, last = rows[0], rows[-1]
    more = (last["graph_cpu_ms"] - first["graph_cpu_ms"]) * 1000
    skipped = skipped_blocks(pipeline, threads)
    skipped["run_cpu_us"] = round(more / (last["blocks_run"] - first["blocks_run"]), 1)
    print(", ".join(f"{name} {value}" for name, value in skipped.items()))
    answer = {
        "machine": machine(threads, "numpy", "onnxruntime"),
        "bundle": facts(pipeline),
        "batch": arguments.batch,
        "runs": arguments.runs,
        "kappas": rows,
        "skipped": skipped,
    }
    write_figures(arguments.json, "scripts.bench.blocks", answer)


if __name__ == "__main__":
    main()
