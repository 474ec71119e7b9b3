"""Memory and time of a drawing with weights streamed block by block, against weights held.

    python -m scripts.bench.offload BUNDLE [--steps 2] [--height H --width W] [--threads N]
                                    [--modes block,held,none] [--json FILE]

Modes: block (streamed), held (block by block too, all weights in memory), none (what d2m run does:
on a CPU the whole graph). Every mode draws in a process of its own, which reports its peak resident
memory (VmHWM of /proc/self/status: all pages, those mapped from files too), the time of the call,
how long blocks had to wait for their weights, and the picture. Those of block and held must be the
same to the byte; the whole graph multiplies in another order, so the largest difference of a pixel
is told. Where the model does not fit into memory, ask for --modes block alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PROMPT = "a photo of a red circle"


def status(field: str) -> int:
    """A number of bytes of /proc/self/status."""
    with open("/proc/self/status") as file:
        rows = dict(line.split(":", 1) for line in file)
    return int(rows[field].split()[0]) * 1024


def draw(bundle: str, mode: str, options: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """One drawing in this process, and what it took."""
    import hashlib

    import numpy as np

    from runtime.ort.blocks import Blocks
    from runtime.pipeline import Pipeline
    from runtime.program.threads import thread_count

    began = time.perf_counter()
    pipeline = Pipeline(
        bundle, "ort", threads=threads, offload="block" if mode == "block" else None
    )
    if mode == "held":  # the transformer alone: text encoders and VAE are whole graphs in all modes
        count = threads or thread_count(None, 1 << 30)
        pipeline._executors["transformer"] = Blocks(pipeline.bundle, "transformer", count)
    opened = time.perf_counter() - began
    before = status("VmHWM")
    marks: list[float] = []
    waited = 0.0
    executor: Any = pipeline.executor("transformer")
    if mode == "block":
        source = executor.weights
        take = source.take

        def timed(call: tuple[str, str]) -> Any:
            nonlocal waited
            start = time.perf_counter()
            answer = take(call)
            waited += time.perf_counter() - start
            return answer

        source.take = timed
    began, cpu = time.perf_counter(), time.process_time()
    image = pipeline(PROMPT, **options, callback=lambda *_: marks.append(time.perf_counter()))
    ended = time.perf_counter()
    steps = [b - a for a, b in zip(marks, marks[1:])]
    row = pipeline.bundle.component("transformer")
    tensors = pipeline.bundle.weights("transformer").tensors
    return {
        "mode": mode,
        "open_s": round(opened, 2),
        "draw_s": round(ended - began, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "step_s": round(sum(steps) / len(steps), 2) if steps else None,
        "waited_s": round(waited, 2) if mode == "block" else None,
        "peak_bytes": status("VmHWM"),
        "opened_peak_bytes": before,
        "rooms_bytes": sum(len(r.host) for r in executor.weights.rooms) if mode == "block" else 0,
        "weights_bytes": {
            "stored": sum(t.end - t.start for t in tensors.values()),
            "computed": sum(4 * t.size for t in tensors.values()),
        },
        "blocks": len(row["program"]),
        "image_sha256": hashlib.sha256(np.asarray(image).tobytes()).hexdigest(),
        "pixels": np.asarray(image).tobytes().hex(),
    }


def child(bundle: str, mode: str, options: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """`draw` in a process of its own."""
    command = [sys.executable, "-m", "scripts.bench.offload", os.path.abspath(bundle)]
    command += ["--child", mode, "--options", json.dumps(options)]
    command += ["--threads", str(threads)] if threads else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"mode": mode, "failed": done.returncode, "said": done.stderr[-500:]}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--modes", default="block,held,none")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "big" / "offload.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        told = draw(given.bundle, given.child, json.loads(given.options), given.threads)
        print(json.dumps(told))
        return
    options = {"steps": given.steps, "height": given.height, "width": given.width, "seed": 1}
    rows: list[dict[str, Any]] = []
    pictures: dict[str, bytes] = {}
    for mode in given.modes.split(","):
        row = child(given.bundle, mode, options, given.threads)
        rows.append(row)
        if "failed" in row:
            print(f"{mode}: ended with {row['failed']}: {row['said'].strip()[-200:]}")
            continue
        pictures[mode] = bytes.fromhex(row.pop("pixels"))
        print(
            f"{mode}: peak {row['peak_bytes'] / 1e9:.2f} GB for weights of"
            f" {row['weights_bytes']['computed'] / 1e9:.2f} GB in float32; {row['draw_s']} s,"
            f" {row['step_s']} s a step, waited {row['waited_s']} s",
            flush=True,
        )
    first = next(iter(pictures.values()), b"")
    for row in rows:
        if row["mode"] in pictures:
            pairs = zip(first, pictures[row["mode"]], strict=True)
            row["largest_difference"] = max(abs(a - b) for a, b in pairs)
    images = {pictures[mode] for mode in ("block", "held") if mode in pictures}
    answer = {
        "command": " ".join(["python", "-m", "scripts.bench.offload", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": [round(value, 1) for value in os.getloadavg()],
        "options": options,
        "same_image": len(images) == 1,
        "modes": rows,
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    temporary = given.json.with_name(f".{given.json.name}.tmp")
    temporary.write_text(json.dumps(answer, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, given.json)
    if len(images) > 1:
        sys.exit("streamed and held blocks draw different pictures")


if __name__ == "__main__":
    main()
