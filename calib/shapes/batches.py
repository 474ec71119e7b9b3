"""Training and calibration batches for shapes pipelines: captioned scenes as models see them.

Every batch is a pure function of (seed, step), so a run that was killed goes on with the same data.
Letters: B batch, T image tokens, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from calib.shapes.render import render_batch
from calib.shapes.world import CATEGORIES, World, sample_scene
from d2m.families import family_of_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

Batches = Callable[[int, int], dict[str, "Tensor"]]

# Scenes that need binding or counting are learnt last, so they are shown more often (ours).
SHARES: Mapping[str, float] = {
    "single_object": 0.06,
    "two_object": 0.18,
    "counting": 0.2,
    "colours": 0.1,
    "position": 0.24,
    "colour_attribution": 0.22,
}


def world_of(pipe: DiffusionPipeline) -> World:
    """The default world at the pipeline's image size (its VAE's sample_size, in pixels).

    ValueError if that is no size a world can have: the pipeline does not generate shapes.
    """
    size = pipe.vae.config.sample_size
    try:
        return World(size=size)
    except ValueError as error:
        raise ValueError(
            f"the VAE's sample_size is {size}, which no shapes world has ({error}); expected a "
            "shapes pipeline, or pass a world of your own."
        ) from error


def shapes_batches(pipe: DiffusionPipeline, world: World | None = None, seed: int = 0) -> Batches:
    """A function (step, batch size) -> one batch of training scenes, encoded by `pipe`.

    The dict holds, in the dtypes and on the devices of the pipeline's encoders:
    `latents` [B, ...]: VAE means, shifted and scaled as the family's transformer takes them;
    the family's conditions (FLUX: `encoder_hidden_states` [B, L, width of T5],
    `pooled_projections` [B, width of CLIP], `txt_ids` [L, 3]), a share of them of empty captions
    where classifier-free guidance is used; `img_ids` [T, 3], places of image tokens;
    `category` [B]: int64, the scenes' places in `calib.shapes.world.CATEGORIES`.
    Its attribute `rows(step, batch size, first, end)` makes those rows of the batch alone.

    Raises ValueError if the VAE cannot encode the world's images into whole 2 x 2 patches.
    """
    import torch

    world = world or world_of(pipe)
    patch = 2 * pipe.vae_scale_factor
    if world.size % patch:
        raise ValueError(
            f"images of {world.size} pixels do not divide into the pipeline's patches of {patch} "
            "pixels; expected a multiple of that as the world's size."
        )
    family = family_of_pipeline(pipe)
    length = family.data.text_length(pipe)
    names = list(SHARES)
    assert names == list(CATEGORIES)

    share = family.data.unconditional_of(pipe)

    def batch(step: int, batch_size: int) -> dict[str, Tensor]:
        return batch_rows(step, batch_size, 0, batch_size)

    @torch.no_grad()
    def batch_rows(step: int, batch_size: int, first: int, end: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, step])
        kinds = rng.choice(len(names), batch_size, p=list(SHARES.values()))
        scenes = [sample_scene(world, rng, "train", names[kind]) for kind in kinds]
        images = torch.from_numpy(render_batch(scenes, world, rng, "train"))[first:end]
        whole, scenes, kinds = scenes, scenes[first:end], kinds[first:end]
        captions = [scene.caption for scene in scenes]
        if share:
            emptied = np.random.default_rng([seed, step, 1]).random(len(whole))
            empty = emptied[first:end] < share
            captions = ["" if none else text for none, text in zip(empty, captions)]
        found = family.data.encode_text(pipe, captions, length)
        found["latents"] = family.data.encode_images(pipe, images)
        found |= family.data.position_ids(pipe, found, world.size, world.size)
        return found | {"category": torch.from_numpy(kinds).long()}

    batch.rows = batch_rows  # type: ignore[attr-defined]
    return batch
