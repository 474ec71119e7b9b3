"""Training and calibration batches of shapes edits: images before and after, instructions.

As batches.py: every batch is a pure function of (seed, step).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from calib.shapes.batches import Batches, world_of
from calib.shapes.edits import KINDS, sample_edit
from calib.shapes.world import World
from d2m.families import family_of_pipeline
from d2m.families.latents import changed_boxes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


def edit_batches(pipe: DiffusionPipeline, world: World | None = None, seed: int = 0) -> Batches:
    """A function (step, batch size) -> one batch of training edits, encoded by `pipe`.

    The dict is that of `calib.shapes.batches.shapes_batches` with what the family's `encode_given`
    makes of the images before; `latents` are of those after, `category` the kinds' places in
    `calib.shapes.edits.KINDS`. Its attribute `rows` is as there.
    """
    import torch

    world = world or world_of(pipe)
    data = family_of_pipeline(pipe).data
    length, given = data.text_length(pipe), data.encode_given
    assert given is not None, type(pipe)

    def batch(step: int, batch_size: int) -> dict[str, Tensor]:
        return batch_rows(step, batch_size, 0, batch_size)

    @torch.no_grad()
    def batch_rows(step: int, batch_size: int, first: int, end: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, step])
        edits = [sample_edit(world, rng, "train") for _ in range(batch_size)][first:end]
        pairs = [edit.images(world) for edit in edits]
        before, after = (torch.from_numpy(np.stack(images)) for images in zip(*pairs))
        found = data.encode_text(pipe, [edit.caption for edit in edits], length)
        found["latents"] = data.encode_images(pipe, after)
        found |= given(pipe, before, changed_boxes(before, after))
        found |= data.position_ids(pipe, found, world.size, world.size)
        kinds = [KINDS.index(edit.category) for edit in edits]
        return found | {"category": torch.tensor(kinds)}

    batch.rows = batch_rows  # type: ignore[attr-defined]
    return batch
