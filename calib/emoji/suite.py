"""The emoji suite: generate from held-out captions, judge each image by all references, and show.

The score is the share of images that show exactly what the caption says. Beside it stands recall:
the share in which the named emoji is the nearest, or among the nearest five, of all the world has
(in every place of a composition).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calib.emoji.verify import Verdict, verify
from calib.emoji.world import CATEGORIES, COMPOSED, Scene, World, eval_scenes
from calib.score import grid, loop
from calib.score.rates import rate

Sample = loop.Sample[Scene, Verdict]


def evaluate(
    generate: loop.Generate,
    n: int = 1000,
    seed: int = 0,
    world: World | None = None,
    batch: int = 16,
    progress: loop.Progress | None = None,
) -> tuple[dict[str, Any], list[Sample]]:
    """Score `generate(prompts, seeds) -> images` on n held-out captions of the emoji world.

    Seeds and errors as `calib.score.loop.judged`; images_per_second counts the time inside
    `generate` only. Returns the result (JSON types: suite, n, seed, emoji, overall, categories,
    recall, images_per_second) and all samples in order. Raises ValueError if n is not positive,
    FileNotFoundError where the world's pictures are not at hand.
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
    result = {"suite": "emoji", "n": n, "seed": seed, "emoji": len(world.names), **scores(samples)}
    result["images_per_second"] = round(n / max(seconds, 1e-9), 3)
    return result, samples


def scores(samples: Sequence[Sample]) -> dict[str, Any]:
    """{"overall": rate, "categories": {name: rate}, "recall": {"at_1": ..., "at_5": ...}}.

    A rate is score, low, high, n. Recalls have "overall", "composed" (held-out compositions) and
    every category. What has no sample is left out. Raises ValueError if there are none at all.
    """
    return {
        **_rates(samples, lambda verdict: verdict.ok),
        "recall": {
            "at_1": _recall(samples, lambda verdict: verdict.top1),
            "at_5": _recall(samples, lambda verdict: verdict.top5),
        },
    }


def _rates(samples: Sequence[Sample], good: Callable[[Verdict], bool]) -> dict[str, Any]:
    oks = {
        name: [good(sample.verdict) for sample in samples if sample.scene.category == name]
        for name in CATEGORIES
    }
    return {
        "overall": rate([ok for each in oks.values() for ok in each]),
        "categories": {name: rate(each) for name, each in oks.items() if each},
    }


def _recall(samples: Sequence[Sample], good: Callable[[Verdict], bool]) -> dict[str, Any]:
    found = _rates(samples, good)
    composed = [good(s.verdict) for s in samples if s.scene.category in COMPOSED]
    more = {"composed": rate(composed)} if composed else {}
    return {"overall": found["overall"], **more, **found["categories"]}


def save_grid(samples: Sequence[Sample], path: str | Path, per_category: int = 7) -> None:
    """A labelled image grid, PNG: a row per category with its score and its first samples.

    As `calib.score.grid.save_grid`. Raises ValueError if there are no samples.
    """
    if not samples:
        raise ValueError("save_grid needs at least one sample")
    grid.save_grid(samples, path, per_category, "emoji", scores(samples))
