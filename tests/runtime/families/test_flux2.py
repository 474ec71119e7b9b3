"""FLUX.2 in numpy: shift, positions and rotary tables against diffusers'."""

import numpy as np
import pytest

from runtime.families import flux2
from runtime.families.latents import rope
from tests.runtime.families.test_flow_matching import FLUX_DEV

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", [1, 4, 28, 50, 200])
@pytest.mark.parametrize("tokens", [12, 1024, 4096, 4300, 4301, 16384])
def test_sigmas(steps: int, tokens: int) -> None:
    """The shift is of both, image tokens and steps; also where noise levels are given."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import (
        compute_empirical_mu,
        retrieve_timesteps,
    )

    mu = compute_empirical_mu(tokens, steps)
    assert flux2.shift_mu({}, tokens, steps) == pytest.approx(mu, rel=1e-12)
    even = np.linspace(1.0, 1 / steps, steps)
    for given in (None, even**2):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLUX_DEV)
        levels = even if given is None else given
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=levels, mu=mu)
        found = flux2.sigmas(FLUX_DEV, steps, tokens, given)
        np.testing.assert_allclose(found, scheduler.sigmas.numpy(), atol=1e-6, rtol=0)


def test_positions_and_rotary_tables() -> None:
    from diffusers import Flux2KleinPipeline
    from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed

    image = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 1, 5, 7))[0]
    text = Flux2KleinPipeline._prepare_text_ids(torch.empty(1, 9, 2))[0]
    found = flux2.position_ids(9, (10, 14))
    np.testing.assert_array_equal(found, torch.cat([text, image]).numpy())
    axes = (4, 8, 6, 2)
    expected = Flux2PosEmbed(2000, list(axes))(torch.from_numpy(found))
    for ours, theirs in zip(rope(found, axes, 2000), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
