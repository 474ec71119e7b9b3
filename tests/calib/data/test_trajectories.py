"""Data-free mode: points of the teacher's own way, the ones that FluxPipeline goes through."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from calib.data.encodings import text_encoder
from calib.data.option import open_data
from calib.data.trajectories import POINTS, trajectory
from d2m.families.flow import flow_matching, generator_at, noisy, training_point
from tests.tiny import data as tinydata
from tests.tiny.pipeline import build_pipeline

SETTINGS = {
    "height": 16,
    "width": 16,
    "num_inference_steps": 6,
    "guidance_scale": 2.5,
    "max_sequence_length": 16,
}


@pytest.fixture(scope="module")
def pipe():
    made = build_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def batches(pipe, path, seed=0, **options):
    data = open_data(str(tinydata.prompts(path)), lambda: SETTINGS | options)
    return data.batches(pipe, seed)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_trajectory_is_the_pipelines_own(pipe, shift, monkeypatch):
    """Its end is what FluxPipeline draws, each step an Euler step of the teacher's answer."""
    monkeypatch.setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=shift))
    text = text_encoder(pipe, 16)("a photo of one red circle")
    noise = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    way = trajectory(pipe, text, noise, SETTINGS)
    states, times = way["states"], way["times"]
    assert states.shape == (7, 16, 16) and times.shape == (7,)
    assert times[-1] == 0 and (times.diff() < 0).all() and times[0] == pytest.approx(1, abs=0.01)
    assert torch.equal(states[0], noise)
    drawn = pipe(
        "a photo of one red circle",
        latents=noise[None],
        output_type="latent",
        **{name: SETTINGS[name] for name in SETTINGS},
    ).images
    assert torch.equal(states[-1], drawn[0])
    ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    for i in range(6):
        with torch.no_grad():
            velocity = pipe.transformer(
                hidden_states=states[i][None],
                timestep=times[i][None],
                guidance=torch.full([1], 2.5),
                encoder_hidden_states=text["encoder_hidden_states"][None],
                pooled_projections=text["pooled_projections"][None],
                img_ids=ids,
                txt_ids=torch.zeros(16, 3),
            )[0][0]
        expected = states[i] + (times[i + 1] - times[i]) * velocity
        assert torch.allclose(states[i + 1], expected, atol=1e-5)


def test_batches_are_pure_and_hold_points_of_the_way(pipe, tmp_path):
    make = batches(pipe, tmp_path / "p.txt")
    batch = make(3, 6)
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "encoder_hidden_states": (6, 16, 32),
        "pooled_projections": (6, 32),
        "latents": (6, 16, 16),
        "noisy": (6, 16, 16),
        "time": (6,),
        "guidance": (6,),
        "img_ids": (16, 3),
        "txt_ids": (16, 3),
    }
    fresh = batches(pipe, tmp_path / "p.txt")
    for other in (fresh(3, 6), (make(0, 6), make(1, 6), make(3, 6))[-1]):
        assert all(torch.equal(batch[name], other[name]) for name in batch)
    assert not torch.equal(batches(pipe, tmp_path / "p.txt", seed=1)(3, 6)["noisy"], batch["noisy"])
    assert set(batch["guidance"].tolist()) == {2.5}


def test_a_way_gives_points_at_different_times(pipe, tmp_path):
    batch = batches(pipe, tmp_path / "p.txt")(0, 2 * POINTS)
    for half in (slice(0, POINTS), slice(POINTS, None)):
        ends = batch["latents"][half]
        assert all(torch.equal(ends[0], end) for end in ends)
        assert len(set(batch["time"][half].tolist())) == POINTS
    assert not torch.equal(batch["latents"][0], batch["latents"][POINTS])


def test_fewer_steps_than_points(pipe, tmp_path):
    batch = batches(pipe, tmp_path / "p.txt", num_inference_steps=2)(0, POINTS)
    assert len(set(batch["time"].tolist())) == 2


def test_what_is_learnt_from(pipe, tmp_path):
    """Points as they are where a batch has them, else noise on its latents."""
    batch = batches(pipe, tmp_path / "p.txt")(0, 2)
    x, t = training_point(batch, generator_at(0), 1.2, 1.2, flow_matching)
    assert x is batch["noisy"] and t is batch["time"]
    plain = {"latents": batch["latents"]}
    expected = noisy(batch["latents"], generator_at(0), 1.2, 1.2)
    found = training_point(plain, generator_at(0), 1.2, 1.2, flow_matching)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_epochs_begin_with_other_noise(pipe, tmp_path):
    (tmp_path / "one.txt").write_text("a red circle\n")
    data = open_data(str(tmp_path / "one.txt"), lambda: SETTINGS).batches(pipe, 0)
    ends = torch.stack([data(epoch, POINTS)["latents"][0] for epoch in (0, 1, 8)])
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])  # after ROUNDS a cache has them all
