"""FLUX.1 Kontext, dense and sparse with groups: from diffusers' pipeline to images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calib.measure.importance import magnitudes, scores_of
from d2m.families import family_of_pipeline
from d2m.families.flow import generator_at
from d2m.families.generation_defaults import write_defaults
from d2m.model.block_group import set_kappa
from d2m.model.sparse_transformer import sparse_model_of
from d2m.model.surgery import set_top_k, sparse_ffns
from d2m.recipe.recipe import from_dict
from tests.conftest import exported
from tests.tiny.families import FAMILIES
from tests.tiny.pipeline import MAX_SEQUENCE_LENGTH, build_pipeline

PROMPTS = ["a red circle", "two blue squares and a green ring"]
SIZE = 32  # of its images
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=["dense", "sparse"])
def pipe(request: pytest.FixtureRequest) -> Any:
    from diffusers import FluxKontextPipeline

    built = FluxKontextPipeline(**build_pipeline().components)
    if request.param == "sparse":
        groups = {"groups": FAMILIES["schnell"].groups, "kappa": 1}
        facts = {"name": "t", "stages": [], "split": "magnitude", "blocks": groups}
        family, dense = family_of_pipeline(built), built.transformer
        made = sparse_model_of(
            dense, scores_of(dense, magnitudes), from_dict(facts, "test"), family
        )
        generator = torch.Generator().manual_seed(3)
        for ffn in sparse_ffns(made).values():
            torch.nn.init.normal_(ffn.gate.weight, generator=generator)
        for name, weight in made.named_parameters():
            if ".router." in name:
                torch.nn.init.normal_(weight, generator=generator)
        set_top_k(made, 2)
        set_kappa(made, 1)
        built.register_modules(transformer=made)
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def directory(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = "sparse" if sparse_ffns(pipe.transformer) else "dense"
    path = tmp_path_factory.mktemp("kontext") / f"kontext-{kind}"
    pipe.save_pretrained(path)
    write_defaults(path, height=SIZE, width=SIZE, max_sequence_length=MAX_SEQUENCE_LENGTH)
    return path


@pytest.fixture(scope="module")
def bundle(pipe: Any, directory: Path, pytestconfig: pytest.Config) -> Path:
    sparse = {"top_k": (2,)} if sparse_ffns(pipe.transformer) else {}
    return exported(pytestconfig, directory, **sparse)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("mode", ["graph", "blocks"])
def test_edits_as_diffusers_does(pipe: Any, bundle: Path, mode: str) -> None:
    """From the same noise: two prompts, a reference of another size than the images."""
    from runtime.pipeline import Pipeline

    model = Pipeline(bundle, "ort", threads=1, mode=mode)
    family, generator = family_of_pipeline(pipe), generator_at(0, "noise")
    height, width = 24, 40
    noise = torch.stack([family.data.noise(pipe, height, width, generator) for _ in PROMPTS])
    reference, found = picture(SIZE, SIZE), []
    keep = lambda done, steps, latents: found.append(latents)  # noqa: E731
    asked = {"latents": noise.numpy(), "steps": 3, "guidance": 2.5, "height": height}
    asked |= {"width": width, "callback": keep}
    model(PROMPTS, references=[reference], **asked)
    with torch.no_grad():
        theirs = pipe(
            prompt=PROMPTS,
            image=reference,
            latents=noise,
            num_inference_steps=3,
            guidance_scale=2.5,
            height=height,
            width=width,
            max_area=height * width,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            output_type="latent",
            _auto_resize=False,
        ).images.numpy()
    assert np.abs(found[-1] - theirs).max() < 1e-4
    model(PROMPTS, **asked)  # it can go without
    assert np.abs(found[-1] - theirs).max() > 1e-2


def test_every_part_is_torchs_with_a_reference(pipe: Any, bundle: Path, directory: Path) -> None:
    """What `d2m parity` asks: blocks, routers and the trajectory, of noise and reference tokens."""
    from export.parity.run import parity

    answer = parity(directory, bundle, steps=2)
    assert answer["passed"], answer["failures"]
    assert answer["trajectory"]["steps"][-1]["relative_error"] < 1e-4
