"""Qwen-Image in the runtime: what QwenImagePipeline does around its models.

Read: diffusers 0.42. Letters: n images, C latent channels, h x w latent pixels, T = (h / 2)(w / 2)
tokens, L text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.families import latents as shared
from runtime.families.family import Arrays, Family, Run
from runtime.families.family import guide as guided
from runtime.families.flow_matching import sigmas, timesteps
from runtime.families.latents import Settings, Size
from runtime.files.checked_json import mapping, wrong

STATES, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
DROPPED = 34  # read: tokens of the template before the prompt, which the transformer does not get
BEFORE = (  # read
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"


def check(manifest: Mapping[str, Any]) -> None:
    """ValueError (a clause) unless there are rotary axes, a mean and a deviation per channel.

    And unless a text is longer than the template's beginning.
    """
    shared.check_packed(manifest)
    shared.check_statistics(manifest, manifest["latents"]["channels"])
    length = mapping(mapping(dict(manifest), "tokenizers"), "tokenizer").get("max_length")
    if isinstance(length, int) and length <= DROPPED:
        raise wrong("tokenizers.tokenizer.max_length", length, f"more than {DROPPED}")


def encode(run: Run, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """States [n, L, joint width], zeros behind a text's end, and the mask [n, L], 1 where it is."""
    found = run("text_encoder", "tokenizer", prompts)
    mask = found["mask"][:, DROPPED:].astype(np.float32)
    return {STATES: found["states"][:, DROPPED:] * mask[..., None], MASK: mask}


def rope(length: int, size: Size, axes: Sequence[int], theta: float) -> tuple[Any, Any]:
    """Rotary cos and sin, each float32 [L + T, sum(axes)], every angle twice in a row.

    An image's rows and columns are counted from its middle, texts from its edge on, on all axes.
    Angles are float32 as in diffusers.
    """
    height, width = (side // 2 for side in size)
    image = np.zeros((height, width, 3), np.float32)
    image[..., 1] = np.arange(height)[:, None] - (height - height // 2)
    image[..., 2] = np.arange(width)[None, :] - (width - width // 2)
    start = max(height // 2, width // 2)
    text = np.repeat(np.arange(start, start + length, dtype=np.float32)[:, None], 3, axis=1)
    positions = np.concatenate([text, image.reshape(-1, 3)])
    angles = []
    for axis, dim in enumerate(axes):
        powers = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        angles.append(np.outer(positions[:, axis], np.float32(1) / np.float32(theta) ** powers))
    angle = np.repeat(np.concatenate(angles, axis=1), 2, axis=1)
    return np.cos(angle), np.sin(angle)


def inputs(
    manifest: Mapping[str, Any], conditions: Arrays, latent_size: Size, guidance: float
) -> dict[str, np.ndarray]:
    """See runtime.families.family; guidance is none of the inputs."""
    settings, length = manifest["latents"], conditions[STATES].shape[1]
    cos, sin = rope(length, latent_size, settings["rope_axes"], settings["rope_theta"])
    return {**conditions, "rope_cos": cos, "rope_sin": sin}


def guide(sample: np.ndarray, guidance: float) -> np.ndarray:
    """Classifier-free guidance that leaves a token as long as the prompt's own prediction is.

    [2 n, T, channels], the negative prompts' rows first -> [n, T, channels].
    """
    found = guided(sample, guidance)
    own = np.linalg.norm(sample[len(found) :], axis=-1, keepdims=True)
    scaled: np.ndarray = found * (own / np.linalg.norm(found, axis=-1, keepdims=True))
    return scaled


def image_latents(latents: np.ndarray, settings: Settings, latent_size: Size) -> np.ndarray:
    """Packed latents -> [n, C, h, w], by the VAE's mean and deviation of every channel."""
    mean, std = statistics(settings)
    spatial: np.ndarray = shared.unpack(latents, *latent_size) * std + mean
    return spatial


def encoded(latents: np.ndarray, settings: Settings) -> np.ndarray:
    """Encoded latents [n, C, h, w] -> packed, the inverse of `image_latents`."""
    mean, std = statistics(settings)
    return shared.pack((latents - mean) / std)


def statistics(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """The VAE's mean and deviation of every channel [C, 1, 1]."""
    mean, std = (np.array(settings[n], np.float32)[:, None, None] for n in ("mean", "std"))
    return mean, std


QWEN = Family(
    name="qwen",
    title="Qwen-Image",
    classes=("QwenImageTransformer2DModel", "SparseQwenImageTransformer2DModel"),
    components={"text_encoder": 1, "transformer": 0, "vae_decoder": 1},
    tokenizers=("tokenizer",),
    guided=True,
    masked=True,
    dropped=DROPPED,
    with_template=lambda prompt: f"{BEFORE}{prompt}{AFTER}",
    guide=guide,
    title_of=lambda config: "Qwen-Image",
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
    image_latents=image_latents,
    encoded=encoded,
)
