"""The shapes suite: generate from held-out captions, verify each image, count, and show.

Our stand-in for GenEval's score: the share of prompts whose image shows exactly what the prompt
says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calib.score import grid, loop
from calib.score.rates import rate
from calib.shapes.verify import Verdict, verify
from calib.shapes.world import CATEGORIES, Scene, World, eval_scenes

Generate = loop.Generate
Progress = loop.Progress
Sample = loop.Sample[Scene, Verdict]


def evaluate(
    generate: Generate,
    n: int = 600,
    seed: int = 0,
    world: World | None = None,
    batch: int = 16,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Sample]]:
    """Score `generate(prompts, seeds) -> images` on n held-out captions of a world.

    Seeds and errors as `calib.score.loop.judged`; images_per_second counts the time inside
    `generate` only.

    Returns the result (JSON types: suite, n, seed, overall, categories, images_per_second;
    overall is the mean over all prompts) and all samples in order. Raises ValueError if n is not
    positive.
    """
    world = world or World()
    scenes = eval_scenes(world, n, seed)
    samples, seconds = loop.judged(
        generate,
        scenes,
        seed,
        world.size,
        lambda image, scene: verify(image, scene, world),
        batch,
        progress,
    )
    result = {"suite": "shapes", "n": n, "seed": seed, **scores(samples)}
    result["images_per_second"] = round(n / max(seconds, 1e-9), 3)
    return result, samples


def scores(samples: Sequence[Sample]) -> dict[str, Any]:
    """{"overall": rate, "categories": {name: rate}}, a rate being score, low, high, n.

    Categories without a sample are left out. Raises ValueError if there are no samples at all.
    """
    verdicts: dict[str, list[bool]] = {name: [] for name in CATEGORIES}
    for sample in samples:
        verdicts[sample.scene.category].append(sample.verdict.ok)
    return {
        "overall": rate([ok for oks in verdicts.values() for ok in oks]),
        "categories": {name: rate(oks) for name, oks in verdicts.items() if oks},
    }


def save_grid(samples: Sequence[Sample], path: str | Path, per_category: int = 7) -> None:
    """A labelled image grid, PNG: a row per category with its score and its first samples.

    As `calib.score.grid.save_grid`. Raises ValueError if there are no samples.
    """
    if not samples:
        raise ValueError("save_grid needs at least one sample")
    grid.save_grid(samples, path, per_category, "shapes", scores(samples))
