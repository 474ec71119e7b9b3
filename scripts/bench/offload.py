"""Memory and time of a generation with weights streamed block by block, against weights held.

    python -m scripts.bench.offload BUNDLE [--steps 2] [--height H --width W] [--threads N]
                                    [--modes block,held,none] [--json FILE]

Modes: block (streamed), held (block by block too, all weights in memory), none (what d2m run does:
on a CPU the whole graph). Every mode generates in a process of its own, which reports its peak
resident memory (VmHWM of /proc/self/status: all pages, those mapped from files too), the time of
the call, how long blocks had to wait for their weights, and the image. Those of block and held must
be the same to the byte; the whole graph multiplies in another order, so the largest difference of a
pixel is given. Where the model does not fit into memory, ask for --modes block alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from runtime.measure.cold_start import peak
from scripts.figures import ROOT, options, write_figures

PROMPT = "a photo of a red circle"


def peak_bytes() -> int:
    """The most memory this process has held."""
    return round((peak() or 0) * 2**20)


def generate(
    bundle: str, mode: str, settings: dict[str, Any], threads: int | None
) -> dict[str, Any]:
    """One generation in this process, and what it took."""
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
    before = peak_bytes()
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
    image = pipeline(PROMPT, **settings, callback=lambda *_: marks.append(time.perf_counter()))
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
        "peak_bytes": peak_bytes(),
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


def child(bundle: str, mode: str, settings: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """`generate` in a process of its own."""
    command = [sys.executable, "-m", "scripts.bench.offload", os.path.abspath(bundle)]
    command += ["--child", mode, "--options", json.dumps(settings)]
    command += ["--threads", str(threads)] if threads else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"mode": mode, "failed": done.returncode, "said": done.stderr[-500:]}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    """Parse, measure, print, write."""
    parser = options(__doc__, "big/offload.json")
    parser.add_argument("bundle")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--modes", default="block,held,none")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        settings = json.loads(arguments.options)
        print(json.dumps(generate(arguments.bundle, arguments.child, settings, arguments.threads)))
        return
    settings = {name: getattr(arguments, name) for name in ("steps", "height", "width")}
    settings["seed"] = 1
    rows: list[dict[str, Any]] = []
    images: dict[str, bytes] = {}
    for mode in arguments.modes.split(","):
        row = child(arguments.bundle, mode, settings, arguments.threads)
        rows.append(row)
        if "failed" in row:
            print(f"{mode}: ended with {row['failed']}: {row['said'].strip()[-200:]}")
            continue
        images[mode] = bytes.fromhex(row.pop("pixels"))
        print(
            f"{mode}: peak {row['peak_bytes'] / 1e9:.2f} GB for weights of"
            f" {row['weights_bytes']['computed'] / 1e9:.2f} GB in float32; {row['draw_s']} s,"
            f" {row['step_s']} s a step, waited {row['waited_s']} s",
            flush=True,
        )
    first = next(iter(images.values()), b"")
    for row in rows:
        if row["mode"] in images:
            pairs = zip(first, images[row["mode"]], strict=True)
            row["largest_difference"] = max(abs(a - b) for a, b in pairs)
    distinct = {images[mode] for mode in ("block", "held") if mode in images}
    answer = {
        "cpus": len(os.sched_getaffinity(0)),
        "load": [round(value, 1) for value in os.getloadavg()],
        "options": settings,
        "same_image": len(distinct) == 1,
        "modes": rows,
    }
    write_figures(arguments.json, "scripts.bench.offload", answer)
    if len(distinct) > 1:
        sys.exit("streamed and held blocks generate different images")


if __name__ == "__main__":
    main()
