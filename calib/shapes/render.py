"""Scenes drawn as images: anti-aliased shapes on grey, placed at random without touching.

Lengths are in quarter pixels throughout: a shape is a boolean mask on the quarter-pixel grid (4x
supersampling), and its box average at one of 16 sub-pixel offsets is a sprite. Sprites are cached,
so an image costs a few array copies (12,000 images/s on one core).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np

from calib.shapes.world import BACKGROUND, COLOURS, SHAPES, Scene, Split, World, heldout_pairs

Q = 4  # quarter pixels per pixel
BORDER_Q = 1 * Q  # free pixels at the image's border
GAP_Q = 2 * Q  # free pixels between the bounding boxes of two things
# Diameter as a share of the image's side, by number of things: 32 px hold one thing of 13 px or six
# of 8 px.
DIAMETERS = {
    1: (0.30, 0.41),
    2: (0.285, 0.39),
    3: (0.27, 0.34),
    4: (0.26, 0.31),
    5: (0.25, 0.27),
    6: (0.25, 0.265),
}
# A relation is meant to be seen at a glance: this far apart along its axis, and at most this
# share of it across.
RELATION_DISTANCE = 0.25
RELATION_ACROSS = 0.6
Box = tuple[int, int, int]  # left, top, diameter in quarter pixels
Placed = tuple[str, str, Box]  # shape, colour, box

GREY = np.array(BACKGROUND, np.float32)
ROUNDED_GREY = GREY + 0.5  # so that the cast to uint8 rounds
DELTAS = {name: np.array(rgb, np.float32) - GREY for name, rgb in COLOURS.items()}


def render(
    scene: Scene, world: World, rng: np.random.Generator, split: Split = "train"
) -> np.ndarray:
    """One image of the scene, uint8 [S, S, 3], S = world.size.

    Colours that the caption leaves free are sampled at random, without held-out pairs when split is
    "train"; counted things share one colour. Raises ValueError if a "train" image is wanted of a
    scene that names a held-out pair.
    """
    return render_batch([scene], world, rng, split)[0]


def render_batch(
    scenes: Sequence[Scene], world: World, rng: np.random.Generator, split: Split = "train"
) -> np.ndarray:
    """Images of the scenes, uint8 [B, S, S, 3]: the same as B calls of `render` with this rng."""
    images = np.empty((len(scenes), world.size, world.size, 3), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        _paint(image, scene, world, rng, split)
    return images


def layout(
    scene: Scene, world: World, rng: np.random.Generator, split: Split = "train"
) -> list[Placed]:
    """Shape, colour and box of every thing of an image: what `render` draws with this rng."""
    colours = _colours(scene, world, rng, split)
    boxes = places(scene, world, rng)
    return [(t.shape, c, b) for t, c, b in zip(scene.things, colours, boxes, strict=True)]


def _paint(
    image: np.ndarray, scene: Scene, world: World, rng: np.random.Generator, split: Split
) -> None:
    paint(image, layout(scene, world, rng, split))


def paint(image: np.ndarray, placed: Sequence[Placed]) -> None:
    """Draw things on grey, in place: image uint8 [S, S, 3]; see `layout`."""
    image[...] = BACKGROUND
    for shape, colour, (x, y, d) in placed:
        alpha = sprite(shape, d, x % Q, y % Q)
        height, width = alpha.shape[:2]
        # Plain assignment, no blending with what is there: a gap of two pixels keeps sprites apart.
        row, column = y // Q, x // Q
        image[row : row + height, column : column + width] = alpha * DELTAS[colour] + ROUNDED_GREY


def _colours(scene: Scene, world: World, rng: np.random.Generator, split: Split) -> list[str]:
    held = heldout_pairs(world)
    if split == "train":
        for thing in scene.things:
            if (thing.colour, thing.shape) in held:
                raise ValueError(
                    f"a {thing.colour} {thing.shape} is held out from training; "
                    "render it with split='eval'"
                )
    chosen: list[str] = []
    for thing in scene.things:
        if thing.colour is not None:
            chosen.append(thing.colour)
        elif scene.category == "counting" and chosen:
            chosen.append(chosen[0])
        else:
            allowed = _free_colours(world, thing.shape, split)
            chosen.append(allowed[int(rng.random() * len(allowed))])
    return chosen


@cache
def _free_colours(world: World, shape: str, split: Split) -> tuple[str, ...]:
    held = heldout_pairs(world) if split == "train" else frozenset()
    return tuple(c for c in world.colour_names if (c, shape) not in held)


def places(scene: Scene, world: World, rng: np.random.Generator) -> list[Box]:
    """The things' boxes, by rejection, or in a jittered grid if that jams."""
    n, side = len(scene.things), world.size * Q
    low, high = (int(round(share * side)) for share in DIAMETERS[n])
    # Five and six things at 32 px jam nearly always: they go to the grid soon.
    for _ in range(60 if n < 5 else 8):
        draws = rng.random(4 * n + 16).tolist()
        placed: list[Box] = []
        sizes = [low + int(draws.pop() * (high - low + 1)) for _ in range(n)]
        while len(placed) < n and len(draws) > 1:
            d = sizes[len(placed)]
            room = side - 2 * BORDER_Q - d + 1
            box = (BORDER_Q + int(draws.pop() * room), BORDER_Q + int(draws.pop() * room), d)
            if all(apart(box, other) for other in placed):
                placed.append(box)
                if len(placed) > 1 and not related(placed, scene.relation, side):
                    placed.pop()
        if len(placed) == n:
            return placed
    return _grid(n, side, low, high, scene, rng)


