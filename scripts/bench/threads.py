"""Training threads beside other load: a step's time by threads and by how OpenMP waits.

    python -m scripts.bench.threads [--json results/cpu/threads.json]

Every cell is a process of its own: one FFN's forward and backward pass (D 128, 512 tokens: the size
of the shapes teacher's), alone and beside a loop that takes a core. Cells take turns; medians.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time

from scripts.figures import ROOT, in_turns, machine, options, write_figures

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
    parser = options(__doc__)
    parser.add_argument("--one", action="store_true", help="one process's step (used by itself)")
    parser.add_argument("--runs", type=int, default=3, help="(%(default)s)")
    arguments = parser.parse_args()
    if arguments.one:
        print(step_seconds())
        return
    cells = list(itertools.product((1, os.cpu_count() or 2), ("ACTIVE", "PASSIVE"), (0, 1)))
    works = {key: lambda turn, key=key: cell(*key) for key in cells}
    times = in_turns(works, arguments.runs, warm_up=0)
    names = ("threads", "wait", "busy_cores", "milliseconds")
    rows = [dict(zip(names, (*key, statistics.median(found)))) for key, found in times.items()]
    print(json.dumps(rows, indent=2))
    if arguments.json:
        answer = {"machine": machine(os.cpu_count() or 1, "torch"), "rows": rows}
        write_figures(arguments.json, "scripts.bench.threads", answer)


if __name__ == "__main__":
    main()
