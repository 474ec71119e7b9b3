"""Latents in numpy, as several families have them: noise, patches as tokens, positions, scaling.

Read: diffusers 0.42 FluxPipeline, FluxPosEmbed, StableDiffusion3Pipeline; the tests hold every
function here to them. Letters: n images, C latent channels, h x w latent pixels (pixels of the
image divided by the VAE's scale factor), p the side of a patch, T tokens. Packed latents are
[n, T, 4 C] with p = 2 and T = (h / 2)(w / 2), spatial ones [n, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.files.checked_json import mapping, number, one_of, wrong

Settings = Mapping[str, Any]  # the manifest's `latents`
Size = tuple[int, int]
Step = Callable[
    [int, np.ndarray, np.ndarray], np.ndarray
]  # (index, latents, prediction) -> latents


def image_tokens(settings: Settings, latent_size: Size) -> int:
    """T of latents of (h, w), which the noise levels' shift may depend on."""
    return latent_size[0] * latent_size[1] // settings["patch"] ** 2


def spatial_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> np.ndarray:
    """Initial latents [n, C, h, w], float32: one Philox stream per seed.

    A stream depends on its seed and the shape alone, so image i of a batch generated from `seed`
    starts as the only image generated from `seed + i`. (Ours: torch's own noise is not reproduced.)
    """
    streams = (np.random.Generator(np.random.Philox(seed)) for seed in seeds)
    shape = (channels, height, width)
    return np.stack([stream.standard_normal(shape, np.float32) for stream in streams])


def packed_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> np.ndarray:
    """Packed initial latents [n, T, 4C] of the same streams."""
    return pack(spatial_noise(seeds, channels, height, width))


