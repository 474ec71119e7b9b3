"""The emoji world as the stages see it: every picture it has is encoded once, and only once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calib.emoji.batches import SHARES
from calib.emoji.render import HALF, arranged, paint
from calib.emoji.world import (
    BACKGROUNDS,
    CATEGORIES,
    RELATIONS,
    Scene,
    World,
    sample_scene,
    vocabulary,
)
from scripts.teacher.subject import Subject

LENGTH = 12  # the longest caption has ten words, CLIP adds two marks
GRID = 4  # patches a side
HALVES = HALF * GRID // 64  # patches a side of an emoji at half size
PARTS = GRID * GRID + HALVES * HALVES + 1  # which part of an emoji a patch shows; the last: none

# Where an emoji of a pair stands, by its relation to the other; 0: no pair.
PLACES = {None: 0, "left of": 1, "right of": 2, "above": 3, "below": 4}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def emoji_subject(world: World) -> Subject:
    count = len(world.names)
    return Subject(
        name="emoji",
        size=world.size,
        length=LENGTH,
        words=vocabulary(world),
        draw=lambda n, seed: draw_scenes(world, n, seed),
        pictures=lambda scenes, seed: pictures(world, scenes, seed),
        # category, how many, first and second emoji, relation, background
        classes=(
            len(CATEGORIES) + 1,
            4,
            count + 1,
            count + 1,
            len(RELATIONS) + 1,
            len(BACKGROUNDS) + 1,
        ),
        attributes=lambda scene: attributes(world, scene),
        # which emoji, where it stands, how many, on what
        token_classes=(count + 1, len(PLACES) + 1, 4, len(BACKGROUNDS) + 1),
        tokens=lambda scene: token_labels(world, scene),
        label_classes=(count + 1, PARTS),
        labels=lambda scenes, seed: patch_labels(world, scenes, seed),
        vae={"block_out_channels": (16, 32, 64, 64)},
        vae_batch=32,
        # Narrow: what 1,000 pictures look like does not fit into the shared third of its FFNs.
        transformer={"num_layers": 6, "num_single_layers": 6, "num_attention_heads": 3},
        captions=60_000,
        label_weight=0.05,
    )


def draw_scenes(world: World, n: int, seed: int) -> list[Scene]:
    """`n` scenes of the training split, categories by SHARES."""
    rng = np.random.default_rng(seed)
    picks = rng.choice(len(CATEGORIES), n, p=[SHARES[c] for c in CATEGORIES])
    return [sample_scene(world, rng, "train", CATEGORIES[i]) for i in picks]


def pictures(world: World, scenes: Sequence[Scene], seed: int) -> tuple[Tensor, Tensor]:
    """Distinct images of the scenes, uint8 [M, 3, 64, 64], and every scene's number among them."""
    rng = np.random.default_rng(seed + 1)
    found: dict[tuple, int] = {}  # what is seen -> its number
    shown, rows = [], np.empty(len(scenes), np.int64)
    for i, scene in enumerate(scenes):
        places = arranged(scene, rng)
        key = (scene.things, scene.background, places)
        if key not in found:
            found[key] = len(found)
            shown.append((scene, places))
        rows[i] = found[key]
    images = np.empty((len(shown), world.size, world.size, 3), np.uint8)
    for image, (scene, places) in zip(images, shown, strict=True):
        paint(image, scene, places, world)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(rows)


def attributes(world: World, scene: Scene | None) -> list[int]:
    """Classes of category, number, first and second emoji, relation and background.

    The last of each is "none"; None, the empty caption, has them everywhere.
    """
    index, count = world.catalogue.index, len(world.names)
    if scene is None:
        return [len(CATEGORIES), 3, count, count, len(RELATIONS), len(BACKGROUNDS)]
    pair = scene.category == "pair"
    return [
        CATEGORIES.index(scene.category),
        len(scene.things) - 1,
        index[scene.things[0]],
        index[scene.things[1]] if pair else count,
        RELATIONS.index(scene.relation) if scene.relation else len(RELATIONS),
        list(BACKGROUNDS).index(scene.background),
    ]


def token_labels(world: World, scene: Scene | None) -> list[list[int]]:
    """What each T5 token must know, LENGTH rows: an emoji, its place, the number, the background.

    The words up to the first emoji's last tell of that one, those from the relation on of the
    other: an image token then finds the emoji of its place among the text tokens by attention, as
    it would among real T5's words.
    """
    index, count = world.catalogue.index, len(world.names)
    if scene is None:
        return [[count, len(PLACES), 3, len(BACKGROUNDS)]] * LENGTH
    background, number = list(BACKGROUNDS).index(scene.background), len(scene.things) - 1
    first = PLACES[scene.relation] if scene.relation else 0
    row = [index[scene.things[0]], first, number, background]
    if scene.relation is None:
        return [row] * LENGTH
    other = [index[scene.things[1]], PLACES[OPPOSITE[scene.relation]], number, background]
    begins = scene.caption.split().index(scene.relation.split()[0])
    return [row] * begins + [other] * (LENGTH - begins)


def patch_labels(world: World, scenes: Sequence[Scene], seed: int) -> Tensor:
    """The emoji and the part of it that each patch shows, int64 [N, 16, 2].

    For the images that `pictures` makes of the same scenes and seed.
    """
    rng = np.random.default_rng(seed + 1)
    index, count = world.catalogue.index, len(world.names)
    labels = np.empty((len(scenes), GRID, GRID, 2), np.int64)
    labels[...] = count, PARTS - 1
    whole = np.arange(GRID * GRID).reshape(GRID, GRID)
    half = GRID * GRID + np.arange(HALVES * HALVES).reshape(HALVES, HALVES)
    patch = world.size // GRID
    for rows, scene in zip(labels, scenes, strict=True):
        parts = whole if len(scene.things) == 1 else half
        for name, (row, column) in zip(scene.things, arranged(scene, rng), strict=True):
            y, x = row // patch, column // patch
            shown = rows[y : y + len(parts), x : x + len(parts)]
            shown[..., 0], shown[..., 1] = index[name], parts
    return torch.from_numpy(labels).flatten(1, 2)
