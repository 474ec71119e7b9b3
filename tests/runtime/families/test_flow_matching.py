"""Flow matching and latents, every function against diffusers' own."""

import numpy as np
import pytest

from runtime.families import flow_matching
from runtime.families import latents as latents_of

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FLUX_DEV = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
CONFIGS = {
    "dev": FLUX_DEV,
    "schnell": {**FLUX_DEV, "shift": 1.0, "use_dynamic_shifting": False},
    "shift3": {"shift": 3.0},
    "plain": {},
    "linear": {**FLUX_DEV, "time_shift_type": "linear"},
    "terminal": {**FLUX_DEV, "shift_terminal": 0.1},
    "karras": {**FLUX_DEV, "use_karras_sigmas": True},
    "exponential": {"shift": 2.0, "use_exponential_sigmas": True},
    "train500": {**FLUX_DEV, "num_train_timesteps": 500},
}


def reference(config: dict, steps: int, tokens: int):
    """Sigmas and timesteps as FluxPipeline.__call__ obtains them."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config.get(name) for name in names))
    sigmas = np.linspace(1.0, 1 / steps, steps)
    if getattr(scheduler.config, "use_flow_sigmas", False):
        sigmas = None
    timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    return scheduler, scheduler.sigmas.numpy(), timesteps


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [2, 4, 16, 28, 50, 1000])
def test_sigmas(name: str, steps: int) -> None:
    for tokens in (64, 256, 1024, 4096, 16384):
        _, expected, timesteps = reference(CONFIGS[name], steps, tokens)
        found = flow_matching.sigmas(CONFIGS[name], steps, tokens)
        assert found.dtype == np.float32 and found.shape == (steps + 1,)
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
        given = flow_matching.timesteps(CONFIGS[name], found[:1])
        assert given.shape == (1,) and given.dtype == np.float32
        np.testing.assert_allclose(given, (timesteps[0] / 1000).item(), atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sigmas_of_the_schedulers_own_spacing(dynamic: bool) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = {**FLUX_DEV, "use_dynamic_shifting": dynamic}
    for steps in (2, 7, 28):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(steps, mu=calculate_shift(1024))
        found = flow_matching.sigmas({**config, "use_flow_sigmas": True}, steps, 1024)
        np.testing.assert_allclose(found, scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_given_sigmas_are_shifted_as_the_scheduler_shifts_them(name: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

    given = [1.0, 0.83, 0.5, 0.12]
    config = {**CONFIGS[name], "use_flow_sigmas": False}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(576, *(getattr(scheduler.config, field) for field in names))
    retrieve_timesteps(scheduler, 4, "cpu", sigmas=np.array(given), mu=mu)
    found = flow_matching.sigmas(config, 4, 576, given)
    np.testing.assert_allclose(found, scheduler.sigmas.numpy(), atol=1e-6)


def test_beta_sigmas_follow_the_distribution() -> None:
    """diffusers asks SciPy for the quantiles; here the distribution itself is asked, by mpmath."""
    mpmath = pytest.importorskip("mpmath")
    config = {**FLUX_DEV, "use_dynamic_shifting": False, "use_beta_sigmas": True}
    flow_matching.check_scheduler(config)
    for steps in (1, 2, 35):
        found = flow_matching.sigmas(config, steps, 1024)
        plain = flow_matching.sigmas({**config, "use_beta_sigmas": False}, steps, 1024)
        assert found[0] == plain[0] == 1 and found[-1] == 0 and (np.diff(found) < 0).all()
        assert steps == 1 or found[-2] == plain[-2]
        places = (found[:-1].astype(float) - plain[-2]) / max(plain[0] - plain[-2], 1e-9)
        for i, place in enumerate(places if steps > 1 else ()):
            share = mpmath.betainc(0.6, 0.6, 0, min(max(place, 0), 1), regularized=True)
            assert float(share) == pytest.approx(1 - i / (steps - 1), abs=2e-6)
    shares = np.array([1e-6, 0.01, 0.3, 0.5, 0.777, 0.999999])
    for share, place in zip(shares, flow_matching.beta_quantiles(shares)):
        back = mpmath.betainc(0.6, 0.6, 0, float(place), regularized=True)
        assert float(back) == pytest.approx(share, rel=1e-12)


def test_one_step_starts_at_one() -> None:
    for config in CONFIGS.values():  # diffusers' own is NaN with shift_terminal
        assert flow_matching.sigmas(config, 1, 256).tolist() == [1.0, 0.0]
        assert flow_matching.sigmas(config, 1, 256, [1.0]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"stochastic_sampling": True},
        {"invert_sigmas": True},
        {"time_shift_type": "cubic"},
        {"shift": 0},
        {"shift": "3"},
        {"base_shift": float("nan")},
        {"shift": True},
        {"shift_terminal": 1.0},
        {"shift_terminal": "x"},
        {"base_image_seq_len": 4096},
    ],
)
def test_a_scheduler_that_is_not_fluxs_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*export again"):
        flow_matching.check_scheduler({**FLUX_DEV, **wrong})


def test_known_schedulers_pass() -> None:
    for config in CONFIGS.values():
        flow_matching.check_scheduler(config)


def test_euler_steps_like_the_scheduler() -> None:
    scheduler, sigmas, timesteps = reference(FLUX_DEV, 7, 256)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 16, 8), np.float32)
    ours, theirs = latents, torch.from_numpy(latents)
    for index, timestep in enumerate(timesteps):
        velocity = rng.standard_normal(latents.shape, np.float32)
        ours = flow_matching.euler(ours, velocity, sigmas[index], sigmas[index + 1])
        theirs = scheduler.step(torch.from_numpy(velocity), timestep, theirs)[0]
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (2, 16)])
def test_pack_and_unpack(size: tuple[int, int]) -> None:
    from diffusers import FluxPipeline

    latents = np.random.default_rng(1).standard_normal((3, 4, *size), np.float32)
    packed = latents_of.pack(latents)
    expected = FluxPipeline._pack_latents(torch.from_numpy(latents), 3, 4, *size)
    np.testing.assert_array_equal(packed, expected.numpy())
    np.testing.assert_array_equal(latents_of.unpack(packed, *size), latents)
    pixels = (size[0] * 8, size[1] * 8)
    theirs = FluxPipeline._unpack_latents(expected, *pixels, 8)
    np.testing.assert_array_equal(theirs.numpy(), latents)


def test_position_ids() -> None:
    from diffusers import FluxPipeline

    image = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32).numpy()
    found = latents_of.position_ids(7, 6, 10)
    np.testing.assert_array_equal(found, np.concatenate([np.zeros((7, 3)), image]))


@pytest.mark.parametrize("axes", [(16, 56, 56), (8, 12, 12), (4, 6, 6)])
def test_rope(axes: tuple[int, int, int]) -> None:
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    positions = latents_of.position_ids(9, 128, 96)
    cos, sin = latents_of.rope(positions, axes)
    expected = FluxPosEmbed(10000, list(axes))(torch.from_numpy(positions))
    assert cos.dtype == sin.dtype == np.float32
    for found, theirs in zip((cos, sin), expected, strict=True):
        np.testing.assert_allclose(found, theirs.numpy(), atol=1e-6)


def test_noise_depends_on_its_seed_alone() -> None:
    several = latents_of.packed_noise([5, 6, 7], 4, 8, 6)
    assert several.shape == (3, 12, 16) and several.dtype == np.float32
    np.testing.assert_array_equal(several[1:2], latents_of.packed_noise([6], 4, 8, 6))
    assert abs(float(several.mean())) < 0.2 and 0.8 < float(several.std()) < 1.2
    assert not np.array_equal(several[0], several[1])


def test_noise_stays_what_it_is() -> None:
    # Images are to be drawn again from their metadata years later: the stream must not change.
    expected = [-0.24822916, -0.02676702, -0.28061485]
    np.testing.assert_allclose(latents_of.packed_noise([0], 4, 8, 8)[0, 0, :3], expected, atol=1e-6)


def test_unscale() -> None:
    latents = np.random.default_rng(2).standard_normal((1, 4, 2, 2), np.float32)
    scaled = latents_of.unscale(latents, 0.3611, 0.1159)
    expected = (torch.from_numpy(latents) / 0.3611) + 0.1159
    np.testing.assert_allclose(scaled, expected.numpy(), atol=1e-6)
    assert latents_of.unscale(latents, 0.5, None).dtype == np.float32


def test_guidance_is_an_input_where_the_model_embeds_it() -> None:
    from runtime.families.flux import FLUX

    manifest = {
        "components": {"transformer": {"inputs": {"guidance": {}}}},
        "latents": {"rope_axes": [2, 2, 2], "rope_theta": 10000},
        "scheduler": {},
    }
    conditions = {"encoder_hidden_states": np.zeros((2, 3, 4), np.float32)}
    given = FLUX.inputs(manifest, conditions, (4, 4), 3.5)
    assert given["guidance"].tolist() == [3.5, 3.5] and given["guidance"].dtype == np.float32
