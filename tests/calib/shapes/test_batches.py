"""Batches of the shapes world: pure in (seed, step), and what FluxPipeline itself would see."""

import pytest
import torch

from calib.shapes.batches import shapes_batches, world_of
from calib.shapes.world import World
from d2m.families.latents import packed_latents
from tests.tiny.pipeline import build_pipeline, tiny_inputs


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


WORLD = World(size=32)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_pure_in_seed_and_step(pipe):
    first = shapes_batches(pipe, WORLD, seed=1)
    expected = first(7, 3)
    first(8, 3)
    assert equal(first(7, 3), expected)
    assert equal(shapes_batches(pipe, WORLD, seed=1)(7, 3), expected)
    assert not equal(first(8, 3), expected)
    assert not equal(shapes_batches(pipe, WORLD, seed=2)(7, 3), expected)


def test_shapes_and_ids(pipe):
    batch = shapes_batches(pipe, WORLD, seed=0)(0, 3)
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "latents": (3, 64, 16),
        "encoder_hidden_states": (3, 16, 32),
        "pooled_projections": (3, 32),
        "img_ids": (64, 3),
        "txt_ids": (16, 3),
        "category": (3,),
    }
    assert batch["img_ids"][9].tolist() == [0, 1, 1] and not batch["txt_ids"].any()
    assert not any(t.requires_grad for t in batch.values())


def test_latents_decode_to_the_pictures(pipe):
    """Through FluxPipeline's own unpacking: the VAE sees what it would see when drawing."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 32, 32, 3), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        packed = packed_latents(pipe, images)
        latents = pipe._unpack_latents(packed, 32, 32, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = pipe.vae.encode(pixels).latent_dist.mean
    assert torch.allclose(latents, expected, atol=1e-5)


def test_pipeline_draws_from_the_same_conditions(pipe):
    """The transformer's inputs while the pipeline draws have the shapes of a batch."""
    batch = shapes_batches(pipe, WORLD, seed=0)(0, 1)
    seen = {}
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=1,
        max_sequence_length=16,
        output_type="latent",
    )
    handle.remove()
    for name in ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids"):
        assert seen[name].shape == batch[name].shape, name
    assert torch.equal(seen["img_ids"], batch["img_ids"])
    assert seen["hidden_states"].shape == batch["latents"].shape
    assert seen.keys() >= tiny_inputs().keys() - {"hidden_states"}


def test_worlds_that_do_not_fit(pipe):
    with pytest.raises(ValueError, match="sample_size is 16, which no shapes world has"):
        world_of(pipe)
    scale, pipe.vae_scale_factor = pipe.vae_scale_factor, 24
    try:
        with pytest.raises(ValueError, match="images of 32 pixels do not divide"):
            shapes_batches(pipe, WORLD)
    finally:
        pipe.vae_scale_factor = scale
