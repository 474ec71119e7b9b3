"""Whether an image shows what a caption says: by the nearest reference among all emoji.

Every place where the caption wants an emoji is compared, at 32 x 32 pixels and at every shift of up
to SHIFT pixels each way, with the pictures of all emoji of the world on the image's background: the
distance is the mean squared difference, so the nearest picture is the likeliest under equal noise
in every pixel (ours). An image is right if in every place the nearest is the one that is wanted, if
its background is the caption's, and if it shows nothing elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from calib.emoji.art import SIDE
from calib.emoji.render import HALF, Place, over, ways
from calib.emoji.world import BACKGROUNDS, Scene, World

SHIFT = 2  # pixels of 32, each way
FIRST = 5  # of "among the nearest five"
# Root of the mean squared difference from the background, 0 to 255, in a 16 x 16 patch that shows
# nothing. A patch of an emoji's picture differs by more.
EMPTY = 40.0
FRAME = 2  # pixels at the border that tell the background


@dataclass(frozen=True)
class Verdict:
    """ok: everything is right. top1, top5: the named emoji is the nearest, among the nearest five,
    in every place; found: nearest emoji, place by place; reason: what is wrong, "" if nothing."""

    ok: bool
    top1: bool
    top5: bool
    found: tuple[str, ...]
    reason: str


def verify(image: np.ndarray, scene: Scene, world: World) -> Verdict:
    """Judge an image, uint8 [64, 64, 3], by what its caption asks for.

    Of several arrangements that the caption allows, the one counts whose places the image fills and
    whose others are empty best. ValueError for an image of another shape.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"the image is {image.dtype} {list(image.shape)}, expected uint8 [64, 64, 3]"
        )
    background = background_of(image, scene, world)
    single = len(scene.things) == 1
    places, stray = ways(scene)[0], 0.0
    if not single:
        ground = np.array(BACKGROUNDS[background], np.float32)
        both = [(_outside(image, each, ground), each) for each in ways(scene)]
        stray, places = min(both, key=lambda pair: pair[0])
    ranks: list[int] = []
    found: list[str] = []
    for name, (row, column) in zip(scene.things, places, strict=True):
        side = SIDE if single else HALF
        part = image[row : row + side, column : column + side].astype(np.float32)
        if single:
            part = part.reshape(HALF, 2, HALF, 2, 3).mean((1, 3))
        away = distances(part, background, world)
        wanted = world.catalogue.index[name]
        ranks.append(int((away < away[wanted]).sum()))
        found.append(world.names[int(away.argmin())])
    top1, top5 = max(ranks) == 0, max(ranks) < FIRST
    if not top1:
        reason = "shows " + ", ".join(found)
    elif background != scene.background:
        reason = f"the background is {background}"
    elif stray > EMPTY:
        reason = "shows more than the caption says"
    else:
        reason = ""
    return Verdict(not reason, top1, top5, tuple(found), reason)


def background_of(image: np.ndarray, scene: Scene, world: World) -> str:
    """The background nearest to the median of the pixels where nothing stands.

    Those at the border, and those that the wanted emoji's picture leaves free; of compositions,
    those outside of every place that the caption allows, or the border where there are none.
    """
    free = np.ones((SIDE, SIDE), bool)
    if len(scene.things) == 1:
        free[FRAME:-FRAME, FRAME:-FRAME] = False
        free |= world.catalogue.large[world.catalogue.index[scene.things[0]]][..., 3] == 0
    else:
        for places in ways(scene):
            for row, column in places:
                free[row : row + HALF, column : column + HALF] = False
        if not free.any():
            free[:FRAME] = free[-FRAME:] = True
    middle = np.median(image[free].astype(np.float32), axis=0)
    away = {name: float(((middle - rgb) ** 2).sum()) for name, rgb in BACKGROUNDS.items()}
    return min(away, key=lambda name: away[name])


def _outside(image: np.ndarray, places: tuple[Place, ...], ground: np.ndarray) -> float:
    """The largest difference from the ground among the 16 x 16 patches outside of the places."""
    step = HALF // 2
    squares = ((image.astype(np.float32) - ground) ** 2).mean(-1)
    patches = squares.reshape(SIDE // step, step, SIDE // step, step).mean((1, 3))
    free = np.ones_like(patches, bool)
    for row, column in places:
        free[row // step : row // step + 2, column // step : column // step + 2] = False
    return float(np.sqrt(patches[free].max()))


def distances(part: np.ndarray, background: str, world: World) -> np.ndarray:
    """Of a part of an image, float32 [32, 32, 3], to every emoji on a background: float64 [N].

    Mean squared differences of values from 0 to 255, each at its best shift; what a shift brings in
    from outside of the part is background.
    """
    bank, squares = references(world, background)
    side = HALF + 2 * SHIFT
    padded = np.zeros((side, side, 3), np.float32)
    padded[SHIFT:-SHIFT, SHIFT:-SHIFT] = part - np.array(BACKGROUNDS[background], np.float32)
    shifts = range(2 * SHIFT + 1)
    moved = np.stack(
        [padded[y : y + HALF, x : x + HALF].reshape(-1) for y in shifts for x in shifts]
    )
    own = (moved.astype(np.float64) ** 2).sum(1)
    return ((squares[:, None] + own - 2 * (bank @ moved.T)) / bank.shape[1]).min(1)


@lru_cache(maxsize=2 * len(BACKGROUNDS))
def references(world: World, background: str) -> tuple[np.ndarray, np.ndarray]:
    """Every emoji less its background, float32 [N, 3072], and the rows' squared lengths."""
    small = world.catalogue.small
    ground = np.array(BACKGROUNDS[background], np.uint8)
    drawn = over(small, np.broadcast_to(ground, (*small.shape[:3], 3))).astype(np.float32)
    rows = (drawn - ground.astype(np.float32)).reshape(len(small), -1)
    return rows, (rows.astype(np.float64) ** 2).sum(1)