def pack(latents: np.ndarray, side: int = 2) -> np.ndarray:
    """[n, C, h, w] -> [n, T, C p p], p = `side`: every p x p patch becomes one token.

    In a token one channel follows the other.
    """
    n, channels, height, width = latents.shape
    patches = latents.reshape(n, channels, height // side, side, width // side, side)
    patches = patches.transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(patches.reshape(n, -1, channels * side * side))


def patches(latents: np.ndarray, settings: Settings) -> np.ndarray:
    """[n, C, h, w] -> tokens [n, T, C p p] of the manifest's `patch`."""
    return pack(latents, settings["patch"])


def unpack(tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """[n, (h/2)(w/2), 4C] -> [n, C, h, w]; the inverse of `pack` with patches of 2 x 2."""
    n, _, channels = tokens.shape
    patches = tokens.reshape(n, height // 2, width // 2, channels // 4, 2, 2)
    patches = patches.transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(patches.reshape(n, channels // 4, height, width))


def position_ids(text_tokens: int, height: int, width: int) -> np.ndarray:
    """Positions [text + image tokens, 3], text first: zeros for text, (0, row, column) for images.

    `height` and `width` are the latents' (h, w); a token is a 2 x 2 patch of them.
    """
    image = np.zeros((height // 2, width // 2, 3), np.float32)
    image[..., 1] = np.arange(height // 2)[:, None]
    image[..., 2] = np.arange(width // 2)[None, :]
    text = np.zeros((text_tokens, 3), np.float32)
    return np.concatenate([text, image.reshape(-1, 3)])


def reference_positions(sizes: Sequence[Size], place: int, axes: int) -> np.ndarray:
    """Positions [R, axes] of references of `sizes` (rows and columns of tokens) one after another:
    (place, row, column, 0 ...), the second's 2 place on the first axis, and so on."""
    found = []
    for index, (height, width) in enumerate(sizes, 1):
        one = np.zeros((height, width, axes), np.float32)
        one[..., 0] = place * index
        one[..., 1] = np.arange(height)[:, None]
        one[..., 2] = np.arange(width)[None, :]
        found.append(one.reshape(-1, axes))
    return np.concatenate(found)


def rope(
    positions: np.ndarray, axes: Sequence[int], theta: float = 10000.0
) -> tuple[np.ndarray, np.ndarray]:
    """Rotary cos and sin, each float32 [tokens, sum(axes)], every angle twice in a row.

    Angles are float64 as in diffusers: in float32 they are off by 1e-4 at position 1000.
    """
    angles = [
        np.outer(positions[:, axis], 1.0 / theta ** (np.arange(0, dim, 2) / dim))
        for axis, dim in enumerate(axes)
    ]
    angle = np.repeat(np.concatenate(angles, axis=1), 2, axis=1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def joint_rope(settings: Settings, text_tokens: int, latent_size: Size) -> dict[str, np.ndarray]:
    """FLUX.1's rotary tables [text + image tokens, C], by the names of a transformer's inputs."""
    positions = position_ids(text_tokens, *latent_size)
    cos, sin = rope(positions, settings["rope_axes"], settings["rope_theta"])
    return {"rope_cos": cos, "rope_sin": sin}


def check_packed(manifest: Mapping[str, Any], count: int = 3) -> None:
    """ValueError (a clause) unless tokens are 2 x 2 patches and there are `count` rotary axes."""
    latents = mapping(dict(manifest), "latents")
    one_of(latents, "patch", (2,), "latents")
    number(latents, "rope_theta", 1, 1e9, "latents")
    axes = latents.get("rope_axes")
    wanted = f"{['three', 'four'][count - 3]} even numbers"
    if not isinstance(axes, list) or len(axes) != count:
        raise wrong("latents.rope_axes", axes, wanted)
    if any(type(dim) is not int or dim % 2 or not 0 < dim <= 4096 for dim in axes):
        raise wrong("latents.rope_axes", axes, wanted)


def check_statistics(manifest: Mapping[str, Any], count: int) -> None:
    """ValueError (a clause) unless there are `count` means and deviations of latents."""
    latents = mapping(dict(manifest), "latents")
    for name, low in (("mean", -1e6), ("std", 1e-6)):
        values = latents.get(name)
        if not isinstance(values, list) or len(values) != count:
            raise wrong(f"latents.{name}", values, f"a list of {count} numbers")
        if any(type(each) not in (int, float) or not low <= each <= 1e6 for each in values):
            raise wrong(f"latents.{name}", values, f"numbers from {low:g} to 1e+06")


def packed_layouts(
    images: int, channels: int, height: int, width: int
) -> tuple[tuple[int, ...], ...]:
    """Packed [n, T, 4 C], or [n, C, h, w]."""
    packed = (images, height * width // 4, channels * 4)
    return packed, (images, channels, height, width)


def unpatchify(sample: np.ndarray, settings: Settings, latent_size: Size) -> np.ndarray:
    """Patches [n, T, p p C], all channels of a pixel together -> [n, C, h, w]."""
    p, (height, width) = settings["patch"], latent_size
    cut = sample.reshape(len(sample), height // p, width // p, p, p, -1)
    swapped = cut.transpose(0, 5, 1, 3, 2, 4)
    return np.ascontiguousarray(swapped.reshape(len(sample), -1, height, width))


def unscale(latents: np.ndarray, scaling_factor: float, shift_factor: float | None) -> np.ndarray:
    """From what the transformer predicts to what the VAE decodes: latents / scaling + shift."""
    return latents / np.float32(scaling_factor) + np.float32(shift_factor or 0.0)


def scale(latents: np.ndarray, scaling_factor: float, shift_factor: float | None) -> np.ndarray:
    """From what the VAE encodes to what the transformer denoises, the inverse of `unscale`."""
    return (latents - np.float32(shift_factor or 0.0)) * np.float32(scaling_factor)


def scaled(latents: np.ndarray, settings: Settings) -> np.ndarray:
    """Encoded latents [n, C, h, w], shifted and scaled."""
    return scale(latents, settings["scaling_factor"], settings.get("shift_factor"))


def scaled_and_packed(latents: np.ndarray, settings: Settings) -> np.ndarray:
    """Encoded latents [n, C, h, w], shifted and scaled -> packed."""
    return pack(scaled(latents, settings))


def unpacked(latents: np.ndarray, settings: Settings, latent_size: Size) -> np.ndarray:
    """Packed latents -> [n, C, h, w], unscaled."""
    spatial = unpack(latents, *latent_size)
    return unscale(spatial, settings["scaling_factor"], settings.get("shift_factor"))
