"""Scenes to train on: drawn at random, as images, and as the attributes in a caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calib.shapes.batches import SHARES
from calib.shapes.render import render_batch
from calib.shapes.world import CATEGORIES, COLOURS, RELATIONS, SHAPES, Scene, World, sample_scene

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


def draw_scenes(world: World, n: int, seed: int) -> list[Scene]:
    """`n` scenes of the training split, categories by SHARES."""
    rng = np.random.default_rng(seed)
    picks = rng.choice(len(CATEGORIES), n, p=[SHARES[c] for c in CATEGORIES])
    return [sample_scene(world, rng, "train", CATEGORIES[i]) for i in picks]


def render_images(world: World, scenes: Sequence[Scene], seed: int) -> Tensor:
    """The scenes as uint8 [N, 3, S, S], S the world's side in pixels."""
    images = render_batch(scenes, world, np.random.default_rng(seed + 1), "train")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def as_float(images: Tensor) -> Tensor:
    """uint8 0..255 as float32 -1..1, what a VAE of diffusers takes."""
    return images.float() / 127.5 - 1


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
