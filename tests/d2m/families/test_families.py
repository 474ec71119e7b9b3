"""Family records against the real classes, and what unknown pipelines are told."""

import json

import pytest
import torch

from d2m.families import FLUX, family_of, family_of_model
from d2m.families.ffn_sites import read_ffn, read_rest, sites_of
from tests.tiny.pipeline import tiny_inputs, tiny_transformer

SITES = [
    "transformer_blocks.0.ff",
    "transformer_blocks.0.ff_context",
    "transformer_blocks.1.ff",
    "transformer_blocks.1.ff_context",
    "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.1.proj_mlp",
]


def test_sites_in_the_models_order():
    model = tiny_transformer()
    assert [name for name, _, _ in sites_of(model.state_dict(), FLUX)] == SITES
    many = tiny_transformer(num_layers=1, num_single_layers=11)
    names = [name for name, _, _ in sites_of(many.state_dict(), FLUX)]
    assert names[2:] == [f"single_transformer_blocks.{i}.proj_mlp" for i in range(11)]


def test_sites_are_what_the_blocks_compute():
    """The FFN read from the weights equals what flows through the block, by forward hooks."""
    model, inputs = tiny_transformer(dtype=torch.float64), tiny_inputs(dtype=torch.float64)
    seen = {}

    def keep(name):
        return lambda module, args, output: seen.__setitem__(name, (args[0], output))

    for i in range(2):
        for name in ("ff", "ff_context"):
            module = f"transformer_blocks.{i}.{name}"
            model.get_submodule(module).register_forward_hook(keep(module))
        for name in ("proj_mlp", "proj_out"):
            module = f"single_transformer_blocks.{i}.{name}"
            model.get_submodule(module).register_forward_hook(keep(module))
    with torch.no_grad():
        model(**inputs)
        state = model.state_dict()
        for name, block, site in sites_of(state, FLUX):
            fc1_w, fc1_b, fc2_w, fc2_b = read_ffn(state.__getitem__, block, site)
            x = seen[name][0]
            hidden = torch.nn.functional.gelu(x @ fc1_w.T + fc1_b, approximate="tanh")
            y, output = hidden @ fc2_w.T + fc2_b, seen[name][1]
            if site.rest:
                attention, output = seen[f"{block}.{site.fc2}"]
                rest = read_rest(state.__getitem__, block, site)["proj_out.linear.weight"]
                y = y + attention[..., :32] @ rest.T
            assert torch.allclose(y, output, rtol=1e-12, atol=1e-12), name


def test_family_of_directory_and_configs(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert family_of(tmp_path) is FLUX
    assert family_of({"_class_name": "FluxTransformer2DModel"}) is FLUX
    assert family_of({"_class_name": "SparseFluxTransformer2DModel"}) is FLUX
    assert family_of_model(tiny_transformer()) is FLUX


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ('{"_class_name": "StableDiffusionPipeline"}', ValueError, "known are FluxPipeline"),
        ("[]", ValueError, r"model_index.json holds \[\], expected a JSON object"),
        ("{", ValueError, "model_index.json is not valid JSON"),
        ("{}", ValueError, "not a diffusers pipeline index"),
        ('{"_class_name": 1}', ValueError, "not a diffusers pipeline index"),
        (None, FileNotFoundError, "no model_index.json"),
    ],
)
def test_unknown_pipelines(tmp_path, text, error, words):
    if text is not None:
        (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(error, match=words):
        family_of(tmp_path)


def test_missing_directory_and_foreign_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no directory"):
        family_of(tmp_path / "nothing")
    with pytest.raises(ValueError, match="QwenImageEditPlusPipeline, whose text encoder sees"):
        family_of({"_class_name": "QwenImageEditPlusPipeline"})
    with pytest.raises(ValueError, match="class Linear, which d2m does not know"):
        family_of_model(torch.nn.Linear(2, 2))
