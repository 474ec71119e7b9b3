"""Two models on the same captions and the same noise: counted image by image, and shown so."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from calib.score.grid import INK, PAD, PAPER, RULE, TEXT_SIZE, TITLE_SIZE, paste, wrapped
from calib.score.loop import Sample
from runtime.files.atomic import write_bytes

SHOWN = 8  # pairs of a sheet
SIDE = 128  # pixels of an image, at least


def paired(first: Sequence[Sample[Any, Any]], second: Sequence[Sample[Any, Any]]) -> dict[str, int]:
    """How often both, one alone or neither showed what the caption says: counts of captions.

    ValueError where the two have not the same captions and seeds.
    """
    check_pairs(first, second)
    oks = [(one.verdict.ok, two.verdict.ok) for one, two in zip(first, second)]
    return {
        "both": oks.count((True, True)),
        "first_only": oks.count((True, False)),
        "second_only": oks.count((False, True)),
        "neither": oks.count((False, False)),
    }


def check_pairs(first: Sequence[Sample[Any, Any]], second: Sequence[Sample[Any, Any]]) -> None:
    """ValueError unless both have the same captions and seeds in the same order."""
    keys = [[(sample.scene.caption, sample.seed) for sample in each] for each in (first, second)]
    if not first or keys[0] != keys[1]:
        raise ValueError("two models are compared on the same captions and seeds, at least one")


def save_pairs(
    first: Sequence[Sample[Any, Any]],
    second: Sequence[Sample[Any, Any]],
    names: tuple[str, str],
    path: str | Path,
) -> None:
    """A PNG of the first pair of every category and then of the next ones: one model a row.

    The first and not the best. A green border marks an image that passed, a red one another. names:
    a line for each row. Written whole or not at all.
    """
    check_pairs(first, second)
    order = sorted(range(len(first)), key=lambda i: (_place(first, i), i))[:SHOWN]
    side = first[0].image.shape[0]
    side *= max(1, SIDE // side)
    cell, line = side + 3 * PAD, TEXT_SIZE + 4
    title, text = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(TEXT_SIZE)
    captions = [wrapped(first[i].scene.caption, cell - PAD, text) for i in order]
    row = TITLE_SIZE + 2 * PAD + side + PAD
    height = 2 * row + line * max(map(len, captions)) + PAD
    sheet = Image.new("RGB", (PAD + cell * len(order), height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (name, samples) in enumerate(zip(names, (first, second))):
        top = index * row
        pen.text((PAD, top + PAD), name, INK, title)
        for column, i in enumerate(order):
            paste(sheet, samples[i], PAD + column * cell, top + TITLE_SIZE + 2 * PAD, side)
    pen.line((PAD, 2 * row, sheet.width - PAD, 2 * row), RULE)
    for column, lines in enumerate(captions):
        for number, words in enumerate(lines):
            pen.text((PAD + column * cell, 2 * row + 4 + number * line), words, INK, text)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    write_bytes(Path(path), png.getvalue())


def _place(samples: Sequence[Sample[Any, Any]], index: int) -> int:
    """Which sample of its category one is."""
    category = samples[index].scene.category
    return sum(sample.scene.category == category for sample in samples[:index])
