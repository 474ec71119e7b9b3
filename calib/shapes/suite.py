"""The shapes suite: generate from held-out captions, verify each image, count, and show.

Our stand-in for GenEval's score: the share of prompts whose image shows exactly what the prompt
says.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from calib.shapes.verify import Verdict, verify
from calib.shapes.world import CATEGORIES, Scene, World, eval_scenes
from runtime.files.atomic import write_bytes

Generate = Callable[[list[str], list[int]], Sequence[Image.Image]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sample:
    """One prompt of the suite: scene, seed, the image (uint8 [S, S, 3]) and the verdict."""

    scene: Scene
    seed: int
    image: np.ndarray
    verdict: Verdict


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (low, high) for a proportion; z = 1.959964 gives 95 %.

    Unlike the normal interval it stays inside 0..1 and is right near the ends. Raises ValueError if
    n < 1 or successes is not in 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"wilson: {successes} of {n} is no proportion; expected 0 <= successes <= n"
        )
    p, z2 = successes / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    # At 0 and n one end is exact; rounding would leave it a hair outside.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def evaluate(
    generate: Generate,
    n: int = 600,
    seed: int = 0,
    world: World | None = None,
    batch: int = 16,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Sample]]:
    """Score `generate(prompts, seeds) -> images` on n held-out captions of a world.

    Prompt i gets image seed `seed * 1_000_000 + i`, whatever the batch, so that two models see
    the same captions and noise. `progress(done, n)` is called after every batch.
    images_per_second counts the time inside `generate` only.

    Returns the result (JSON types: suite, n, seed, overall, categories, images_per_second;
    overall is the mean over all prompts) and all samples in order. Raises ValueError if
    n or batch is not positive, or if `generate` returns another number of images or another size.
    """
    world = world or World()
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    scenes = eval_scenes(world, n, seed)
    samples: list[Sample] = []
    seconds = 0.0
    for start in range(0, n, batch):
        part = scenes[start : start + batch]
        seeds = [seed * 1_000_000 + start + i for i in range(len(part))]
        before = time.perf_counter()
        images = generate([scene.caption for scene in part], seeds)
        seconds += time.perf_counter() - before
        if len(images) != len(part):
            raise ValueError(f"generate returned {len(images)} images for {len(part)} prompts")
        for scene, image_seed, generated in zip(part, seeds, images):
            image = _pixels(generated, world)
            samples.append(Sample(scene, image_seed, image, verify(image, scene, world)))
        if progress:
            progress(len(samples), n)
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
        "overall": _rate([ok for oks in verdicts.values() for ok in oks]),
        "categories": {name: _rate(oks) for name, oks in verdicts.items() if oks},
    }


def _rate(oks: Sequence[bool]) -> dict[str, float | int]:
    low, high = wilson(sum(oks), len(oks))
    n = len(oks)
    return {"score": round(sum(oks) / n, 4), "low": round(low, 4), "high": round(high, 4), "n": n}


def _pixels(image: Image.Image, world: World) -> np.ndarray:
    if image.size != (world.size, world.size):
        width, height = image.size
        raise ValueError(
            f"generate returned an image of {width} x {height} pixels, the world's are "
            f"{world.size} x {world.size}; generate at that size or evaluate with "
            f"World(size={height})"
        )
    return np.asarray(image.convert("RGB"))


# Layout of the grid, in pixels.
PAD = 12
CELL = 176  # the longest captions take three lines
TITLE_SIZE, TEXT_SIZE = 20, 13
GOOD, BAD = (22, 150, 70), (205, 40, 40)
INK, RULE, PAPER = (25, 25, 25), (215, 215, 215), (255, 255, 255)
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def save_grid(samples: Sequence[Sample], path: str | Path, per_category: int = 7) -> None:
    """A labelled image grid, PNG: a row per category with its score and its first samples.

    The first and not the best: the grid shows what the score counts. A green border marks an
    image that passed; under one that did not stands why. Written whole or
    not at all. Raises ValueError if there are no samples.
    """
    if not samples:
        raise ValueError("save_grid needs at least one sample")
    summary = scores(samples)
    rows = [(c, [s for s in samples if s.scene.category == c][:per_category]) for c in CATEGORIES]
    rows = [(category, shown) for category, shown in rows if shown]
    side = samples[0].image.shape[0]
    zoom = max(1, 128 // side)  # 4 at 32 px
    cell = max(CELL, side * zoom + PAD)
    title, text = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(TEXT_SIZE)
    line = TEXT_SIZE + 4
    labels = [[_label(sample, cell - PAD, text) for sample in shown] for _, shown in rows]
    heights = [line + PAD + side * zoom + 8 + line * max(map(len, cells)) + PAD for cells in labels]
    width = PAD + cell * max(map(len, labels))
    y = PAD + TITLE_SIZE + PAD
    sheet = Image.new("RGB", (width, y + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((PAD, PAD), f"shapes: {_percent(summary['overall'])}", INK, title)
    for (category, shown), cells, height in zip(rows, labels, heights):
        pen.line((PAD, y, width - PAD, y), RULE)
        score = _percent(summary["categories"][category])
        pen.text((PAD, y + 4), f"{category.replace('_', ' ')}: {score}", INK, text)
        for column, (sample, lines) in enumerate(zip(shown, cells)):
            left, top = PAD + column * cell, y + line + PAD
            _paste(sheet, sample, left, top, side * zoom)
            for i, (words, colour) in enumerate(lines):
                pen.text((left, top + side * zoom + 8 + i * line), words, colour, text)
        y += height
    png = io.BytesIO()
    sheet.save(png, "PNG")
    write_bytes(Path(path), png.getvalue())


def _percent(rate: dict[str, float | int]) -> str:
    return f"{rate['score']:.1%} ({rate['low']:.1%} to {rate['high']:.1%}, n = {rate['n']})"


def _paste(sheet: Image.Image, sample: Sample, x: int, y: int, side: int) -> None:
    """The image, `side` pixels wide, with its border; top left at x, y."""
    border = (x, y, x + side + 5, y + side + 5)
    ImageDraw.Draw(sheet).rectangle(border, GOOD if sample.verdict.ok else BAD)
    image = Image.fromarray(sample.image)
    sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x + 3, y + 3))


def _label(sample: Sample, width: int, font: Font) -> list[tuple[str, tuple[int, int, int]]]:
    """Lines and their colours: the caption and, if the image failed, the reason."""
    reason = "" if sample.verdict.ok else sample.verdict.reason
    lines = [(words, INK) for words in _wrapped(sample.scene.caption, width, font)]
    return lines + [(words, BAD) for words in _wrapped(reason, width, font)]


def _wrapped(words: str, width: int, font: Font) -> list[str]:
    """The words in lines of at most `width` pixels."""
    lines: list[str] = []
    for word in words.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
