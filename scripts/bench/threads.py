"""Training threads beside other load: a step's time by threads and by how OpenMP waits.

    python -m scripts.bench.threads

Every cell is a process of its own: one FFN's forward and backward pass (D 128, 512 tokens: the size
of the shapes teacher's), alone and beside a loop that takes a core. Cells take turns; medians.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
from functools import partial

from scripts.figures import in_turns, machine, options, write_figures

# Seconds of a step, printed: the median of 300.
STEP = """
import statistics, time, torch
model = torch.nn.Sequential(torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128))
x, times = torch.randn(512, 128), []
for _ in range(300):
    began = time.perf_counter()
    model(x).square().mean().backward()
    times.append(time.perf_counter() - began)
print(statistics.median(times[30:]))
"""


def seconds(threads: int, wait: str, busy: int, turn: int) -> float:
    """A step's seconds, with `busy` cores taken by other processes."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": wait}
    try:
        done = subprocess.run(
            [sys.executable, "-c", STEP], env=os.environ | own, capture_output=True, check=True
        )
        return float(done.stdout)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    """Measure, print, write."""
    parser = options(__doc__, "cpu/threads.json")
    cores = os.cpu_count() or 2
    asked = parser.parse_args()
    cells = list(itertools.product((1, cores), ("ACTIVE", "PASSIVE"), (0, 1)))
    found = in_turns({cell: partial(seconds, *cell) for cell in cells}, runs=3, warm_up=0)
    rows = [
        {"threads": t, "wait": w, "busy_cores": b, "ms": round(1000 * statistics.median(s), 3)}
        for (t, w, b), s in found.items()
    ]
    print(*rows, sep="\n")
    write_figures(asked.json, "scripts.bench.threads", machine(cores, "torch") | {"rows": rows})


if __name__ == "__main__":
    main()
