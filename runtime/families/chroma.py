"""Chroma in the runtime: what ChromaPipeline does around its models.

Read: diffusers 0.42. T5's own padding is masked in its graph; the transformer reads one token of it
more, as it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.families import latents as shared
from runtime.families.family import Arrays, Family, Run, check_masked_text
from runtime.families.flow_matching import sigmas, timesteps
from runtime.families.latents import Size

STATES, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"


def check(manifest: Mapping[str, Any]) -> None:
    """ValueError (a clause) unless there are three rotary axes and the text comes with its mask."""
    shared.check_packed(manifest)
    check_masked_text(manifest)


def encode(run: Run, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """T5's states [n, L, width] and the mask [n, L]: 1 at tokens and at the first behind them."""
    found = run("text_encoder", "tokenizer", prompts)
    tokens = found["mask"].astype(np.float32).sum(1, keepdims=True)
    mask = np.arange(found["mask"].shape[1], dtype=np.float32)[None] <= tokens
    return {STATES: found["states"], MASK: mask.astype(np.float32)}


def inputs(
    manifest: Mapping[str, Any], conditions: Arrays, latent_size: Size, guidance: float
) -> dict[str, np.ndarray]:
    """See runtime.families.family; guidance is none of the inputs."""
    length = conditions[STATES].shape[1]
    return {**conditions, **shared.joint_rope(manifest["latents"], length, latent_size)}


CHROMA = Family(
    name="chroma",
    title="Chroma",
    classes=("ChromaTransformer2DModel", "SparseChromaTransformer2DModel"),
    components={"text_encoder": 2, "transformer": 0, "vae_decoder": 1},
    tokenizers=("tokenizer",),
    guided=True,
    title_of=lambda config: "Chroma",
    check=check,
    encode=encode,
    noise=shared.packed_noise,
    layouts=shared.packed_layouts,
    arrange=shared.pack,
    sigmas=sigmas,
    inputs=inputs,
    timesteps=timesteps,
    tokens=lambda latents, settings: latents,
    velocity=lambda sample, settings, latent_size: sample,
    image_latents=shared.unpacked,
    encoded=shared.scaled_and_packed,
)
