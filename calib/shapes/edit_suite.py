"""The editing suite of shapes: edit by held-out instructions, verify, count, and show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from calib.score import grid, loop
from calib.score.rates import rate
from calib.shapes.edit_verify import verify_edit
from calib.shapes.edits import KINDS, Edit, eval_edits
from calib.shapes.verify import Verdict
from calib.shapes.world import World

Sample = loop.Sample[Edit, Verdict]


def evaluate(
    generate: loop.Generate,
    n: int = 600,
    seed: int = 0,
    world: World | None = None,
    batch: int = 16,
    progress: loop.Progress | None = None,
) -> tuple[dict[str, Any], list[Sample]]:
    """Score `generate(instructions, seeds, images before) -> images` on n held-out edits.

    Result, seeds and errors as `calib.shapes.suite.evaluate`; categories are KINDS.
    """
    world = world or World()
    edits = eval_edits(world, n, seed)
    samples, seconds = loop.judged(
        generate,
        edits,
        seed,
        world.size,
        lambda image, edit: verify_edit(image, edit.images(world)[0], edit, world),
        batch,
        progress,
        before=lambda edit: Image.fromarray(edit.images(world)[0]),
    )
    result = {"suite": "shapes-edit", "n": n, "seed": seed, **scores(samples)}
    result["images_per_second"] = round(n / max(seconds, 1e-9), 3)
    return result, samples


def scores(samples: Sequence[Sample]) -> dict[str, Any]:
    """As `calib.shapes.suite.scores`, by kind of edit."""
    verdicts = {kind: [s.verdict.ok for s in samples if s.scene.category == kind] for kind in KINDS}
    return {
        "overall": rate([sample.verdict.ok for sample in samples]),
        "categories": {kind: rate(oks) for kind, oks in verdicts.items() if oks},
    }


def save_grid(samples: Sequence[Sample], path: str | Path, per_category: int = 6) -> None:
    """As `calib.shapes.suite.save_grid`; the image before stands beside each result."""
    grid.save_grid(samples, path, per_category, "shapes-edit", scores(samples))
