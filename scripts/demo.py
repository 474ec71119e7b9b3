"""The whole way once, typed as a person would type it: this script is the tutorial.

Every step is one `d2m` command, printed before it runs, so each can be repeated by hand. Leaves in
OUT: sparse/ (a diffusers pipeline), bundle/, image.png, pairs.png (dense and sparse side by side),
score.json and report.html. At last it measures what a sparse FFN gains where arithmetic counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import shutil
import sys
import time
from pathlib import Path

from d2m.cli import main as d2m
from d2m.units import clock
from runtime.files.atomic import write_bytes

PROMPT = "a photo of a red circle"


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./scripts/demo", description=__doc__)
    parser.add_argument("--dense", default="models/shapes-dense", help="teacher (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="distillation steps (%(default)s)")
    parser.add_argument("--n", type=int, default=36, help="images to evaluate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="what to generate (%(default)s)")
    return parser.parse_args(argv)


def commands(arguments: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(what happens and why, arguments of d2m) for every step."""
    out: Path = arguments.out
    sparse, bundle, seed = str(out / "sparse"), str(out / "bundle"), str(arguments.seed)
    plans = ["--trt-rtx"] if importlib.util.find_spec("tensorrt_rtx") else []
    built = " and TensorRT-RTX plans" if plans else " (no TensorRT-RTX here, so no plans)"
    return [
        (
            "convert: every FFN becomes a shared expert and 12 routed ones, then distillation",
            ["convert", arguments.dense, "-o", sparse, "--steps", str(arguments.steps)]
            + ["--seed", seed, "--score", str(arguments.n)],
        ),
        (f"export: ONNX per block type{built}", ["export", sparse, "-o", bundle, *plans]),
        ("inspect: what is in the bundle", ["inspect", bundle]),
        ("parity: the bundle against torch, part by part", ["parity", sparse, bundle]),
        (
            "run: one image, without torch; every pixel as a square that can be seen",
            ["run", bundle, arguments.prompt, "-o", str(out / "image.png"), "--seed", seed]
            + ["--scale", "8"],
        ),
        (
            "eval: dense and sparse, the same captions and noise, judged by an exact verifier",
            ["eval", arguments.dense, "--vs", bundle, "--n", str(arguments.n), "--seed", seed]
            + ["--out", str(out / "score.json"), "--grid", str(out / "pairs.png")],
        ),
    ]


def gained(width: int = 1024, tokens: int = 512) -> str:
    """What a sparse FFN of a real width gains on this machine: time, and weights that are read.

    The small model's FFNs are too narrow for it: there the sorting of tokens costs what they save.
    """
    from scripts.bench.ffn import measure

    found = measure(width, tokens, runs=5, threads=1)
    dense, low_high = 8 * width * width, found["speedup_range"]
    return (
        f"one FFN of width {width}, {tokens} tokens, in ONNX Runtime on one thread: dense "
        f"{found['dense_ms']:.1f} ms, sparse {found['sparse_ms']:.1f} ms, {found['speedup']:.2f} "
        f"times as fast (pairs: {low_high[0]:.2f} to {low_high[1]:.2f}; arithmetic allows 2.67). "
        f"A token uses {3 * dense // 8 / 1e6:.1f} of {dense / 1e6:.1f} million weights; all of "
        "them stay in memory."
    )


def clear(out: Path) -> None:
    """Remove what an earlier demo made in `out`, and nothing that is not a demo's."""
    marks = {"sparse": "recipe.json", "sparse.work": "run.json", "bundle": "manifest.json"}
    for name, mark in marks.items():
        if (out / name / mark).is_file():
            print(f"removing {out / name}, made by an earlier run", flush=True)
            shutil.rmtree(out / name)


def main(argv: list[str] | None = None) -> int:
    arguments = options(argv)
    began = time.monotonic()
    clear(arguments.out)
    steps = commands(arguments)
    spent: list[tuple[str, float]] = []
    for number, (title, command) in enumerate(steps, 1):
        print(f"\n== {number}/{len(steps)} {title}", flush=True)
        print(f"$ d2m {shlex.join(command)}", flush=True)
        start = time.monotonic()
        code = d2m(command)
        if code:
            print(f"error: step {number} ({title}) ended with exit code {code}", file=sys.stderr)
            return code
        spent.append((command[0], time.monotonic() - start))
    print("\n== what it gains where arithmetic counts: python -m scripts.bench.ffn", flush=True)
    start = time.monotonic()
    print(gained())
    spent.append(("gain", time.monotonic() - start))
    write_bytes(arguments.out / "report.html", (arguments.out / "sparse/report.html").read_bytes())
    times = ", ".join(f"{name} {clock(seconds)}" for name, seconds in spent)
    print(f"\nDone in {clock(time.monotonic() - began)} ({times}).")
    made = {"image": "image.png", "pairs": "pairs.png", "report": "report.html"}
    for name, file in made.items():
        print(f"  {name:<8} {arguments.out / file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
