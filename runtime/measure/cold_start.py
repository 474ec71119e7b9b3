"""A process of its own that opens a bundle and generates one image: what a cold start costs.

    python -m runtime.measure.cold_start JSON

The JSON holds what `open_and_generate` takes, and the answer on stdout is JSON too. The files may
be in the page cache: this measures the program, not the disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def time_cold_start(
    bundle: str | os.PathLike[str], settings: Mapping[str, Any]
) -> dict[str, float | None]:
    """Start a process, wait for its image; seconds and MiB.

    start_s        until the interpreter runs and the runtime is imported
    open_s         the bundle checked and every component opened
    generate_s     the first image
    first_image_s  all of that, from before the process was started
    peak_mib       the most memory the process held, mapped weights that were read among it

    `settings`: backend, threads, prompt, knobs. Raises ValueError with the process's own sentence
    where it fails.
    """
    # The interpreter may not see this package otherwise (a checkout, a zip beside it).
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    request = {"bundle": str(Path(bundle).resolve()), **settings, "began": time.monotonic()}
    command = [sys.executable, "-m", "runtime.measure.cold_start", json.dumps(request)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"a new process cannot generate from {os.fspath(bundle)} ({lines[-1]})")
    answer: dict[str, float | None] = json.loads(done.stdout)
    return answer


def open_and_generate(request: Mapping[str, Any]) -> dict[str, float | None]:
    """What the process does: open, generate once, return the times."""
    from runtime.pipeline import Pipeline

    started = time.monotonic()
    pipeline = Pipeline(request["bundle"], request["backend"], threads=request["threads"])
    pipeline.warm()
    opened = time.monotonic()
    pipeline(request["prompt"], seed=0, **request["knobs"])
    done = time.monotonic()
    return {
        "start_s": started - request["began"],
        "open_s": opened - started,
        "generate_s": done - opened,
        "first_image_s": done - request["began"],
        "peak_mib": peak(),
    }


def peak() -> float | None:
    """The most memory this process has held, in MiB; None where the system does not say.

    Not getrusage where /proc is there: its figure survives exec, so that a child of a large process
    would report its parent's.
    """
    try:
        text = Path("/proc/self/status").read_text("ascii", "replace")
        (line,) = [line for line in text.splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1 << 20 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(open_and_generate(json.loads(sys.argv[1]))))
