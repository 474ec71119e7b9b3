"""runtime.families.dpm_solver against diffusers' DPMSolverMultistepScheduler, from the same
noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.families import dpm_solver

SIGMA = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
CONFIGS: dict[str, dict[str, Any]] = {
    "pixart-sigma": SIGMA,
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "first order": {**SIGMA, "solver_order": 1},
    "heun": {**SIGMA, "solver_type": "heun", "lower_order_final": False},
    "leading": {**SIGMA, "timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {**SIGMA, "timestep_spacing": "trailing", "euler_at_final": True},
    "sigma_min": {**SIGMA, "final_sigmas_type": "sigma_min"},
}


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_drawing_is_diffusers(name: str, steps: int) -> None:
    """Sigmas, timesteps and every step's latents, predictions being a function of the latents."""
    torch = pytest.importorskip("torch")
    from diffusers import DPMSolverMultistepScheduler

    config = CONFIGS[name]
    dpm_solver.check_scheduler(config)
    scheduler = DPMSolverMultistepScheduler(**config)
    scheduler.set_timesteps(steps)
    levels = dpm_solver.sigmas(config, steps)
    np.testing.assert_allclose(levels, scheduler.sigmas.numpy(), rtol=1e-5)
    times = dpm_solver.timestep_of(config, levels[:-1])
    np.testing.assert_array_equal(times, scheduler.timesteps.numpy())
    step = dpm_solver.sampler(config, levels)
    ours = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
    theirs = torch.from_numpy(ours)
    for index, time in enumerate(scheduler.timesteps):
        ours = step(index, ours, np.tanh(ours + 0.1 * index))
        noise = torch.tanh(theirs + 0.1 * index)
        theirs = scheduler.step(noise, time, theirs, return_dict=False)[0]
        assert ours.dtype == np.float32
        assert np.abs(ours - theirs.numpy()).max() < 1e-5 * np.abs(theirs.numpy()).max()


@pytest.mark.parametrize("name", ["pixart-sigma", "heun"])
def test_a_drawing_from_noised_latents_is_diffusers(name: str) -> None:
    """Begun in the middle, as for an image that is changed: noise added there, then the steps."""
    torch = pytest.importorskip("torch")
    from diffusers import DPMSolverMultistepScheduler

    config, steps, start = CONFIGS[name], 9, 4
    scheduler = DPMSolverMultistepScheduler(**config)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(start)
    levels = dpm_solver.sigmas(config, steps)
    rng = np.random.default_rng(0)
    image, noise = rng.standard_normal((2, 2, 4, 6, 6)).astype(np.float32)
    ours = dpm_solver.noised(image, noise, levels[start])
    times = scheduler.timesteps[start:]
    theirs = scheduler.add_noise(torch.from_numpy(image), torch.from_numpy(noise), times[:1])
    assert np.abs(ours - theirs.numpy()).max() < 1e-6
    assert np.array_equal(dpm_solver.noised(image, noise, np.float32(0)), image)
    step = dpm_solver.sampler(config, levels)
    for index, time in enumerate(times, start):
        ours = step(index, ours, np.tanh(ours + 0.1 * index))
        predicted = torch.tanh(theirs + 0.1 * index)
        theirs = scheduler.step(predicted, time, theirs, return_dict=False)[0]
        assert np.abs(ours - theirs.numpy()).max() < 1e-5 * np.abs(theirs.numpy()).max()


def test_what_diffusers_writes_is_taken() -> None:
    """The config that save_pretrained writes, -Infinity and all."""
    diffusers = pytest.importorskip("diffusers")
    dpm_solver.check_scheduler(dict(diffusers.DPMSolverMultistepScheduler().config))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"solver_order": 3}, "solver_order is 3, expected 2 or 1"),
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction', expected"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas set"),
        ({"thresholding": True}, "thresholding set"),
        ({"variance_type": "learned_range"}, "variance_type set"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1, expected"),
        ({"beta_end": "0.02"}, "beta_end is '0.02', expected"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped is -5.1, expected none"),
        ({"steps_offset": -1}, "steps_offset is -1, expected"),
    ],
)
def test_what_is_not_done_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dpm_solver.check_scheduler({**SIGMA, **wrong})


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps is 1000, expected fewer"):
        dpm_solver.sigmas(SIGMA, 1000)
