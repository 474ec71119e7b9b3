"""What a plan is made for: shipped configs, directories, and what is wrong with others."""

import json
import shutil
from pathlib import Path

import pytest

from d2m.plan.model_config import shipped_configs, sizes, subject_of

ROOT = Path(__file__).resolve().parents[3]


def test_flux_dev_is_shipped_and_is_diffusers_default():
    names = [
        "chroma",
        "flux-dev",
        "flux-schnell",
        "flux2-dev",
        "flux2-klein-4b",
        "flux2-klein-9b",
        "pixart-sigma",
        "qwen-image",
    ]
    assert [*shipped_configs()] == [*names, "sd3.5-large", "sd3.5-medium", "z-image"]
    subject = subject_of("flux-dev")
    assert subject.title == "FLUX.1 [dev]" and subject.sparse is None
    assert subject.config == sizes({"guidance_embeds": True}, "defaults")
    assert subject.depth == {"double": 19, "single": 38}
    assert (subject.height, subject.width, subject.text_tokens, subject.pixels) == (
        *(1024, 1024),
        *(512, 16),
    )


@pytest.mark.parametrize("where", [".", "transformer"])
def test_a_pipeline_and_its_transformer_are_the_same(where):
    subject = subject_of(ROOT / "models/shapes-dense" / where)
    assert subject.title == str(ROOT / "models/shapes-dense")
    assert (subject.height, subject.pixels, subject.text_tokens) == (32, 8, 16)
    assert subject.depth == {"double": 6, "single": 12}


def test_a_transformer_alone_draws_as_flux_does(tmp_path):
    shutil.copy(ROOT / "models/shapes-dense/transformer/config.json", tmp_path)
    subject = subject_of(tmp_path)
    assert (subject.height, subject.pixels, subject.text_tokens) == (1024, 16, 512)


def test_a_sparse_models_structure_is_its_configs(tiny_sparse_dir):
    sparse = subject_of(tiny_sparse_dir).sparse
    assert sparse["num_experts"] == 12 and sparse["top_k"] == 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has neither model_index.json nor config.json"),
        ({"config.json": "{"}, "is not valid JSON"),
        ({"config.json": "[]"}, r"holds \[\], expected a JSON object"),
        ({"config.json": '{"_class_name": "UNet"}'}, "of class UNet, which d2m does not know"),
        (
            {"config.json": '{"_class_name": "FluxTransformer2DModel", "num_layers": "x"}'},
            "num_layers is 'x'",
        ),
        ({"model_index.json": '{"_class_name": "FluxPipeline"}'}, "config.json is missing"),
    ],
)
def test_directories_that_are_no_models(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        subject_of(tmp_path)


def test_a_path_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="'nothing' is no directory; .* flux-dev"):
        subject_of("nothing")


def test_a_size_of_none_is_the_default():
    config = sizes(json.loads('{"num_layers": 0, "out_channels": 8}'), "x")
    assert (config["num_layers"], config["in_channels"], config["out_channels"]) == (0, 64, 8)
    with pytest.raises(ValueError, match="num_attention_heads is 0; expected 1 or more"):
        sizes({"num_attention_heads": 0}, "x")
