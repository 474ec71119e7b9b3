"""The shapes world as the stages see it: scenes, images, what a caption and a patch say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calib.shapes.batches import SHARES
from calib.shapes.render import Placed, Q, layout, render_batch
from calib.shapes.world import (
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    World,
    sample_scene,
    vocabulary,
)
from scripts.teacher.subject import Subject

LENGTH = 16  # text tokens: the longest caption has 14 words, CLIP adds two marks
GRID = 4  # patches a side: 8 px of a 32 px picture, one image token each
SHOWS = 0.15  # least share of a patch's area inside a thing's box
LABELS = (len(SHAPES) + 1, len(COLOURS) + 1)  # the last of each: nothing

# Classes of every attribute, in the order of `attributes`; the last class of each means "none".
ATTRIBUTES = (
    len(CATEGORIES) + 1,
    7,  # one to six things
    len(SHAPES) + 1,
    len(COLOURS) + 1,
    len(SHAPES) + 1,
    len(COLOURS) + 1,
    len(RELATIONS) + 1,
)


def shapes_subject(world: World) -> Subject:
    small = world.size == 32

    def pictures(scenes: Sequence[Scene], seed: int) -> tuple[Tensor, Tensor]:
        return render_images(world, scenes, seed), torch.arange(len(scenes))

    return Subject(
        name="shapes",
        size=world.size,
        length=LENGTH,
        words=vocabulary(),
        draw=lambda n, seed: draw_scenes(world, n, seed),
        pictures=pictures,
        classes=ATTRIBUTES,
        attributes=attributes,
        token_classes=ATTRIBUTES,
        # Every token knows the whole scene: FLUX gives text tokens no position, so order must live
        # in the tokens.
        tokens=lambda scene: [attributes(scene)] * LENGTH,
        label_classes=LABELS,
        labels=lambda scenes, seed: patch_labels(world, scenes, seed),
        vae={
            "block_out_channels": (16, 32, 64, 64)[: 3 if small else 4],
            "latent_channels": 4 if small else 16,
        },
        transformer={"num_layers": 6, "num_single_layers": 12, "num_attention_heads": 4},
    )


def draw_scenes(world: World, n: int, seed: int) -> list[Scene]:
    """`n` scenes of the training split, categories by SHARES."""
    rng = np.random.default_rng(seed)
    picks = rng.choice(len(CATEGORIES), n, p=[SHARES[c] for c in CATEGORIES])
    return [sample_scene(world, rng, "train", CATEGORIES[i]) for i in picks]


def render_images(world: World, scenes: Sequence[Scene], seed: int) -> Tensor:
    """The scenes as uint8 [N, 3, S, S], S the world's side in pixels."""
    images = render_batch(scenes, world, np.random.default_rng(seed + 1), "train")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def attributes(scene: Scene | None) -> list[int]:
    """Classes of category, count, shape and colour of the first and the second thing, relation.

    None stands for the empty caption: "none" everywhere.
    """
    if scene is None:
        return [n - 1 for n in ATTRIBUTES]
    shapes, colours = list(SHAPES), list(COLOURS)
    first = scene.things[0]
    second = scene.things[1] if len(scene.things) > 1 else None
    return [
        CATEGORIES.index(scene.category),
        len(scene.things) - 1,
        shapes.index(first.shape),
        colours.index(first.colour) if first.colour else len(colours),
        shapes.index(second.shape) if second else len(shapes),
        colours.index(second.colour) if second and second.colour else len(colours),
        RELATIONS.index(scene.relation) if scene.relation else len(RELATIONS),
    ]


def patch_labels(world: World, scenes: Sequence[Scene], seed: int) -> Tensor:
    """`patch_names` of the pictures that `render_images` makes of the same scenes and seed."""
    rng = np.random.default_rng(seed + 1)
    return patch_names(world, [layout(scene, world, rng, "train") for scene in scenes])


def patch_names(world: World, pictures: Sequence[Sequence[Placed]]) -> Tensor:
    """Shape and colour of what fills most of each patch, int64 [N, GRID * GRID, 2]."""
    side = world.size * Q // GRID
    starts = np.arange(GRID) * side
    shapes, colours = list(SHAPES), list(COLOURS)
    labels = np.empty((len(pictures), GRID, GRID, 2), np.uint8)
    labels[...] = np.array(LABELS) - 1
    for rows, placed in zip(labels, pictures, strict=True):
        most = np.full((GRID, GRID), SHOWS * side * side)
        for shape, colour, (x, y, d) in placed:
            across, down = (
                (np.minimum(starts + side, p + d) - np.maximum(starts, p)).clip(0) for p in (x, y)
            )
            area = down[:, None] * across
            rows[area > most] = shapes.index(shape), colours.index(colour)
            most = np.maximum(most, area)
    return torch.from_numpy(labels).flatten(1, 2).long()
