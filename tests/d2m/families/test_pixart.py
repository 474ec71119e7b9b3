"""What PixArt-Sigma does otherwise: noise on a schedule of alphas, positions, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from d2m.distill.batch_rows import cut
from d2m.families import pixart
from d2m.families.flow import generator_at, training_point
from d2m.families.pixart.weights import check_conditions
from d2m.recipe.structure import Blocks


def batch_of(size: int, scheduler: Any) -> dict[str, torch.Tensor]:
    latents = torch.randn(size, 4, 6, 6, generator=generator_at(1))
    alphas = scheduler.alphas_cumprod.expand(size, -1)
    return {"latents": latents, "alphas_cumprod": alphas, "img_ids": torch.zeros(9, 3)}


def test_noisy_latents_are_the_schedulers() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    batch = batch_of(64, scheduler)
    x, t, noise = pixart.noised(batch, generator_at(0), mean=0.0, std=2.0)
    places = pixart.timesteps(t)
    assert places.min() >= 0 and places.max() <= 999 and len(places.unique()) > 32
    expected = scheduler.add_noise(batch["latents"], noise, places)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05


def test_rows_of_a_batch_get_its_draws() -> None:
    from diffusers import DPMSolverMultistepScheduler

    batch = batch_of(6, DPMSolverMultistepScheduler())
    whole = training_point(batch, generator_at(0), 1.2, 1.2, pixart.noised)
    part = training_point(cut(batch, (2, 5)), generator_at(0), 1.2, 1.2, pixart.noised, (2, 6))
    for mine, all_of_them in zip(part, whole, strict=True):
        torch.testing.assert_close(mine, all_of_them[2:5], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (8, 6)])
def test_positions_are_diffusers(size: tuple[int, int], scale: int) -> None:
    from diffusers.models.embeddings import PatchEmbed

    from runtime.families.pixart import positions

    made = PatchEmbed(8, 8, 2, 4, 32, interpolation_scale=scale)
    latents = torch.zeros(1, 4, 2 * size[0], 2 * size[1])
    with torch.no_grad():
        expected = made(latents)[0] - made.proj.bias
    found = positions({"base": 4, "interpolation": scale, "width": 32}, *size)
    assert np.abs(found - expected.numpy()).max() < 1e-6


def test_what_it_cannot_have_is_refused_in_a_sentence() -> None:
    depth = {"double": 4, "single": 0}
    with pytest.raises(ValueError, match=r"drops blocks \[1\].* expected none"):
        pixart.check_blocks(Blocks(drop_double=(1,)), depth)
    for config in ({"use_additional_conditions": True, "sample_size": 64}, {"sample_size": 128}):
        with pytest.raises(ValueError, match="use_additional_conditions .* expected false"):
            check_conditions(config)
    check_conditions({"sample_size": 64})
    check_conditions({"sample_size": 128, "use_additional_conditions": False})


@pytest.mark.filterwarnings("ignore")
def test_captions_are_those_of_the_pipelines_default_where_nothing_else_is_installed() -> None:
    """See docs/families.md: cleaning needs beautifulsoup4 and ftfy, which d2m does not."""
    from diffusers import PixArtSigmaPipeline
    from diffusers.utils import is_bs4_available, is_ftfy_available

    from runtime.families.pixart import encode

    texts = ["  A Red Circle, 3x2 ", "", 'jc6640 <b>TWO</b> "blue" -- squares&amp;']
    asked: list[str] = []

    def run(component: str, tokenizer: str, prompts: Any) -> dict[str, np.ndarray]:
        asked.extend(prompts)
        return {"states": np.zeros((3, 1, 1)), "mask": np.ones((3, 1))}

    encode(run, texts)
    plain = object.__new__(PixArtSigmaPipeline)  # preprocessing reads nothing of the pipeline
    assert asked == plain._text_preprocessing(texts, clean_caption=False)
    if is_bs4_available() and is_ftfy_available():
        assert asked != plain._text_preprocessing(texts, clean_caption=True)
    else:
        assert asked == plain._text_preprocessing(texts, clean_caption=True)
