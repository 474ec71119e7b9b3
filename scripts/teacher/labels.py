"""What every patch of a training picture shows: names that half-way features learn to predict.

The velocity's squared error says little about a caption: most of it is noise that nothing can
predict, and a colour or a shape is read from the noisy picture itself but at the noisiest. Naming
what each patch of the clean picture will show, from the features between FLUX's two kinds of
blocks, asks for the caption at every noise level (ours; aligning such features with those of a
vision model is known to speed diffusion transformers up, and here the exact labels are known).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from calib.shapes.render import Q, layout
from calib.shapes.world import COLOURS, SHAPES, Scene, World

GRID = 4  # patches a side: 8 px of a 32 px picture, one image token each
SHOWS = 0.15  # least share of a patch's area inside a thing's box
CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1)  # the last of each: nothing


def patch_labels(world: World, scenes: Sequence[Scene], seed: int) -> Tensor:
    """Shape and colour of what fills most of each patch, int64 [N, GRID * GRID, 2].

    For the pictures that `render_images` makes of the same scenes and seed.
    """
    rng = np.random.default_rng(seed + 1)
    side = world.size * Q // GRID
    starts = np.arange(GRID) * side
    shapes, colours = list(SHAPES), list(COLOURS)
    labels = np.empty((len(scenes), GRID, GRID, 2), np.uint8)
    labels[...] = np.array(CLASSES) - 1
    for rows, scene in zip(labels, scenes, strict=True):
        most = np.full((GRID, GRID), SHOWS * side * side)
        for shape, colour, (x, y, d) in layout(scene, world, rng, "train"):
            across, down = (
                (np.minimum(starts + side, p + d) - np.maximum(starts, p)).clip(0) for p in (x, y)
            )
            area = down[:, None] * across
            rows[area > most] = shapes.index(shape), colours.index(colour)
            most = np.maximum(most, area)
    return torch.from_numpy(labels).flatten(1, 2).long()


class Labelled(nn.Module):
    """A transformer in training, with a head on its features; the head goes afterwards."""

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        width = transformer.inner_dim
        self.transformer = transformer
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, sum(CLASSES))
        )
        self.seen: dict[str, Tensor] = {}
        self.watched = False

    def watch(self) -> None:
        """Keep the image tokens between double and single blocks of every pass from now on."""

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.seen["image"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        self.watched = True
        first = self.transformer.single_transformer_blocks[0]
        first.register_forward_pre_hook(keep, with_kwargs=True)

    def compile_repeated_blocks(self, **options: Any) -> None:
        self.transformer.compile_repeated_blocks(**options)

    def label_loss(self, labels: Tensor) -> Tensor:
        """Cross entropy of both names of every patch [B, T, 2], in nats, of the last pass."""
        parts = self.head(self.seen["image"].float()).split(CLASSES, -1)
        losses = [
            F.cross_entropy(p.flatten(0, 1), labels[..., i].flatten()) for i, p in enumerate(parts)
        ]
        return torch.stack(losses).sum()
