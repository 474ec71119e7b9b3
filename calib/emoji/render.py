"""Scenes drawn as images: emoji at full or at half size in fixed places, on one colour.

Places are multiples of 16 pixels, FLUX's patch in a picture of 64: what a model learns of an emoji
at half size serves it in every place. Counted things stand in one of two ways, at random.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calib.emoji.art import SIDE
from calib.emoji.world import BACKGROUNDS, Scene, World

HALF = SIDE // 2
Place = tuple[int, int]  # row and column of the top left pixel
# The first and the second thing of a pair.
BESIDE: dict[str, tuple[Place, Place]] = {
    "left of": ((16, 0), (16, 32)),
    "right of": ((16, 32), (16, 0)),
    "above": ((0, 16), (32, 16)),
    "below": ((32, 16), (0, 16)),
}
COUNTED: dict[int, tuple[tuple[Place, ...], ...]] = {
    2: (((16, 0), (16, 32)), ((0, 16), (32, 16))),
    3: (((0, 16), (32, 0), (32, 32)), ((0, 0), (0, 32), (32, 16))),
}


def ways(scene: Scene) -> tuple[tuple[Place, ...], ...]:
    """Every arrangement that the caption allows: places of its things, in their order."""
    if len(scene.things) == 1:
        return (((0, 0),),)
    if scene.relation:
        return (BESIDE[scene.relation],)
    return COUNTED[len(scene.things)]


def render(scene: Scene, world: World, rng: np.random.Generator) -> np.ndarray:
    """One image of the scene, uint8 [64, 64, 3], in one of its arrangements."""
    return render_batch([scene], world, rng)[0]


def render_batch(scenes: Sequence[Scene], world: World, rng: np.random.Generator) -> np.ndarray:
    """Images of the scenes, uint8 [B, 64, 64, 3]: the same as B calls of `render` with this rng."""
    images = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        paint(image, scene, arranged(scene, rng), world)
    return images


def paint(image: np.ndarray, scene: Scene, places: Sequence[Place], world: World) -> None:
    """Draw a scene with its things in these places into an image, uint8 [64, 64, 3]."""
    pictures = world.catalogue
    image[...] = BACKGROUNDS[scene.background]
    source = pictures.large if len(scene.things) == 1 else pictures.small
    for name, (row, column) in zip(scene.things, places, strict=True):
        picture = source[pictures.index[name]]
        part = image[row : row + len(picture), column : column + len(picture)]
        part[...] = over(picture, part)


def arranged(scene: Scene, rng: np.random.Generator) -> tuple[Place, ...]:
    """The arrangement that `render` draws with this rng, one number taken from it."""
    allowed = ways(scene)
    return allowed[int(rng.random() * len(allowed))]


def over(picture: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """A picture [..., 4] laid over a ground [..., 3], both uint8, rounded."""
    cover = picture[..., 3:].astype(np.uint32)
    mixed = picture[..., :3] * cover + ground * (255 - cover)
    return ((mixed + 127) // 255).astype(np.uint8)
