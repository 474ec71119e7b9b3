"""FLUX.1 Fill, and Canny and Depth: exported, and generating as diffusers' pipelines do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

import runtime
from d2m.families.generation_defaults import write_defaults
from tests.conftest import exported
from tests.tiny.image_models import CHANNELS, image_model

PROMPTS = ["a red circle", "two blue squares and a green ring"]
HEIGHT, WIDTH = 12, 16
TITLES = {
    "FluxFillPipeline": ("fill", "FLUX.1 Fill [dev]"),
    "FluxControlPipeline": ("control", "FLUX.1 Canny or Depth [dev]"),
}


@pytest.fixture(scope="module", params=list(CHANNELS))
def pipe(request: pytest.FixtureRequest) -> Any:
    built = image_model(request.param)
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def directory(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / type(pipe).__name__
    pipe.save_pretrained(path)
    write_defaults(path, height=HEIGHT, width=WIDTH, max_sequence_length=16)
    return path


@pytest.fixture(scope="module")
def bundle(directory: Path, pytestconfig: pytest.Config) -> Path:
    return exported(pytestconfig, directory)


def test_every_part_is_torchs(pipe: Any, directory: Path, bundle: Path) -> None:
    from export.parity.run import parity
    from runtime.bundle.directory import open_bundle

    manifest = open_bundle(bundle).manifest
    condition, title = TITLES[type(pipe).__name__]
    assert (manifest["latents"]["condition"], manifest["model"]) == (condition, title)
    answer = parity(directory, bundle, steps=2)
    assert answer["passed"], answer["failures"]
    assert answer["trajectory"]["steps"][-1]["relative_error"] < 1e-4


def test_generates_as_diffusers_does(
    pipe: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same noise; diffusers takes the means of encoded images too, and no samples."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean
    )
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:8, 5:] = 255
    fills = type(pipe).__name__ == "FluxFillPipeline"
    strength = {"strength": 0.75} if fills else {}
    ours = {"image": picture, "mask": mask} if fills else {"control": picture}
    theirs = {"image": Image.fromarray(picture), "mask_image": Image.fromarray(mask)}
    theirs = theirs if fills else {"control_image": Image.fromarray(picture)}
    shape = (2, 4, HEIGHT // 2, WIDTH // 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5)).numpy()
    pipeline, found = runtime.load(bundle, "ort", threads=1), []
    options: dict[str, Any] = {"steps": 4, "guidance": 5.0, **ours, **strength}
    images = pipeline(
        PROMPTS, latents=noise, callback=lambda done, n, x: found.append(x), **options
    )
    assert len(found) == (3 if fills else 4) and images[0].size == (WIDTH, HEIGHT)
    with torch.no_grad():
        expected = pipe(
            PROMPTS,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(5),
            max_sequence_length=16,
            output_type="latent",
            **theirs,
            **strength,
        ).images
    assert np.abs(found[-1] - expected.numpy()).max() < 1e-4


def test_what_the_model_needs_is_asked_for(pipe: Any, bundle: Path) -> None:
    pipeline = runtime.load(bundle, "ort", threads=1)
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    if type(pipe).__name__ == "FluxFillPipeline":
        with pytest.raises(ValueError, match="no image is given"):
            pipeline("a star")
        with pytest.raises(ValueError, match="no mask is given"):
            pipeline("a star", image=picture)
    else:
        with pytest.raises(ValueError, match="no control image is given"):
            pipeline("a star", image=picture)


def test_what_measures_and_tries_gives_it_images(pipe: Any, bundle: Path) -> None:
    """Callers without an image of their own: bench, measure, the server's start, a trial."""
    from runtime.measure.bench import first_inputs, time_images
    from runtime.serve.batch_invariance import find_min_batch
    from runtime.trial import try_bundle

    pipeline = runtime.load(bundle, "ort", threads=1)
    channels = CHANNELS[type(pipe).__name__]
    assert first_inputs(pipeline, {})["hidden_states"].shape[-1] == channels
    assert time_images(pipeline, 2, 0, {"steps": 2})["step_s"]
    assert find_min_batch(pipeline, (6, 8), None) in (1, 2, None)
    job = {"bundle": str(bundle), "digest": pipeline.bundle.digest, "backend": "ort"}
    try_bundle(job | {"threads": 1, "offload": None})
