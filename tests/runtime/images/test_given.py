"""The images of a call: sizes that fit, strengths, masks, and what does not go together."""

import logging
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.bundle.directory import open_bundle
from runtime.images.given import check_images, example_images, taken_images
from runtime.opened import default_bundle
from runtime.request import check_request
from runtime.sampling import encode_image


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return open_bundle(default_bundle(), check="sizes").manifest


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, np.uint8)


def test_sizes_are_snapped_and_said(
    manifest: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The embedded model takes multiples of 8."""
    with caplog.at_level(logging.WARNING, "runtime"):
        request = check_request(manifest, "a", image=grey(45, 31))
    assert (request.height, request.width, request.latent_size) == (40, 24, (10, 6))
    assert "image of 31 x 45 pixels was made 24 x 40" in caplog.text
    assert request.settings(0)["image_size"] == [31, 45]
    same = check_request(manifest, "a", image=grey(40, 24))
    assert "image_size" not in same.settings(0)
    # Of several images each is said that is made to fit the first.
    caplog.clear()
    with caplog.at_level(logging.WARNING, "runtime"):
        two = check_request(manifest, ["a", "b"], n=2, image=[grey(40, 24), grey(16, 32)])
    assert [record.getMessage() for record in caplog.records] == [
        "the image of 32 x 16 pixels was made 24 x 40, which the model takes"
    ]
    assert [two.settings(i).get("image_size") for i in range(4)] == [None, None, *[[32, 16]] * 2]
    given = check_request(manifest, "a", image=grey(45, 31), height=16)
    assert (given.height, given.width) == (16, 24)
    with pytest.raises(ValueError, match="height is 17, expected a multiple of 8"):
        check_request(manifest, "a", image=grey(45, 31), height=17)
    with pytest.raises(ValueError, match="a width of 7 pixels, expected at least 8"):
        check_request(manifest, "a", image=grey(45, 7))
    # SD3's positions end somewhere: a larger image keeps its shape.
    small = manifest | {"family": "sd3", "latents": manifest["latents"] | {"grid": 12}}
    assert check_images(small, 1, 1, None, None, image=grey(400, 200))[1:] == (96, 48)


@pytest.mark.parametrize(
    ("strength", "steps", "first"),
    [(0.6, 28, 11), (0.5, 5, 2), (1.0, 4, 0), (0.001, 3, 2), (1e-300, 3, 2)],
)
def test_strength_keeps_the_last_steps(
    manifest: dict[str, Any], strength: float, steps: int, first: int
) -> None:
    """As diffusers rounds: t_start = int(steps - steps * strength); one is always taken."""
    request = check_request(manifest, "a", steps=steps, image=grey(8, 8), strength=strength)
    assert request.images.first_step(steps) == first
    assert request.settings(0)["strength"] == strength


def test_images_of_a_batch_and_their_hashes(manifest: dict[str, Any]) -> None:
    """One for all is stored once; one a prompt goes with all images of the prompt."""
    one, other = grey(8, 8), grey(8, 8) + 1
    mask = np.eye(8)
    both = check_request(manifest, ["a", "b"], n=2, image=[one, Image.fromarray(other)], mask=mask)
    images = both.images
    assert images.image is not None and images.mask is not None and images.strength == 1.0
    assert images.image.shape == (4, 3, 8, 8) and images.mask.shape == (4, 1, 8, 8)
    hashes = [both.settings(index)["image"] for index in range(4)]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
    shared = check_request(manifest, ["a", "b"], n=3, image=one)
    assert shared.images.image is not None and shared.images.image.strides[0] == 0
    assert shared.settings(5)["image"] == hashes[0] and shared.images.strength == 0.6


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"strength": 0.5}, "strength is 0.5 but there is no image"),
        ({"strength": 0, "image": grey(8, 8)}, "strength is 0, expected a number above 0"),
        ({"strength": True, "image": grey(8, 8)}, "strength is true|strength is True"),
        ({"mask": np.ones((8, 8))}, "a mask is given but no image"),
        ({"mask": np.ones((8, 9)), "image": grey(8, 8)}, "the mask has 9 x 8 pixels and the image"),
        ({"mask": np.zeros((8, 8)), "image": grey(8, 8)}, "the mask is black"),
        # A point that is lost where the image is made smaller.
        ({"mask": np.eye(1, 4096).reshape(64, 64), "image": grey(64, 64), "height": 8}, "is black"),
        ({"control": grey(8, 8)}, "a control image is given, expected none"),
        ({"image": [grey(8, 8)] * 3}, "image lists 3 images for 1 prompts"),
    ],
)
def test_what_does_not_go_together(
    manifest: dict[str, Any], given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_request(manifest, "a", **given)


def test_a_mask_keeps_what_it_does_not_cover() -> None:
    """Latents of what is kept are the image's own, bit for bit; an image depends on no other."""
    pipeline, found = runtime.load(threads=1), []
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(2)]
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    call: dict[str, Any] = {"steps": 3, "output_type": "np", "mask": mask}
    call["callback"] = lambda done, steps, latents: found.append(latents)
    together = pipeline(["a red circle", "a blue cross"], image=images, seed=[0, 1], **call)
    last = found[-1]
    clean = encode_image(pipeline, pipeline_pixels(images))
    left = np.arange(16) % 4 < 2  # of 4 x 4 tokens
    assert np.array_equal(last[:, left], clean[:, left])
    assert np.abs(last[:, ~left] - clean[:, ~left]).max() > 0.1
    alone = pipeline("a blue cross", image=images[1], seed=1, **call)
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5)


def pipeline_pixels(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([image.transpose(2, 0, 1) / np.float32(127.5) - 1 for image in images])


def test_examples_are_what_a_model_cannot_do_without(manifest: dict[str, Any]) -> None:
    assert example_images(manifest) == {}
    assert taken_images(manifest) == {"image": 1, "mask": 1}
    kontext = manifest | {"latents": manifest["latents"] | {"condition": "reference"}}
    assert taken_images(kontext) == {"image": 1, "mask": 1, "references": 1}
    without = {k: v for k, v in manifest["components"].items() if k != "vae_encoder"}
    assert taken_images(kontext | {"components": without}) == {}
    for kind, names in (("fill", {"image", "mask"}), ("control", {"control"})):
        other = manifest | {"latents": manifest["latents"] | {"condition": kind}}
        given = example_images(other)
        assert set(given) == names
        request = check_request(other, "a", **given)
        assert (request.height, request.width) == (32, 32)
