"""Flow matching in numpy: what diffusers' FlowMatchEulerDiscreteScheduler does in torch.

Read: diffusers 0.42; the tests hold every function here to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.families.latents import Step

TRAIN_STEPS = 1000  # diffusers' default num_train_timesteps
BETA = 0.6  # read: both parameters of the beta distribution that noise levels may follow


def check_scheduler(config: dict[str, Any]) -> None:
    """Refuse a FlowMatchEulerDiscreteScheduler config that asks for what no family uses."""
    for field in ("stochastic_sampling", "invert_sigmas"):
        if config.get(field):
            raise ValueError(
                f"the scheduler has {field} set, which the runtime does not support;"
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


def shift_mu(config: dict[str, Any], image_tokens: int, steps: int = 0) -> float:
    """The shift for an image of `image_tokens`, on the line through the two lengths named."""
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (long - short)
    return image_tokens * slope + (low - slope * short)


def sigmas(
    config: dict[str, Any],
    steps: int,
    image_tokens: int,
    given: Sequence[float] | None = None,
    shift_of: Callable[[dict[str, Any], int, int], float] = shift_mu,
) -> np.ndarray:
    """The noise levels [steps + 1], float32, falling from (about) 1 to 0.

    `config` is FlowMatchEulerDiscreteScheduler's; fields left out have its defaults. `given` are
    `steps` levels before the scheduler's shift, in place of even ones from 1 to 1 / steps (as
    diffusers' argument of this name). `shift_of` (config, tokens, steps) is the dynamic shift.
    Rounded where diffusers rounds, so that values agree to the last bit but for exp and pow.
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
        mu = shift_of(config, image_tokens, steps)
        factor = math.exp(mu) if config.get("time_shift_type") != "linear" else mu
        values = factor / (factor + (1 / values - 1))
    else:
        values = shift * values / (1 + (shift - 1) * values)
    terminal = config.get("shift_terminal")
    if terminal and values[-1] < 1:  # a single level is pure noise, which no stretch moves
        values = 1 - (1 - values) / ((1 - values[-1]) / (1 - terminal))
    first, last = float(values[0]), float(values[-1])
    if config.get("use_karras_sigmas"):
        ramp, rho = np.linspace(0, 1, steps), 7.0
        values = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    elif config.get("use_exponential_sigmas"):
        values = np.exp(np.linspace(math.log(first), math.log(last), steps))
    elif config.get("use_beta_sigmas"):
        values = last + beta_quantiles(1 - np.linspace(0, 1, steps)) * (first - last)
    return np.append(values.astype(np.float32), np.float32(0))


def beta_quantiles(shares: np.ndarray) -> np.ndarray:
    """Where the beta distribution of parameters BETA has these shares, 0 to 1, below it; float64.

    Its integral up to x <= 1/2 is the power series of x^(a - 1) (1 - x)^(a - 1), term by term, and
    the other half mirrors it; the quantile is found by halving.
    """
    orders = np.arange(64)
    terms = np.cumprod(np.append(1.0, (orders[1:] - BETA) / orders[1:])) / (BETA + orders)

    def integral(x: np.ndarray) -> np.ndarray:
        found: np.ndarray = (terms * x[..., None] ** (BETA + orders)).sum(-1)
        return found

    small = np.minimum(shares, 1 - shares)
    aim = 2 * small * integral(np.array(0.5))  # half of the whole is the integral up to 1/2
    low, high = np.zeros_like(small), np.full_like(small, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = integral(middle) < aim
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(shares <= 0.5, high, 1 - high)


def timesteps(config: Mapping[str, Any], levels: np.ndarray) -> np.ndarray:
    """Noise levels [S] -> the transformer's timesteps [S] in [0, 1], float32.

    diffusers multiplies by num_train_timesteps and divides by 1000, both rounded to float32.
    """
    scale = np.float32(config.get("num_train_timesteps", TRAIN_STEPS))
    return levels.astype(np.float32) * scale / np.float32(1000)


def euler(
    latents: np.ndarray, velocity: np.ndarray, sigma: np.floating, following: np.floating
) -> np.ndarray:
    """One step from noise level `sigma` to `following`, in float32."""
    return latents + (np.float32(following) - np.float32(sigma)) * velocity


def noised(latents: np.ndarray, noise: np.ndarray, level: np.floating) -> np.ndarray:
    """Latents with noise at the noise level `level`, in float32."""
    sigma = np.float32(level)
    return sigma * noise + (np.float32(1) - sigma) * latents


def sampler(scheduler: Mapping[str, Any], levels: np.ndarray) -> Step:
    """Euler's step along the predicted velocity, from one of `levels` to the next."""
    return lambda index, latents, velocity: euler(
        latents, velocity, levels[index], levels[index + 1]
    )