def apart(a: Box, b: Box) -> bool:
    (ax, ay, ad), (bx, by, bd) = a, b
    return max(bx - ax - ad, ax - bx - bd, by - ay - ad, ay - by - bd) >= GAP_Q


def related(boxes: list[Box], relation: str | None, side: int) -> bool:
    if relation is None:
        return True
    (ax, ay, ad), (bx, by, bd) = boxes
    # from the first thing's centre to the second's
    right, down = bx + bd / 2 - ax - ad / 2, by + bd / 2 - ay - ad / 2
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    if relation in ("right of", "below"):
        along = -along
    return along >= RELATION_DISTANCE * side and abs(across) <= RELATION_ACROSS * along


def _grid(
    n: int, side: int, low: int, high: int, scene: Scene, rng: np.random.Generator
) -> list[Box]:
    """Things in random cells of a 3 x 3 grid (2 x 2 up to four), each anywhere in its cell."""
    if scene.relation:  # the two ends of the axis always satisfy the relation
        middle, far = (side - low) // 2, side - BORDER_Q - low
        if scene.relation in ("left of", "right of"):
            ends = [(BORDER_Q, middle, low), (far, middle, low)]
        else:
            ends = [(middle, BORDER_Q, low), (middle, far, low)]
        return ends if scene.relation in ("left of", "above") else ends[::-1]
    cells = 2 if n <= 4 else 3
    pitch = (side - 2 * BORDER_Q + GAP_Q) // cells
    high = max(low, min(high, pitch - GAP_Q))
    placed = []
    for cell in rng.permutation(cells * cells)[:n].tolist():
        d = low + int(rng.random() * (high - low + 1))
        room = pitch - GAP_Q - d + 1
        left = BORDER_Q + pitch * (cell % cells) + int(rng.random() * room)
        top = BORDER_Q + pitch * (cell // cells) + int(rng.random() * room)
        placed.append((left, top, d))
    return placed


@lru_cache(maxsize=1 << 15)
def sprite(shape: str, d: int, x: int, y: int) -> np.ndarray:
    """Coverage (0..1) of a shape whose box starts x, y into a pixel: float32 [h, w, 1].

    d, x, y are in quarter pixels, h and w in pixels.
    """
    height, width = -(-(y + d) // Q), -(-(x + d) // Q)
    fine = np.zeros((height * Q, width * Q), np.float32)
    fine[y : y + d, x : x + d] = _mask(shape, d)
    alpha = fine.reshape(height, Q, width, Q).mean(axis=(1, 3))[..., None]
    alpha.flags.writeable = False  # shared by all images
    return alpha


@cache
def _mask(shape: str, d: int) -> np.ndarray:
    """The shape in its box, bool [d, d] in quarter pixels; u runs right, v down, from -1 to 1."""
    u = ((np.arange(d) + 0.5) / d * 2 - 1)[None, :]
    v = u.T
    radius = np.hypot(u, v)
    if shape == "circle":
        return radius <= 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.9
    if shape == "triangle":  # apex up, a little lower than wide
        return (abs(v) <= 0.92) & (abs(u) <= (v + 0.92) / 1.84)
    if shape == "cross":
        return np.minimum(abs(u), abs(v)) <= 0.36
    if shape == "diamond":
        return abs(u) + abs(v) <= 1
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.5)
    raise ValueError(f"shape {shape!r} cannot be rendered; shapes are {', '.join(SHAPES)}")
