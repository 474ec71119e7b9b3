"""Samples as a labelled image grid: what the score counts, to look at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from calib.score.loop import Sample
from calib.score.rates import percent
from runtime.files.atomic import write_bytes

# Layout of the grid, in pixels.
PAD = 12
CELL = 176  # the longest captions take three lines
TITLE_SIZE, TEXT_SIZE = 20, 13
GOOD, BAD = (22, 150, 70), (205, 40, 40)
INK, RULE, PAPER = (25, 25, 25), (215, 215, 215), (255, 255, 255)
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def save_grid(
    samples: Sequence[Sample[Any, Any]],
    path: str | Path,
    per_category: int,
    suite: str,
    scores: Mapping[str, Any],
) -> None:
    """A labelled image grid, PNG: a row per category with its score and its first samples.

    The first and not the best: the grid shows what the score counts. A green border marks an
    image that passed; under one that did not stands why. Written whole or not at all. scores: a
    suite's result of the samples, its categories in the order of the rows. Raises ValueError if
    there are no samples.
    """
    if not samples:
        raise ValueError("save_grid needs at least one sample")
    categories = scores["categories"]
    rows = [(c, [s for s in samples if s.scene.category == c][:per_category]) for c in categories]
    rows = [(category, shown) for category, shown in rows if shown]
    side = samples[0].image.shape[0]
    zoom = max(1, 128 // side)  # 4 at 32 px
    cell = max(CELL, _width(samples[0], side * zoom) + PAD)
    title, text = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(TEXT_SIZE)
    line = TEXT_SIZE + 4
    labels = [[_label(sample, cell - PAD, text) for sample in shown] for _, shown in rows]
    heights = [line + PAD + side * zoom + 8 + line * max(map(len, cells)) + PAD for cells in labels]
    width = PAD + cell * max(map(len, labels))
    y = PAD + TITLE_SIZE + PAD
    sheet = Image.new("RGB", (width, y + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((PAD, PAD), f"{suite}: {percent(scores['overall'])}", INK, title)
    for (category, shown), cells, height in zip(rows, labels, heights):
        pen.line((PAD, y, width - PAD, y), RULE)
        score = percent(categories[category])
        pen.text((PAD, y + 4), f"{category.replace('_', ' ')}: {score}", INK, text)
        for column, (sample, lines) in enumerate(zip(shown, cells)):
            left, top = PAD + column * cell, y + line + PAD
            paste(sheet, sample, left, top, side * zoom)
            for i, (words, colour) in enumerate(lines):
                pen.text((left, top + side * zoom + 8 + i * line), words, colour, text)
        y += height
    png = io.BytesIO()
    sheet.save(png, "PNG")
    write_bytes(Path(path), png.getvalue())


def _width(sample: Sample[Any, Any], side: int) -> int:
    """Pixels across of a sample with its borders, two images where one was edited."""
    return 2 * side + PAD + 6 if sample.before is not None else side


def paste(sheet: Image.Image, sample: Sample[Any, Any], x: int, y: int, side: int) -> None:
    """The image, `side` pixels wide, with its border; top left at x, y. Of an edit the image
    before stands to its left."""
    if sample.before is not None:
        before = Image.fromarray(sample.before).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(before, (x + 3, y + 3))
        x += side + PAD
    border = (x, y, x + side + 5, y + side + 5)
    ImageDraw.Draw(sheet).rectangle(border, GOOD if sample.verdict.ok else BAD)
    image = Image.fromarray(sample.image)
    sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x + 3, y + 3))


def _label(
    sample: Sample[Any, Any], width: int, font: Font
) -> list[tuple[str, tuple[int, int, int]]]:
    """Lines and their colours: the caption and, if the image failed, the reason."""
    reason = "" if sample.verdict.ok else sample.verdict.reason
    lines = [(words, INK) for words in wrapped(sample.scene.caption, width, font)]
    return lines + [(words, BAD) for words in wrapped(reason, width, font)]


def wrapped(words: str, width: int, font: Font) -> list[str]:
    """The words in lines of at most `width` pixels."""
    lines: list[str] = []
    for word in words.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
