"""Arithmetic around FLUX.1's transformer, in numpy: what diffusers' FluxPipeline does in torch.

Read: diffusers 0.42 FluxPipeline, FluxPosEmbed, FlowMatchEulerDiscreteScheduler; the tests hold
every function here to them. Letters: n images, C latent channels, h x w latent pixels (pixels of
the image divided by the VAE's scale factor), T tokens = (h / 2)(w / 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

TRAIN_STEPS = 1000  # diffusers' default num_train_timesteps


def noise(seeds: Sequence[int], channels: int, height: int, width: int) -> np.ndarray:
    """Packed initial latents [n, T, 4C], float32: one Philox stream per seed.

    A stream depends on its seed and the shape alone, so image i of a batch drawn from `seed`
    starts as the only image drawn from `seed + i`. (Ours: torch's own noise is not reproduced.)
    """
    shape = (channels, height, width)
    streams = (np.random.Generator(np.random.Philox(seed)) for seed in seeds)
    return pack(np.stack([stream.standard_normal(shape, np.float32) for stream in streams]))


def pack(latents: np.ndarray) -> np.ndarray:
    """[n, C, h, w] -> [n, (h/2)(w/2), 4C]: every 2 x 2 patch becomes one token."""
    n, channels, height, width = latents.shape
    patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
    patches = patches.transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(patches.reshape(n, (height // 2) * (width // 2), channels * 4))


def unpack(tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """[n, (h/2)(w/2), 4C] -> [n, C, h, w]; the inverse of `pack`."""
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


def check_scheduler(config: dict[str, Any]) -> None:
    """Refuse a FlowMatchEulerDiscreteScheduler config that asks for what FLUX never uses."""
    for field in ("use_beta_sigmas", "stochastic_sampling", "invert_sigmas"):
        if config.get(field):
            raise ValueError(
                f"the scheduler has {field} set, which the runtime does not draw with;"
                f" unset it in the model's scheduler_config.json and export again."
            )
    lengths = ("base_image_seq_len", "max_image_seq_len")
    for field in ("shift", "num_train_timesteps", *lengths, "base_shift", "max_shift"):
        value, low = config.get(field, 1), -100 if field in ("base_shift", "max_shift") else 0
        if type(value) not in (int, float) or not low < value < 1e9:
            raise ValueError(
                f"the scheduler's {field} is {value!r}, expected a number above {low};"
                f" correct the model's scheduler_config.json and export again."
            )
    terminal = config.get("shift_terminal") or 0
    if type(terminal) not in (int, float) or not 0 <= terminal < 1:
        raise ValueError(
            f"the scheduler's shift_terminal is {terminal!r}, expected null or a number below 1;"
            f" correct the model's scheduler_config.json and export again."
        )
    if config.get("base_image_seq_len", 256) == config.get("max_image_seq_len", 4096):
        raise ValueError(
            "the scheduler's base_image_seq_len equals its max_image_seq_len, expected two"
            " different lengths; correct the model's scheduler_config.json and export again."
        )
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ValueError(
            f"the scheduler's time_shift_type is {kind!r}, expected 'exponential' or 'linear';"
            f" correct the model's scheduler_config.json and export again."
        )


def shift_mu(config: dict[str, Any], image_tokens: int) -> float:
    """The shift for a picture of `image_tokens`, on the line through the two lengths named."""
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (long - short)
    return image_tokens * slope + (low - slope * short)


def sigmas(
    config: dict[str, Any],
    steps: int,
    image_tokens: int,
    given: Sequence[float] | None = None,
) -> np.ndarray:
    """The noise levels [steps + 1], float32, falling from (about) 1 to 0.

    `config` is FlowMatchEulerDiscreteScheduler's; fields left out have its defaults. `given` are
    `steps` levels before the scheduler's shift, in place of even ones from 1 to 1 / steps (as
    diffusers' argument of this name). Rounded where diffusers rounds, so that values agree to the
    last bit but for exp and pow.
    """
    shift = config.get("shift", 1.0)
    dynamic = config.get("use_dynamic_shifting", False)
    if given is not None:
        values: np.ndarray = np.array(given, np.float32)
    elif config.get("use_flow_sigmas"):
        count = config.get("num_train_timesteps", TRAIN_STEPS)
        ends = np.array([count, 1], np.float32) / np.float32(count)
        if not dynamic:
            ends = shift * ends / (1 + (shift - 1) * ends)
        values = np.linspace(float(ends[0]) * count, float(ends[1]) * count, steps) / count
    else:
        values = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    if dynamic:
        mu = shift_mu(config, image_tokens)
        factor = math.exp(mu) if config.get("time_shift_type") != "linear" else mu
        values = factor / (factor + (1 / values - 1))
    else:
        values = shift * values / (1 + (shift - 1) * values)
    terminal = config.get("shift_terminal")
    if terminal:
        values = 1 - (1 - values) / ((1 - values[-1]) / (1 - terminal))
    first, last = float(values[0]), float(values[-1])
    if config.get("use_karras_sigmas"):
        ramp, rho = np.linspace(0, 1, steps), 7.0
        values = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    elif config.get("use_exponential_sigmas"):
        values = np.exp(np.linspace(math.log(first), math.log(last), steps))
    return np.append(values.astype(np.float32), np.float32(0))


def timestep(sigma: float | np.floating, batch: int, config: dict[str, Any]) -> np.ndarray:
    """The transformer's timestep input [batch] in [0, 1].

    diffusers multiplies by num_train_timesteps and divides by 1000, both rounded to float32.
    """
    scale = np.float32(config.get("num_train_timesteps", TRAIN_STEPS))
    return np.full(batch, np.float32(sigma) * scale / np.float32(1000), np.float32)


def euler(
    latents: np.ndarray, velocity: np.ndarray, sigma: np.floating, following: np.floating
) -> np.ndarray:
    """One step from noise level `sigma` to `following`, in float32."""
    return latents + (np.float32(following) - np.float32(sigma)) * velocity


def guidance_vector(guidance: float, batch: int) -> np.ndarray:
    """The guidance input [batch], float32 (the x1000 happens in the transformer)."""
    return np.full(batch, guidance, np.float32)


def unscale(latents: np.ndarray, scaling_factor: float, shift_factor: float | None) -> np.ndarray:
    """From what the transformer draws to what the VAE decodes: latents / scaling + shift."""
    return latents / np.float32(scaling_factor) + np.float32(shift_factor or 0.0)


def scale(latents: np.ndarray, scaling_factor: float, shift_factor: float | None) -> np.ndarray:
    """The inverse of `unscale`."""
    return (latents - np.float32(shift_factor or 0.0)) * np.float32(scaling_factor)
