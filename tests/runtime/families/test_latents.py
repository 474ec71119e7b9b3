"""Encoded latents become what a family denoises, and that what its VAE decodes."""

import numpy as np
import pytest

from runtime.families import FAMILIES

SETTINGS = {"scaling_factor": 0.36, "shift_factor": 0.12, "patch": 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_encoded_latents_are_the_inverse_of_image_latents(name: str) -> None:
    rng = np.random.default_rng(0)
    count = 16 if name == "flux2" else 4  # packed channels
    statistics = {"mean": rng.normal(size=count).tolist(), "std": rng.uniform(1, 2, count).tolist()}
    settings, latents = SETTINGS | statistics, rng.normal(size=(2, 4, 6, 10)).astype(np.float32)
    if name == "pixart":
        del settings["shift_factor"]  # its VAE has none
    family = FAMILIES[name]
    denoised = family.encoded(latents, settings)
    assert denoised.shape == family.layouts(2, 4, 6, 10)[0]
    assert denoised.dtype == np.float32
    back = family.image_latents(denoised, settings, (6, 10))
    np.testing.assert_allclose(back, latents, atol=1e-6)
    assert np.abs(np.sort(denoised.ravel()) - np.sort(latents.ravel())).max() > 0.01
