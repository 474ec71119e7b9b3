"""The shapes world: which scenes exist, how they are captioned, which are held out for evaluation.

Our stand-in for GenEval (ours; the categories and the captions' form are GenEval's). A *content* is
what a caption says (category, things, relation); a caption is a prefix and a content. Nothing here
draws or looks at pixels: see render.py and verify.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Literal

import numpy as np

Split = Literal["train", "eval"]

BACKGROUND = (128, 128, 128)
# The first six are far apart in hue or lightness, and from the grey background: the VAE merges
# colours that are not.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (210, 25, 25),
    "green": (40, 220, 60),
    "blue": (30, 50, 230),
    "yellow": (250, 230, 40),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "orange": (255, 140, 0),
    "purple": (140, 30, 180),
    "cyan": (0, 230, 230),
    "pink": (255, 140, 200),
}
SHAPES: dict[str, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
    "diamond": "diamonds",
    "ring": "rings",
}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = (
    "single_object",
    "two_object",
    "counting",
    "colours",
    "position",
    "colour_attribution",
)

# Prefix before a singular content and before a counted one. Two dozen, so that the quarter of the
# captions that is held out still gives every content several evaluation captions (single_object has
# only four contents in the default world).
PREFIXES: tuple[tuple[str, str], ...] = (
    ("a photo of", "a photo of"),
    ("a picture of", "a picture of"),
    ("an image of", "an image of"),
    ("a drawing of", "a drawing of"),
    ("a painting of", "a painting of"),
    ("a sketch of", "a sketch of"),
    ("a print of", "a print of"),
    ("a view of", "a view of"),
    ("a rendering of", "a rendering of"),
    ("an illustration of", "an illustration of"),
    ("a snapshot of", "a snapshot of"),
    ("a simple photo of", "a simple photo of"),
    ("a plain picture of", "a plain picture of"),
    ("a clear image of", "a clear image of"),
    ("there is", "there are"),
    ("here is", "here are"),
    ("this is", "these are"),
    ("we see", "we see"),
    ("you can see", "you can see"),
    ("draw", "draw"),
    ("paint", "paint"),
    ("show me", "show me"),
    ("please draw", "please draw"),
    ("", ""),
)


@dataclass(frozen=True)
class World:
    """How hard the world is: image side in pixels; how many colours, shapes and counts are in use.

    Raises ValueError for a value outside its range.
    """

    size: int = 32
    colours: int = 6
    shapes: int = 4
    max_count: int = 4

    def __post_init__(self) -> None:
        limits = {
            "size": (32, 256),
            "colours": (2, len(COLOURS)),
            "shapes": (2, len(SHAPES)),
            "max_count": (2, max(NUMBERS)),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(
                    f"World: {name}={value!r} must be a whole number from {low} to {high}"
                )
        if self.size % 8:
            raise ValueError(
                f"World: size={self.size} must be a multiple of 8 (the VAE's patches); "
                f"try {self.size // 8 * 8}"
            )

    @property
    def colour_names(self) -> tuple[str, ...]:
        return tuple(COLOURS)[: self.colours]

    @property
    def shape_names(self) -> tuple[str, ...]:
        return tuple(SHAPES)[: self.shapes]


@dataclass(frozen=True)
class Thing:
    """One object of a scene; colour None: the caption leaves it free."""

    shape: str
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: exactly these things, the first in `relation` to the second."""

    category: str
    things: tuple[Thing, ...]
    relation: str | None
    caption: str


@cache
def heldout_pairs(world: World) -> frozenset[tuple[str, str]]:
    """(colour, shape) pairs that no training image or caption shows.

    The diagonals (colour index + shape index) % 6 == 3: 4 of the 24 in the default world, at most
    one per colour and two per shape, and the same pairs in every world that has them.
    """
    return frozenset(
        (colour, shape)
        for i, colour in enumerate(world.colour_names)
        for j, shape in enumerate(world.shape_names)
        if (i + j) % 6 == 3
    )


def caption_split(caption: str) -> Split:
    """The split of a caption that names no held-out pair: a quarter is "eval", by its sha256."""
    return "eval" if hashlib.sha256(caption.encode()).digest()[0] < 64 else "train"


def noun(thing: Thing) -> str:
    """The thing with its article: 'a circle', 'an orange square'."""
    words = f"{thing.colour} {thing.shape}" if thing.colour else thing.shape
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


