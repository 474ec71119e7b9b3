"""The whole way once, typed as a person would type it: this script is the tutorial.

Every step is one `d2m` command, printed before it runs, so each can be repeated by hand. Leaves in
OUT: sparse/ (a diffusers pipeline), bundle/, image.png, grid.png, score.json and report.html.
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
    parser.add_argument("--n", type=int, default=36, help="pictures to evaluate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="what to draw (%(default)s)")
    return parser.parse_args(argv)


def commands(wanted: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(what happens and why, arguments of d2m) for every step."""
    out: Path = wanted.out
    sparse, bundle, seed = str(out / "sparse"), str(out / "bundle"), str(wanted.seed)
    plans = ["--trt-rtx"] if importlib.util.find_spec("tensorrt_rtx") else []
    built = " and TensorRT-RTX plans" if plans else " (no TensorRT-RTX here, so no plans)"
    return [
        (
            "convert: every FFN becomes a shared expert and 12 routed ones, then distillation",
            ["convert", wanted.dense, "-o", sparse, "--steps", str(wanted.steps), "--seed", seed]
            + ["--score", str(wanted.n)],
        ),
        (f"export: ONNX per block type{built}", ["export", sparse, "-o", bundle, *plans]),
        ("inspect: what is in the bundle", ["inspect", bundle]),
        ("parity: the bundle against torch, part by part", ["parity", sparse, bundle]),
        (
            "run: one picture, without torch",
            ["run", bundle, wanted.prompt, "-o", str(out / "image.png"), "--seed", seed],
        ),
        (
            "eval: pictures of held-out captions, judged by an exact verifier",
            ["eval", bundle, "--n", str(wanted.n), "--seed", seed]
            + ["--out", str(out / "score.json"), "--grid", str(out / "grid.png")],
        ),
    ]


def clear(out: Path) -> None:
    """Remove what an earlier demo made in `out`, and nothing that is not a demo's."""
    marks = {"sparse": "recipe.json", "sparse.work": "run.json", "bundle": "manifest.json"}
    for name, mark in marks.items():
        if (out / name / mark).is_file():
            print(f"removing {out / name}, made by an earlier run", flush=True)
            shutil.rmtree(out / name)


def main(argv: list[str] | None = None) -> int:
    wanted = options(argv)
    began = time.monotonic()
    clear(wanted.out)
    steps = commands(wanted)
    spent: list[tuple[str, float]] = []
    for number, (title, arguments) in enumerate(steps, 1):
        print(f"\n== {number}/{len(steps)} {title}", flush=True)
        print(f"$ d2m {shlex.join(arguments)}", flush=True)
        start = time.monotonic()
        code = d2m(arguments)
        if code:
            print(f"error: step {number} ({title}) ended with exit code {code}", file=sys.stderr)
            return code
        spent.append((arguments[0], time.monotonic() - start))
    write_bytes(wanted.out / "report.html", (wanted.out / "sparse/report.html").read_bytes())
    times = ", ".join(f"{name} {clock(seconds)}" for name, seconds in spent)
    print(f"\nDone in {clock(time.monotonic() - began)} ({times}).")
    print(f"  picture  {wanted.out / 'image.png'}\n  report   {wanted.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
