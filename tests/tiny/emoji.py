"""A folder of pictures as the emoji world wants it: glyphs drawn by seed, no foreign art."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

LETTERS = "abcdefghijklmnopqrst"
CATEGORIES = ("Food & Drink", "Flags", "Objects")


def picture(seed: int) -> Image.Image:
    """Three shapes in three colours on nothing, 64 x 64 RGBA."""
    rng = np.random.default_rng([seed, 64])
    image = Image.new("RGBA", (64, 64))
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = (int(v) for v in rng.integers(2, 34, 2))
        box = (x, y, x + int(rng.integers(14, 28)), y + int(rng.integers(14, 28)))
        colour = (*(int(v) for v in rng.integers(0, 256, 3)), 255)
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)(box, fill=colour)
    return image


def name(number: int) -> str:
    """Three letters or more, another for every number."""
    return "glyph " + LETTERS[number // 20] * 2 + LETTERS[number % 20]


def row(number: int, **more: object) -> dict[str, object]:
    """What emoji.json says of a glyph."""
    found: dict[str, object] = {
        "name": name(number).upper(),
        "short_names": [name(number).replace(" ", "_")],
        "image": f"1f{number:03x}.png",
        "category": CATEGORIES[number % 3],
        "added_in": "0.6" if number % 2 else "11.0",
        "sort_order": number,
    }
    return found | more


def make_art(folder: Path, count: int) -> Path:
    """`folder` with emoji.json and `count` pictures, all far apart."""
    pictures = folder / "img/google/64"
    pictures.mkdir(parents=True)
    for number in range(count):
        picture(number).save(pictures / f"1f{number:03x}.png")
    (folder / "emoji.json").write_text(json.dumps([row(number) for number in range(count)]))
    return folder