Content = tuple[tuple[Thing, ...], str | None, str]


def contents(world: World, category: str) -> list[Content]:
    """All (things, relation, words) of a category. Raises ValueError for an unknown category."""
    shapes, colours = world.shape_names, world.colour_names
    if category == "counting":
        return [
            ((Thing(s),) * n, None, f"{NUMBERS[n]} {SHAPES[s]}")
            for n in range(2, world.max_count + 1)
            for s in shapes
        ]
    if category == "position":
        return [
            ((Thing(a), Thing(b)), relation, f"{noun(Thing(a))} {relation} {noun(Thing(b))}")
            for a, b in permutations(shapes, 2)
            for relation in RELATIONS
        ]
    rows: list[tuple[Thing, ...]]
    if category == "single_object":
        rows = [(Thing(s),) for s in shapes]
    elif category == "two_object":
        rows = [(Thing(a), Thing(b)) for a, b in permutations(shapes, 2)]
    elif category == "colours":
        rows = [(Thing(s, c),) for c in colours for s in shapes]
    elif category == "colour_attribution":
        rows = [
            (Thing(a, c), Thing(b, d))
            for a, b in permutations(shapes, 2)
            for c, d in permutations(colours, 2)
        ]
    else:
        raise ValueError(f"category {category!r} is not one of {', '.join(CATEGORIES)}")
    return [(things, None, " and ".join(noun(t) for t in things)) for things in rows]


@cache
def catalogue(world: World, category: str, split: Split) -> tuple[tuple[Scene, ...], ...]:
    """All scenes of a category and split, grouped by content (contents without any left out).

    A caption that names a held-out pair is "eval" whatever its hash.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r} must be 'train' or 'eval'")
    held = heldout_pairs(world)
    groups = []
    for things, relation, words in contents(world, category):
        pair_held = any((t.colour, t.shape) in held for t in things)
        group = []
        for singular, plural in PREFIXES:
            caption = f"{plural if category == 'counting' else singular} {words}".strip()
            if ("eval" if pair_held else caption_split(caption)) == split:
                group.append(Scene(category, things, relation, caption))
        if group:
            groups.append(tuple(group))
    return tuple(groups)


def sample_scene(
    world: World, rng: np.random.Generator, split: Split, category: str | None = None
) -> Scene:
    """A random scene: category (uniform if None), then content, then prefix, each uniform.

    Choosing the content first keeps held-out pairs at their natural share of "eval" (1/6 of
    `colours`), although all of their captions and only a quarter of the others are in it.
    """
    if category is None:
        category = CATEGORIES[rng.integers(len(CATEGORIES))]
    groups = catalogue(world, category, split)
    group = groups[rng.integers(len(groups))]
    return group[rng.integers(len(group))]


def eval_scenes(world: World, n: int, seed: int) -> list[Scene]:
    """n evaluation scenes, n // 6 per category and the remainder to the first; fixed by the seed.

    Interleaved by category, so any beginning of the list is balanced too. Within a category
    contents come round in turn, each time with a caption not used before, so no caption repeats
    before all of the category's are used. Raises ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1 evaluation scene")
    rng = np.random.default_rng(seed)
    wanted = [n // 6 + (i < n % 6) for i in range(6)]
    columns = [
        _eval_column(world, category, k, rng)
        for category, k in zip(CATEGORIES, wanted, strict=True)
    ]
    return [column[i] for i in range(max(wanted)) for column in columns if i < len(column)]


def _eval_column(world: World, category: str, n: int, rng: np.random.Generator) -> list[Scene]:
    groups = catalogue(world, category, "eval")
    column: list[Scene] = []
    while len(column) < n:  # one pass uses every caption once; only then do captions repeat
        queues = [[group[i] for i in rng.permutation(len(group))] for group in groups]
        order = rng.permutation(len(queues))
        while any(queues):
            column += [queues[i].pop() for i in order if queues[i]]
    return column[:n]


def vocabulary(world: World | None = None) -> list[str]:
    """All words of all captions, sorted.

    Always those of the largest world, whichever is given: a tokenizer then fits every world.
    """
    words = {"a", "an", "and", *COLOURS, *SHAPES, *SHAPES.values(), *NUMBERS.values()}
    for phrase in (*RELATIONS, *(p for pair in PREFIXES for p in pair)):
        words.update(phrase.split())
    return sorted(words)
