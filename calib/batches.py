"""Training and calibration batches for shapes pipelines: captioned scenes as FLUX sees them.

Every batch is a pure function of (seed, step), so a run that was killed goes on with the same data.
Letters: B batch, T image tokens, C packed channels (4 x latent channels).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from calib.render import render_batch
from calib.world import CATEGORIES, World, sample_scene

if TYPE_CHECKING:
    from diffusers import FluxPipeline
    from torch import Tensor

Batches = Callable[[int, int], dict[str, "Tensor"]]

# Scenes that need binding or counting are shown more often, as when the teacher was trained (ours).
SHARES: Mapping[str, float] = {
    "single_object": 0.06,
    "two_object": 0.18,
    "counting": 0.2,
    "colours": 0.1,
    "position": 0.24,
    "colour_attribution": 0.22,
}


def world_of(pipe: FluxPipeline) -> World:
    """The default world at the pipeline's image size (its VAE's sample_size, in pixels).

    ValueError if that is no size a world can have: the pipeline does not draw shapes.
    """
    size = pipe.vae.config.sample_size
    try:
        return World(size=size)
    except ValueError as error:
        raise ValueError(
            f"the VAE's sample_size is {size}, which no shapes world has ({error}); expected a "
            "shapes pipeline, or pass a world of your own."
        ) from error


def shapes_batches(pipe: FluxPipeline, world: World | None = None, seed: int = 0) -> Batches:
    """A function (step, batch size) -> one batch of training scenes, encoded by `pipe`.

    The dict holds, in the dtypes and on the devices of the pipeline's encoders:
    `latents` [B, T, C]: VAE means, shifted, scaled and packed, without noise;
    `encoder_hidden_states` [B, L, width of T5], `pooled_projections` [B, width of CLIP];
    `img_ids` [T, 3], `txt_ids` [L, 3]: float, as FluxPipeline makes them;
    `category` [B]: int64, the scenes' places in `calib.world.CATEGORIES`.
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
    length = min(pipe.tokenizer_2.model_max_length, 512)
    names = list(SHARES)
    assert names == list(CATEGORIES)

    def batch(step: int, batch_size: int) -> dict[str, Tensor]:
        return batch_rows(step, batch_size, 0, batch_size)

    @torch.no_grad()
    def batch_rows(step: int, batch_size: int, first: int, end: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, step])
        kinds = rng.choice(len(names), batch_size, p=list(SHARES.values()))
        scenes = [sample_scene(world, rng, "train", names[kind]) for kind in kinds]
        images = torch.from_numpy(render_batch(scenes, world, rng, "train"))[first:end]
        scenes, kinds, batch_size = scenes[first:end], kinds[first:end], end - first
        states, pooled, txt_ids = pipe.encode_prompt(
            [scene.caption for scene in scenes], prompt_2=None, max_sequence_length=length
        )
        latents = encode_images(pipe, images)
        rows = world.size // patch
        img_ids = pipe._prepare_latent_image_ids(
            batch_size, rows, rows, latents.device, latents.dtype
        )
        return {
            "latents": latents,
            "encoder_hidden_states": states,
            "pooled_projections": pooled,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "category": torch.from_numpy(kinds).long(),
        }

    batch.rows = batch_rows  # type: ignore[attr-defined]
    return batch


def encode_images(pipe: FluxPipeline, images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] -> packed latents [B, T, C], as FluxPipeline decodes them.

    The posterior's mean, minus shift_factor, times scaling_factor, in 2 x 2 patches.
    """
    vae = pipe.vae
    pixels = images.permute(0, 3, 1, 2).to(vae.device).to(vae.dtype) / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode()
    latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape)
