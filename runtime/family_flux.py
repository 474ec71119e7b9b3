"""FLUX.1 [dev] and [schnell] in the runtime: the row; the arithmetic is in runtime/flux.py.

[schnell] has no guidance embedding, so its transformer has no input `guidance`; its scheduler's
shift is 1 and not dynamic, which the manifest says as it does for [dev].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime import flux
from runtime.family import Arrays, Family, Run, Size, rows
from runtime.files.checked_json import mapping, number, one_of, wrong


def titled(config: Mapping[str, Any]) -> str:
    """FLUX.1 [dev] or FLUX.1 [schnell], by the guidance embedding."""
    return f"FLUX.1 [{'dev' if config.get('guidance_embeds') else 'schnell'}]"


def guided(manifest: Mapping[str, Any]) -> bool:
    """Whether the transformer embeds guidance."""
    return "guidance" in manifest["components"]["transformer"]["inputs"]


def check(manifest: Mapping[str, Any]) -> None:
    """ValueError (a clause) unless tokens are 2 x 2 patches and the rotary axes are three."""
    latents = mapping(dict(manifest), "latents")
    one_of(latents, "patch", (2,), "latents")
    number(latents, "rope_theta", 1, 1e9, "latents")
    axes = latents.get("rope_axes")
    if not isinstance(axes, list) or len(axes) != 3:
        raise wrong("latents.rope_axes", axes, "three even numbers")
    if any(type(dim) is not int or dim % 2 or not 0 < dim <= 4096 for dim in axes):
        raise wrong("latents.rope_axes", axes, "three even numbers")


def encode(run: Run, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """T5's states [n, L, joint width] and CLIP's pooled vectors [n, P]."""
    (pooled,) = run("text_encoder", "tokenizer", prompts).values()
    (states,) = run("text_encoder_2", "tokenizer_2", prompts).values()
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def layouts(images: int, channels: int, height: int, width: int) -> tuple[tuple[int, ...], ...]:
    """Packed [n, T, 4 C], or [n, C, h, w]."""
    packed = (images, height * width // 4, channels * 4)
    return packed, (images, channels, height, width)


def feeds(
    manifest: Mapping[str, Any],
    conditions: Arrays,
    sigmas: np.ndarray,
    latent_size: Size,
    guidance: float,
) -> list[dict[str, np.ndarray]]:
    """See runtime.family; guidance is an input where the model embeds it."""
    settings, batch = manifest["latents"], rows(conditions)
    length = conditions["encoder_hidden_states"].shape[1]
    positions = flux.position_ids(length, *latent_size)
    cos, sin = flux.rope(positions, settings["rope_axes"], settings["rope_theta"])
    inputs = {**conditions, "rope_cos": cos, "rope_sin": sin}
    if guided(manifest):
        inputs["guidance"] = flux.guidance_vector(guidance, batch)
    times = (flux.timestep(sigma, batch, manifest["scheduler"]) for sigma in sigmas)
    return [inputs | {"timestep": time} for time in times]


def image_latents(
    latents: np.ndarray, settings: Mapping[str, Any], latent_size: Size
) -> np.ndarray:
    """Packed latents -> [n, C, h, w], unscaled."""
    spatial = flux.unpack(latents, *latent_size)
    return flux.unscale(spatial, settings["scaling_factor"], settings.get("shift_factor"))


FLUX = Family(
    name="flux",
    components={"text_encoder": 1, "text_encoder_2": 1, "transformer": 0, "vae_decoder": 1},
    tokenizers=("tokenizer", "tokenizer_2"),
    title="FLUX.1",
    classes=("FluxTransformer2DModel", "SparseFluxTransformer2DModel"),
    titled=titled,
    check=check,
    encode=encode,
    noise=flux.noise,
    layouts=layouts,
    arrange=flux.pack,
    image_tokens=lambda settings, size: size[0] * size[1] // 4,
    sigmas=flux.sigmas,
    feeds=feeds,
    tokens=lambda latents, settings: latents,
    velocity=lambda sample, settings, latent_size: sample,
    image_latents=image_latents,
)
