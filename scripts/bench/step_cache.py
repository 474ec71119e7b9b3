"""Step caching on a world: steps skipped, error against uncached latents, score, processor time.

    python -m scripts.bench.step_cache [BUNDLE] [--suite shapes] [--n 200] [--steps 16,28]
                                       [--json FILE]

Every method generates the same held-out captions from the same noise, block by block, so that
caching is all that differs. The error of an image is the norm of its latents' difference from the
uncached ones over the norm of these. Time is the process's own on one thread; the methods take
turns with every batch, and ratios are medians over batches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scripts.figures import ROOT, machine, options, ratios, write_figures

METHODS = (
    "none",
    "first-block:0.1",
    "first-block:0.2",
    "taylor:first-block:0.2",
    "interval:2",
    "taylor:interval:2",
    "taylor:interval:3",
)


class Turns:
    """A bundle by several methods, which take turns with every batch; keeps what images took."""

    def __init__(self, pipeline: Any, steps: int, methods: Sequence[str]) -> None:
        self.pipeline, self.steps = pipeline, steps
        self.seconds: dict[str, list[float]] = {cache: [] for cache in methods}
        self.skipped: dict[str, list[float]] = {cache: [] for cache in methods}
        self.latents: dict[str, list[np.ndarray]] = {cache: [] for cache in methods}
        self.images: dict[tuple[str, tuple[int, ...]], Any] = {}
        for cache in methods:  # what opens and grows does so now
            pipeline("", steps=steps, cache=cache)

    def by(self, cache: str) -> Callable[[Sequence[str], Sequence[int]], Any]:
        """The method as a suite's evaluation calls it."""

        def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
            if (cache, tuple(seeds)) not in self.images:
                for each in self.seconds:
                    self.images[each, tuple(seeds)] = self.batch(each, prompts, seeds)
            return self.images.pop((cache, tuple(seeds)))

        return generate

    def batch(self, cache: str, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        """Images of prompts."""
        from runtime.image import settings_of

        last = np.zeros(0)

        def keep(done: int, steps: int, latents: np.ndarray) -> None:
            nonlocal last
            last = latents

        began = time.process_time()
        images = self.pipeline(
            list(prompts), seed=list(seeds), steps=self.steps, cache=cache, callback=keep
        )
        self.seconds[cache].append((time.process_time() - began) / len(images))
        self.skipped[cache] += [settings_of(image).get("steps_skipped", 0.0) for image in images]
        self.latents[cache] += list(last.reshape(len(images), -1).astype(np.float64))
        return images


def errors(found: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> list[float]:
    """Of every image, |latents - uncached| / |uncached|."""
    return [
        float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, exact, strict=True)
    ]


def row_of(made: Turns, cache: str, plain: str, score: dict[str, Any]) -> dict[str, Any]:
    """A method's figures; `plain`: the uncached one."""
    found = errors(made.latents[cache], made.latents[plain])
    skipped = made.skipped[cache]
    return {
        "steps": made.steps,
        "cache": cache,
        "steps_skipped": round(float(np.mean(skipped)), 3),
        "steps_skipped_range": [min(skipped), max(skipped)],
        "error": round(float(np.mean(found)), 5),
        "error_95_percent": round(float(np.quantile(found, 0.95)), 5),
        "score": score["overall"],
        "cpu_s_an_image": round(statistics.median(made.seconds[cache]), 4),
        **ratios(made.seconds[plain], made.seconds[cache]),
    }


def main() -> None:
    """Parse, generate, judge, print, write."""
    parser = options(__doc__)
    parser.add_argument("bundle", nargs="?", default=str(ROOT / "runtime" / "default"))
    parser.add_argument("--suite", default="shapes", choices=("shapes", "emoji"))
    parser.add_argument("--n", type=int, default=200, help="captions")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=numbers, default=(16, 28), help="such as 16,28")
    parser.add_argument("--methods", type=lambda text: tuple(text.split(",")), default=METHODS)
    arguments = parser.parse_args()
    if arguments.json is None:
        arguments.json = ROOT / "results" / arguments.suite / "step_cache.json"
    from calib.suites import suite_named
    from runtime.pipeline import Pipeline

    suite = suite_named(arguments.suite)
    pipeline = Pipeline(
        arguments.bundle, "ort", threads=1, mode="blocks", max_batch=arguments.batch
    )
    pixels = int(pipeline.manifest["defaults"]["height"])
    rows = []
    columns = ("steps", "cache", "skipped", "error", "score", "cpu s", "speedup")
    print("{:>5}  {:<24}{:>9}{:>9}{:>9}{:>9}{:>9}".format(*columns))
    methods = tuple(dict.fromkeys(("none", *arguments.methods)))
    for steps in arguments.steps:
        made = Turns(pipeline, steps, methods)
        for cache in methods:
            score, _ = suite.evaluate(
                made.by(cache), arguments.n, 0, suite.world(pixels, {}), batch=arguments.batch
            )
            row = row_of(made, cache, "none", score)
            rows.append(row)
            figures = (row["steps_skipped"], row["error"], row["score"]["score"])
            print(
                f"{steps:>5}  {cache:<24}" + "".join(f"{value:>9.3f}" for value in figures),
                f"{row['cpu_s_an_image']:>8.3f}{row['speedup']:>9.2f}",
                flush=True,
            )
    facts = ("name", "kind", "compute_dtype", "top_k", "kappa", "parameters")
    answer = {
        "machine": machine(1, "numpy", "onnxruntime"),
        "bundle": {name: pipeline.manifest.get(name) for name in facts},
        "suite": arguments.suite,
        "n": arguments.n,
        "rows": rows,
    }
    write_figures(arguments.json, "scripts.bench.step_cache", answer)


def numbers(text: str) -> tuple[int, ...]:
    """'16,28' -> (16, 28)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers such as 16,28") from None


if __name__ == "__main__":
    main()
