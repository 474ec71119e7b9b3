"""FLUX.1 Kontext, Fill and Control: what conversion feeds their transformers is what diffusers
does, and what it writes is a pipeline of the same class."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from calib.data.option import check_data, open_data
from calib.measure.importance import neuron_importance
from calib.measure.routing import routing_table
from d2m.families import family_of_pipeline
from d2m.families.generation_defaults import generation_defaults
from d2m.families.inputs import prediction
from d2m.recipe import recipe as recipes
from tests.cases.conversions import converted
from tests.tiny.editing import EDITORS, build_editor, pairs

SIZE, TOKENS = 16, 16  # pixels; tokens of such an image
PROMPTS = ["a red circle", "two blue squares"]


def images(mask):
    """Two images before, and the mask as Fill is given it."""
    found = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    shown = [Image.fromarray(image) for image in found]
    return found, shown, [Image.fromarray(each.astype(np.uint8) * 255) for each in mask]


@pytest.mark.parametrize("name", EDITORS)
def test_inputs_and_answers_are_those_of_diffusers(name, monkeypatch):
    """diffusers takes a sample of the VAE's distribution for Fill and Control, we its mean."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    pipe = build_editor(name)
    data, seen = family_of_pipeline(pipe).data, []
    mask = np.zeros((2, SIZE, SIZE), bool)
    mask[:, 2:9, 5:12] = True
    before, shown, masks = images(mask)
    noise = torch.randn(2, TOKENS, 16, generator=torch.Generator().manual_seed(0))
    keywords = {"prompt": PROMPTS, "latents": noise, "output_type": "latent", "guidance_scale": 2.5}
    keywords |= {"height": SIZE, "width": SIZE, "num_inference_steps": 1, "max_sequence_length": 8}
    given = {
        "FluxKontextPipeline": {"image": shown, "_auto_resize": False, "max_area": SIZE * SIZE},
        "FluxFillPipeline": {"image": shown, "mask_image": masks},
        "FluxControlPipeline": {"control_image": shown},
    }[name]
    pipe.transformer.register_forward_hook(
        lambda module, args, inputs, output: seen.append((inputs, output[0])), with_kwargs=True
    )
    with torch.no_grad():
        latents = pipe(**keywords, **given).images
        inputs, answer = seen[0]
        batch = data.encode_text(pipe, PROMPTS, 8) | {"latents": noise}
        batch |= data.encode_given(pipe, torch.from_numpy(before), torch.from_numpy(mask))
        batch |= data.position_ids(pipe, batch, SIZE, SIZE) | {"guidance": torch.full((2,), 2.5)}
        ours = data.inputs(pipe.transformer, batch, noise, torch.ones(2))
        for key, value in inputs.items():
            if torch.is_tensor(value):
                torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=0)
        # One step of Euler's from sigma 1 to 0 along the part of the answer that is a prediction.
        own = prediction(pipe.transformer, answer, noise)
    torch.testing.assert_close(noise - own, latents, atol=1e-5, rtol=0)
    assert data.noise(pipe, SIZE, SIZE, torch.Generator()).shape == noise.shape[1:]


@pytest.mark.parametrize("name", EDITORS)
def test_a_conversion_by_pairs_learns_and_keeps_the_pipelines_class(name, tmp_path):
    dense, out = tmp_path / "dense", tmp_path / "sparse"
    build_editor(name).save_pretrained(dense)
    (dense / "defaults.json").write_text(json.dumps({"num_inference_steps": 2}))
    source = open_data(str(pairs(tmp_path / "pairs")), lambda: generation_defaults(dense))
    check_data(dense, source)
    stage = dataclasses.replace(recipes.preset("L").stages[1], steps=20, batch_size=2, lr=1e-3)
    calibration = recipes.Calibration(batches=2, batch_size=2)
    recipe = dataclasses.replace(
        recipes.preset("L"), calibration=calibration, stages=(stage,), top_k=stage.top_k
    )
    answer = converted(
        dense, out, recipe, source.batches, neuron_importance,
        statistics=partial(routing_table, count=1, batch_size=2), log=lambda text: None,
    )  # fmt: skip
    assert answer["identity_error"] < 1e-5 and answer["steps"] == 20
    assert source.facts()["left_out"] == 0
    for losses in answer["losses"].values():
        assert 0 < losses["last"] < losses["first"]
    report = json.loads((out / "report.json").read_text())
    assert report["routing"]["positions"]["rows"] == 4  # reference tokens lie on the same cells
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe).__name__ == name
    assert type(pipe.transformer).__name__ == "SparseFluxTransformer2DModel"
    pipe.set_progress_bar_config(disable=True)
    _, shown, masks = images(np.ones((2, SIZE, SIZE), bool))
    keywords = {"prompt": "a red circle", "height": SIZE, "width": SIZE, "num_inference_steps": 1}
    keywords |= {"max_sequence_length": 8, "output_type": "np"}
    keywords |= {"control_image" if name == "FluxControlPipeline" else "image": shown[0]}
    keywords |= {"mask_image": masks[0]} if name == "FluxFillPipeline" else {}
    keywords |= {"_auto_resize": False, "max_area": 256} if name == "FluxKontextPipeline" else {}
    assert np.isfinite(pipe(**keywords).images).all()


def test_data_of_the_wrong_kind_is_refused(tmp_path):
    def index(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": name}))
        return tmp_path / name

    plain, kontext = SimpleNamespace(kind="pictures"), index("FluxKontextPipeline")
    with pytest.raises(ValueError, match="FluxKontextPipeline.*expected shapes-edit.* before and"):
        check_data(kontext, plain)
    check_data(kontext, SimpleNamespace(kind="pairs"))
    with pytest.raises(ValueError, match="shapes-edit.*FluxFillPipeline"):
        check_data(index("FluxFillPipeline"), SimpleNamespace(kind="shapes-edit"))
    with pytest.raises(ValueError, match="pairs, which FLUX.1 cannot learn from"):
        check_data(index("FluxPipeline"), SimpleNamespace(kind="pairs"))
