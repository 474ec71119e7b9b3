"""PixArt-Sigma in the runtime: what PixArtSigmaPipeline does around its models.

Read: diffusers 0.42. Letters: n images, C latent channels, h x w latent pixels, p the side of a
patch, T = (h / p)(w / p) tokens, L text tokens, D width of the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.families import dpm_solver
from runtime.families.family import Arrays, Family, Run, check_masked_text
from runtime.families.latents import Settings, Size, unpatchify, unscale
from runtime.files.checked_json import integer, mapping, number, wrong


def check(manifest: Mapping[str, Any]) -> None:
    """ValueError (a clause) unless positions can be made and the text comes with its mask."""
    latents = mapping(dict(manifest), "latents")
    integer(latents, "base", 1, 1 << 14, "latents")
    number(latents, "interpolation", 1e-3, 1e3, "latents")
    width = integer(latents, "width", 4, 1 << 20, "latents")
    if width % 4:
        raise wrong("latents.width", width, "a multiple of 4")
    check_masked_text(manifest)


def encode(run: Run, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """T5's states [n, L, its width] of the prompts in small letters, and 1 at tokens [n, L]."""
    found = run("text_encoder", "tokenizer", [prompt.lower().strip() for prompt in prompts])
    return {"encoder_hidden_states": found["states"], "encoder_attention_mask": found["mask"]}


def sigmas(
    config: dict[str, Any], steps: int, image_tokens: int, given: Sequence[float] | None = None
) -> np.ndarray:
    """Noise levels [steps + 1] of the scheduler; ValueError where others are given."""
    if given is not None:
        raise ValueError(
            f"sigmas lists {len(given)} noise levels, expected none: PixArt-Sigma's scheduler has"
            " its own; leave them out and give steps."
        )
    return dpm_solver.sigmas(config, steps)


def positions(settings: Settings, height: int, width: int) -> np.ndarray:
    """What is added to the tokens [T, D], float32: sines and cosines of column, then of row.

    height, width: in tokens. An image of any size spans the range of the one trained with
    (read: diffusers' get_2d_sincos_pos_embed). Angles are float64, as there.
    """
    span, quarter = np.float32(settings["base"]), settings["width"] // 4
    scale = np.float32(settings["interpolation"])
    omega = 1 / 10000.0 ** (np.arange(quarter) / quarter)

    def waves(count: int) -> np.ndarray:
        position = np.arange(count, dtype=np.float32) / (np.float32(count) / span) / scale
        angle = np.outer(position.astype(np.float64), omega)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)

    shape = (height, width, 2 * quarter)
    column = np.broadcast_to(waves(width)[None, :], shape)
    row = np.broadcast_to(waves(height)[:, None], shape)
    return np.concatenate([column, row], axis=-1).reshape(height * width, -1)


def inputs(
    manifest: Mapping[str, Any], conditions: Arrays, latent_size: Size, guidance: float
) -> dict[str, np.ndarray]:
    """See runtime.families.family; guidance is none of the inputs."""
    settings = manifest["latents"]
    height, width = (side // settings["patch"] for side in latent_size)
    return {**conditions, "positions": positions(settings, height, width)}


def predicted(sample: np.ndarray, settings: Settings, latent_size: Size) -> np.ndarray:
    """Patches [n, T, p p 2 C], channels of a pixel together -> noise [n, C, h, w].

    The channels after the first C are a variance, which the pipeline drops.
    """
    joined = unpatchify(sample, settings, latent_size)
    return np.ascontiguousarray(joined[:, : settings["channels"]])


def image_latents(latents: np.ndarray, settings: Settings, latent_size: Size) -> np.ndarray:
    """[n, C, h, w], unscaled and not shifted."""
    return unscale(latents, settings["scaling_factor"], None)


PIXART = Family(
    name="pixart",
    title="PixArt-Sigma",
    classes=(
        "PixArtTransformer2DModel",
        "SparsePixArtTransformer2DModel",
        "Transformer2DModel",  # read: what the published configs call it
    ),
    components={"text_encoder": 2, "transformer": 0, "vae_decoder": 1},
    tokenizers=("tokenizer",),
    guided=True,
    title_of=lambda config: "PixArt-Sigma",
    check=check,
    encode=encode,
    check_scheduler=dpm_solver.check_scheduler,
    sigmas=sigmas,
    sampler=dpm_solver.sampler,
    noised=dpm_solver.noised,
    inputs=inputs,
    timesteps=dpm_solver.timestep_of,
    velocity=predicted,
    image_latents=image_latents,
)
