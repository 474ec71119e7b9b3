"""DPM-Solver++ of order 1 and 2 in numpy: what diffusers' DPMSolverMultistepScheduler does.

Read: diffusers 0.42 and Lu et al. 2022; the tests hold it to diffusers' scheduler. A model that
predicts noise on a discrete schedule: x = alpha (x_0 + sigma noise), alpha = 1 / sqrt(1 + sigma^2).
`config` is the scheduler's; fields left out have diffusers' defaults. Letters: N training
timesteps, S steps of a generation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.families.latents import Step

KNOWN = {
    "beta_schedule": ("linear", "scaled_linear"),
    "solver_order": (2, 1),
    "prediction_type": ("epsilon",),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint", "heun"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
}
# What a config may ask for that is not done here; the values are what they have to be.
UNKNOWN = (
    "trained_betas",
    "thresholding",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "variance_type",
    "rescale_betas_zero_snr",
)
CURE = "correct the model's scheduler_config.json and export again."
SHORT = 15  # read: below as many steps `lower_order_final` counts


def check_scheduler(config: Mapping[str, Any]) -> None:
    """ValueError for a config that asks for what is not done here, or is of wrong numbers."""
    for field, values in KNOWN.items():
        value = config.get(field, values[0] if field != "beta_schedule" else "linear")
        if isinstance(value, bool) or value not in values:
            words = " or ".join(map(repr, values))
            raise ValueError(f"the scheduler's {field} is {value!r:.60}, expected {words}; {CURE}")
    for field in UNKNOWN:
        if config.get(field):
            raise ValueError(
                f"the scheduler has {field} set, which the runtime does not support;"
                " unset it in the model's scheduler_config.json and export again."
            )
    count = config.get("num_train_timesteps", 1000)
    if type(count) is not int or not 2 <= count <= 100_000:
        raise ValueError(
            f"the scheduler's num_train_timesteps is {count!r:.60}, expected 2 to 100000; {CURE}"
        )
    first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    for field, value in (("beta_start", first), ("beta_end", last)):
        if type(value) not in (int, float) or not 0 < value < 1:
            raise ValueError(
                f"the scheduler's {field} is {value!r:.60}, expected a number between 0 and 1;"
                f" {CURE}"
            )
    clipped = config.get("lambda_min_clipped", -math.inf)
    if clipped is not None and clipped != -math.inf:
        raise ValueError(
            f"the scheduler's lambda_min_clipped is {clipped!r:.60}, expected none; {CURE}"
        )
    offset = config.get("steps_offset", 0)
    if type(offset) is not int or not 0 <= offset < count:
        raise ValueError(
            f"the scheduler's steps_offset is {offset!r:.60}, expected 0 to {count - 1}; {CURE}"
        )


def table(config: Mapping[str, Any]) -> np.ndarray:
    """sigma of every training timestep [N], float32, rising."""
    count = config.get("num_train_timesteps", 1000)
    ends = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if config.get("beta_schedule", "linear") == "scaled_linear":
        roots = math.sqrt(ends[0]), math.sqrt(ends[1])
        betas = np.linspace(*roots, count).astype(np.float32) ** 2
    else:
        betas = np.linspace(*ends, count).astype(np.float32)
    # Products in float64, rounded once each, as torch's cumprod on a CPU.
    kept = np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)
    sigmas: np.ndarray = np.sqrt((np.float32(1) - kept) / kept)
    return sigmas


def timesteps(config: Mapping[str, Any], steps: int) -> np.ndarray:
    """The timesteps of a generation [S], int64, falling."""
    count, spacing = config.get("num_train_timesteps", 1000), config.get("timestep_spacing")
    if spacing == "leading":
        places = np.arange(steps + 1) * (count // (steps + 1)) + config.get("steps_offset", 0)
        found = places[::-1][:-1]
    elif spacing == "trailing":
        found = np.arange(count, 0, -count / steps).round() - 1
    else:
        found = np.linspace(0, count - 1, steps + 1).round()[::-1][:-1]
    return found.astype(np.int64)


def sigmas(config: Mapping[str, Any], steps: int) -> np.ndarray:
    """The noise levels [S + 1], float32, falling.

    ValueError for more steps than there are training timesteps to tell apart.
    """
    levels, places = table(config), timesteps(config, steps)
    if len(places) != steps or places.min() < 0 or places.max() >= len(levels):
        raise ValueError(f"steps is {steps}, which the scheduler cannot place; expected fewer.")
    if len(np.unique(places)) < steps:
        raise ValueError(
            f"steps is {steps}, expected fewer: two of them fall on the same of the scheduler's"
            f" {len(levels)} timesteps."
        )
    last = levels[0] if config.get("final_sigmas_type") == "sigma_min" else np.float32(0)
    return np.append(levels[places], last)


def timestep_of(config: Mapping[str, Any], levels: np.ndarray) -> np.ndarray:
    """The training timesteps [S] that noise levels [S] of `sigmas` are of, int64."""
    return np.abs(table(config)[None, :] - levels[:, None]).argmin(axis=1)


def noised(latents: np.ndarray, noise: np.ndarray, level: np.floating) -> np.ndarray:
    """Latents with noise at the noise level `level`: alpha (x_0 + sigma noise), in float32."""
    sigma = float(level)
    alpha = 1 / math.sqrt(1 + sigma**2)
    found: np.ndarray = np.float32(alpha) * latents + np.float32(alpha * sigma) * noise
    return found


def sampler(config: Mapping[str, Any], levels: np.ndarray) -> Step:
    """A generation's step(index, latents, predicted noise) -> the next latents, float32.

    levels: [S + 1] of `sigmas`. It remembers x_0 as the step before saw it, so the steps of one
    generation are taken in order, each once.
    """
    steps, order = len(levels) - 1, config.get("solver_order", 2)
    final = (
        config.get("euler_at_final", False)
        or (config.get("lower_order_final", True) and steps < SHORT)
        or config.get("final_sigmas_type", "zero") == "zero"
    )
    heun = config.get("solver_type") == "heun"
    sigma = levels.astype(np.float64)
    alpha = 1 / np.sqrt(1 + sigma**2)
    with np.errstate(divide="ignore"):
        lambdas = -np.log(sigma)  # log(alpha / (alpha sigma))
    before: list[np.ndarray] = []

    def step(index: int, latents: np.ndarray, noise: np.ndarray) -> np.ndarray:
        here, there = index, index + 1
        scale = np.float32(sigma[here] * alpha[here])
        start = (latents - scale * noise) / np.float32(alpha[here])
        h = lambdas[there] - lambdas[here]
        grown = math.expm1(-h)  # -1 at the end, where sigma is 0
        kept = alpha[there] * sigma[there] / (alpha[here] * sigma[here])
        result = np.float32(kept) * latents - np.float32(alpha[there] * grown) * start
        if order == 2 and before and not (final and there == steps):
            slope = np.float32(h / (lambdas[here] - lambdas[here - 1])) * (start - before[0])
            weight = grown / h + 1 if heun else -0.5 * grown
            result = result + np.float32(alpha[there] * weight) * slope
        before[:] = [start]
        return result

    return step
