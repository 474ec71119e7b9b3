"""Training threads beside other load: a step's time by threads and by how OpenMP waits.

    python -m scripts.bench.threads [--json results/cpu/threads.json]

Every cell is a process of its own: one FFN's forward and backward pass (D 128, 512 tokens: the size
of the shapes teacher's), alone and beside a loop that takes a core. Cells take turns; medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300


def step_seconds() -> float:
    """The median of a training step in this process."""
    import torch

    layers = [torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128)]
    model, x = torch.nn.Sequential(*layers), torch.randn(512, 128)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        model(x).square().mean().backward()
        times.append(time.perf_counter() - began)
    return statistics.median(times[STEPS // 10 :])


def cell(threads: int, policy: str, busy: int) -> float:
    """Milliseconds a step, with `busy` cores taken by other processes."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": policy}
        command = [sys.executable, "-m", "scripts.bench.threads", "--one"]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=True
        )
        return round(1000 * float(done.stdout), 3)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", action="store_true", help="one process's step (used by itself)")
    parser.add_argument("--runs", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print(step_seconds())
        return
    cells = list(itertools.product((1, os.cpu_count() or 2), ("ACTIVE", "PASSIVE"), (0, 1)))
    times: dict[tuple[int, str, int], list[float]] = {key: [] for key in cells}
    for _ in range(options.runs):
        for key in cells:
            times[key].append(cell(*key))
    names = ("threads", "wait", "busy_cores", "milliseconds")
    rows = [dict(zip(names, (*key, statistics.median(found)))) for key, found in times.items()]
    answer = {
        "command": "python -m scripts.bench.threads",
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "rows": rows,
    }
    print(json.dumps(answer, indent=2))
    if options.json:
        from runtime.files.atomic import write_json

        write_json(options.json, answer)


if __name__ == "__main__":
    main()
