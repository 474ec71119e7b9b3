"""The emoji world: which scenes exist, how they are captioned, which are held out for evaluation.

A *content* is what a caption says; a caption is a prefix and a content. Nothing here draws or looks
at pixels: see render.py and verify.py.

    single      one emoji fills the image, on white; a quarter of the captions held out
    background  the same on a colour; a quarter of the (emoji, colour) pairs held out
    pair        two emoji at half size, side by side or stacked; a quarter of the pairs held out
    count       two or three of one emoji at half size; a quarter of (emoji, number) held out
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from calib.emoji.art import SIDE, find_art
from calib.emoji.choice import COUNT, Catalogue, catalogue

Split = Literal["train", "eval"]

CATEGORIES = ("single", "background", "pair", "count")
COMPOSED = CATEGORIES[1:]  # their contents are held out, not only their captions
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "twice", 3: "three times"}
WHITE = "white"
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    WHITE: (255, 255, 255),
    "grey": (150, 150, 150),
    "black": (20, 20, 20),
    "red": (200, 60, 60),
    "orange": (255, 170, 80),
    "yellow": (250, 235, 120),
    "green": (120, 200, 120),
    "blue": (70, 120, 220),
    "purple": (150, 100, 200),
}
COLOURS = tuple(name for name in BACKGROUNDS if name != WHITE)
# At most two words: with names of three words a caption then has ten at most.
PREFIXES = ("", "draw", "show", "a", "show me", "picture of", "draw me", "see the")


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: these emoji, the first in `relation` to the second."""

    category: str
    things: tuple[str, ...]
    relation: str | None
    background: str
    caption: str


@dataclass(frozen=True)
class World:
    """How large the world is, and where its pictures lie.

    count: emoji, the best known first. seed: of what is held out. folder: pictures, by default
    those that `python -m calib.emoji` fetched. Raises ValueError for a value outside its range.
    """

    count: int = COUNT
    seed: int = 0
    folder: Path | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("count", 2, 2000), ("seed", 0, 2**31)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(
                    f"World: {name}={value!r} must be a whole number from {low} to {high}"
                )

    @property
    def size(self) -> int:
        """Side of an image in pixels."""
        return SIDE

    @cached_property
    def catalogue(self) -> Catalogue:
        """Names and pictures; FileNotFoundError where the pictures are not at hand."""
        return catalogue(find_art(self.folder), self.count)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.catalogue.emoji)


def held_out(world: World, *content: str | int) -> bool:
    """Whether a content is in no training image: a quarter is, by its SHA-256 and the seed."""
    text = "/".join(map(str, (world.seed, *content)))
    return hashlib.sha256(text.encode()).digest()[0] < 64


def split_of(world: World, scene: Scene) -> Split:
    """The split that a scene belongs to."""
    if scene.category == "single":
        out = held_out(world, scene.caption)
    elif scene.category == "background":
        out = held_out(world, scene.things[0], scene.background)
    elif scene.category == "pair":
        out = held_out(world, *sorted(scene.things))
    else:
        out = held_out(world, scene.things[0], len(scene.things))
    return "eval" if out else "train"


def words_of(scene_things: tuple[str, ...], relation: str | None, background: str) -> str:
    """A content in words: 'pizza on blue background', 'pizza left of dog', 'pizza twice'."""
    first = scene_things[0]
    if relation:
        return f"{first} {relation} {scene_things[1]}"
    if len(scene_things) > 1:
        return f"{first} {NUMBERS[len(scene_things)]}"
    return first if background == WHITE else f"{first} on {background} background"


def sample_scene(
    world: World, rng: np.random.Generator, split: Split, category: str | None = None
) -> Scene:
    """A random scene: category (uniform if None), then emoji, then the rest, each uniform.

    ValueError for an unknown category or split, or where the split has none.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r} must be 'train' or 'eval'")
    if category is None:
        category = CATEGORIES[rng.integers(len(CATEGORIES))]
    first = int(rng.integers(len(world.names)))
    return scene_with(world, rng, split, category, first)


def scene_with(
    world: World, rng: np.random.Generator, split: Split, category: str, first: int
) -> Scene:
    """A random scene of a category whose first emoji is number `first`, as `sample_scene`.

    Where the split has no scene with that emoji, one with the next that has.
    """
    names = world.names
    if category not in CATEGORIES:
        raise ValueError(f"category {category!r} is not one of {', '.join(CATEGORIES)}")
    for step in range(len(names)):
        name = names[(first + step) % len(names)]
        for _ in range(24):
            scene = _draw(names, rng, category, name)
            if split_of(world, scene) == split:
                return scene
    raise ValueError(f"the world of {len(names)} emoji has no {split} scene of category {category}")


def _draw(names: tuple[str, ...], rng: np.random.Generator, category: str, name: str) -> Scene:
    things: tuple[str, ...] = (name,)
    relation, background = None, WHITE
    if category == "background":
        background = COLOURS[rng.integers(len(COLOURS))]
    elif category == "pair":
        other = name
        while other == name:
            other = names[rng.integers(len(names))]
        things = (name, other)
        relation = RELATIONS[rng.integers(len(RELATIONS))]
    elif category == "count":
        things = (name,) * int(rng.integers(2, 2 + len(NUMBERS)))
    prefix = PREFIXES[rng.integers(len(PREFIXES))]
    caption = f"{prefix} {words_of(things, relation, background)}".strip()
    return Scene(category, things, relation, background, caption)


def eval_scenes(world: World, n: int, seed: int) -> list[Scene]:
    """n evaluation scenes, an equal number per category and the remainder to the first.

    Fixed by the seed and interleaved by category, so any beginning of the list is balanced too.
    Within a category the emoji come round in turn, in an order of the seed's. ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1 evaluation scene")
    rng = np.random.default_rng([seed, 0xE0])
    orders = [rng.permutation(len(world.names)) for _ in CATEGORIES]
    found = []
    for i in range(n):
        row, column = divmod(i, len(CATEGORIES))
        first = int(orders[column][row % len(world.names)])
        found.append(scene_with(world, rng, "eval", CATEGORIES[column], first))
    return found


def vocabulary(world: World) -> list[str]:
    """All words of all captions, sorted."""
    words = {*BACKGROUNDS, "on", "background"}
    for phrase in (*NUMBERS.values(), *RELATIONS, *PREFIXES, *world.names):
        words.update(phrase.split())
    return sorted(words)
