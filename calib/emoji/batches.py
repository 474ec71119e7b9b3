"""Training and calibration batches for emoji pipelines: captioned scenes as models see them.

Every batch is a pure function of (seed, step), so a run that was killed goes on with the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from calib.emoji.render import render_batch
from calib.emoji.world import CATEGORIES, World, sample_scene
from d2m.families import family_of_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

Batches = Callable[[int, int], dict[str, "Tensor"]]

# Compositions are learnt last, single emoji in a fifth of the steps, so they are shown more (ours).
SHARES: Mapping[str, float] = {"single": 0.2, "background": 0.2, "pair": 0.45, "count": 0.15}


def emoji_batches(pipe: DiffusionPipeline, world: World | None = None, seed: int = 0) -> Batches:
    """A function (step, batch size) -> one batch of training scenes, encoded by `pipe`.

    The dict is that of `calib.shapes.batches.shapes_batches`; `category` [B]: int64, the scenes'
    places in `calib.emoji.world.CATEGORIES`. Its attribute `rows(step, batch size, first, end)`
    makes those rows of the batch alone.

    Raises ValueError if the VAE cannot encode images of 64 pixels into whole 2 x 2 patches.
    """
    import torch

    world = world or World()
    patch = 2 * pipe.vae_scale_factor
    if world.size % patch:
        raise ValueError(
            f"images of {world.size} pixels do not divide into the pipeline's patches of {patch} "
            "pixels; expected a pipeline that generates emoji"
        )
    family = family_of_pipeline(pipe)
    length = family.data.text_length(pipe)
    names = list(SHARES)
    assert names == list(CATEGORIES)

    def batch(step: int, batch_size: int) -> dict[str, Tensor]:
        return batch_rows(step, batch_size, 0, batch_size)

    @torch.no_grad()
    def batch_rows(step: int, batch_size: int, first: int, end: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, step])
        kinds = rng.choice(len(names), batch_size, p=list(SHARES.values()))
        scenes = [sample_scene(world, rng, "train", names[kind]) for kind in kinds]
        images = torch.from_numpy(render_batch(scenes, world, rng))[first:end]
        captions = [scene.caption for scene in scenes[first:end]]
        if family.data.unconditional:
            emptied = np.random.default_rng([seed, step, 1]).random(batch_size)
            empty = emptied[first:end] < family.data.unconditional
            captions = ["" if none else text for none, text in zip(empty, captions)]
        found = family.data.encode_text(pipe, captions, length)
        found["latents"] = family.data.encode_images(pipe, images)
        found |= family.data.position_ids(pipe, found, world.size, world.size)
        return found | {"category": torch.from_numpy(kinds[first:end]).long()}

    batch.rows = batch_rows  # type: ignore[attr-defined]
    return batch
