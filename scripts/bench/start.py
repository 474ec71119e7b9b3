"""Cold start of the runtime: import, open, first image; then steps per second.

    python -m scripts.bench.start [BUNDLE] [--vs DENSE_BUNDLE] [--runs 5] [--json FILE]

Every cold run is a process of its own (the files are in the page cache: this measures the
program, not the disk). With --vs both bundles take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from runtime.program.threads import thread_count
from scripts.figures import ROOT, in_turns, machine, options, ratios, write_figures

# Run in a fresh interpreter: argv = bundle ("" for the default), threads (likewise), and the
# clock before the process was started.
CHILD = """
import json, sys, time
interpreter = time.time() - float(sys.argv[3])
start = time.perf_counter()
import runtime
imported = time.perf_counter()
pipeline = runtime.load(sys.argv[1] or None, "ort", threads=int(sys.argv[2] or 0) or None)
loaded = time.perf_counter()
pipeline("a red circle", seed=0)
first, cpu = time.perf_counter(), time.process_time()
steps = pipeline.manifest["defaults"]["steps"]
seconds = []
for seed in range(1, 4):
    marks = []
    pipeline("a red circle", seed=seed,
             progress=lambda phase, done, total: marks.append((phase, time.perf_counter())))
    denoise = [moment for phase, moment in marks if phase == "denoise"]
    seconds.append((denoise[-1] - denoise[0]) / steps)
warm = time.perf_counter()
pipeline("a red circle", seed=9)
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
except ImportError:
    peak = None
print(json.dumps({
    "import_s": imported - start,
    "load_s": loaded - imported,
    "first_image_s": interpreter + first - start,
    "first_image_cpu_s": cpu,
    "warm_image_s": time.perf_counter() - warm,
    "step_s": min(seconds),
    "peak_mib": peak,
}))
"""


def cold(bundle: str, threads: str) -> dict[str, float]:
    """One process, from its start to its fifth image; seconds."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, bundle, threads, str(time.time())]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {done.stderr.strip().splitlines()[-1]}")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and the lowest and highest first image."""
    medians = {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]}
    firsts = sorted(row["first_image_s"] for row in rows)
    return {
        **medians,
        "steps_per_s": round(1 / medians["step_s"], 1),
        "first_image_range_s": [round(firsts[0], 3), round(firsts[-1], 3)],
    }


def measure(bundles: dict[str, str], runs: int, threads: str) -> dict[str, Any]:
    """Cold starts of every bundle in turn."""
    works = {
        name: lambda turn, bundle=bundle: cold(bundle, threads) for name, bundle in bundles.items()
    }
    rows = in_turns(works, runs, warm_up=0)
    answer: dict[str, Any] = {name: summary(found) for name, found in rows.items()}
    if "vs" in rows:
        other, own = ([row["step_s"] for row in rows[name]] for name in ("vs", "bundle"))
        answer |= ratios(other, own, "step_speedup")
    return answer


def main() -> None:
    """Parse, measure, print, write."""
    parser = options(__doc__, "start.json")
    parser.add_argument("bundle", nargs="?", default="", help="default: the embedded one")
    parser.add_argument("--vs", help="another bundle to compare with, e.g. the dense model's")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", default="", help="default: the physical cores")
    arguments = parser.parse_args()
    bundles = {"bundle": arguments.bundle, **({"vs": arguments.vs} if arguments.vs else {})}
    threads = thread_count(int(arguments.threads) if arguments.threads else None)
    answer = {
        "machine": machine(threads, "numpy", "onnxruntime"),
        "runs": arguments.runs,
        **measure(bundles, arguments.runs, arguments.threads),
        "targets": {"import_s": 0.5, "first_image_s": 3.0},
    }
    print(json.dumps(answer, indent=2, sort_keys=True))
    write_figures(arguments.json, "scripts.bench.start", answer)


if __name__ == "__main__":
    main()
