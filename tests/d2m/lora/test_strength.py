"""A LoRA is added as the library that wrote it merges it, strength included."""

import copy
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import d2m  # noqa: F401 - diffusers finds our class in a module that is imported
from d2m.lora.file import read_lora
from d2m.lora.fuse import lora
from tests.tiny.families import FAMILIES
from tests.tiny.lora import factors, fused, peft, write
from tests.tiny.pipeline import build_pipeline

peft_library = pytest.importorskip("peft")

# Patterns in the order of their names, since both libraries sort them when they save.
STRENGTHS = {
    "half": {"r": 4, "lora_alpha": 2},
    "default": {"r": 4},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"attn.to_q": 3, "to_q": 2, r"transformer_blocks\.0\..*": 5},
        "alpha_pattern": {"1.attn.to_q": 9, "attn.to_k": 1, "to_k|to_v": 3.5},
    },
    "gaussian": {"r": 2, "lora_alpha": 1, "init_lora_weights": "gaussian"},
}


def randomised(model, seed=0):
    """peft starts with zeros: random factors in their place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def wrapped(transformer, **settings):
    linears = [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    config = peft_library.LoraConfig(target_modules=linears, **settings)
    return randomised(peft_library.get_peft_model(copy.deepcopy(transformer), config))


def merged_by_d2m(file, pipe, folder, scale=1.0):
    pipe.save_pretrained(folder / "dense")
    lora(file, folder / "dense", folder / "out", scale=scale)
    return load_file(folder / "out/transformer/diffusion_pytorch_model.safetensors")


def same(made, expected, before):
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(made[name], tensor, atol=1e-5), name
    changed = sum(not torch.equal(expected[name], tensor) for name, tensor in before.items())
    assert changed > len(before) // 4


@pytest.mark.parametrize("strength", STRENGTHS)
def test_as_peft_merges_it(strength, tmp_path):
    """adapter_config.json beside adapter_model.safetensors holds the strength."""
    pipe = build_pipeline()
    model = wrapped(pipe.transformer, **STRENGTHS[strength])
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    made = merged_by_d2m(file, pipe, tmp_path)
    before = pipe.transformer.state_dict()
    same(made, model.merge_and_unload().state_dict(), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_peft_merges_it_in_every_family(family, tmp_path):
    pipe = FAMILIES[family].build()
    model = wrapped(pipe.transformer, r=4, lora_alpha=3, use_rslora=True)
    model.save_pretrained(tmp_path / "adapter")
    made = merged_by_d2m(tmp_path / "adapter/adapter_model.safetensors", pipe, tmp_path)
    same(made, model.merge_and_unload().state_dict(), pipe.transformer.state_dict())


@pytest.mark.parametrize("strength", STRENGTHS)
def test_as_diffusers_merges_it(strength, tmp_path):
    """The metadata that diffusers writes, read again by its pipeline, at a scale of .7."""
    pipe = build_pipeline()
    pipe.save_pretrained(tmp_path / "dense")
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    config = peft_library.LoraConfig(
        target_modules=["to_q", "to_k", "to_v", "to_out.0"], **STRENGTHS[strength]
    )
    pipe.transformer.add_adapter(config)
    randomised(pipe.transformer)
    layers = peft_library.get_peft_model_state_dict(pipe.transformer)
    told = pipe.transformer.peft_config["default"].to_dict()
    pipe.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=told
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "dense")
    theirs.load_lora_weights(file)
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    lora(file, tmp_path / "dense", tmp_path / "out", scale=0.7)
    made = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    expected = theirs.transformer.state_dict()
    assert all(torch.allclose(made[name], expected[name], atol=1e-5) for name in expected)
    assert sum(not torch.equal(made[name], before[name]) for name in before) == 4 * 4 - 2


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_diffusers_names_with_alpha_as_diffusers_merges_them(alpha, tmp_path):
    pipe = build_pipeline()
    pipe.save_pretrained(tmp_path / "dense")
    file = write(tmp_path / "a.safetensors", peft(factors(pipe.transformer), alpha))
    made = merged_by_d2m(file, pipe, tmp_path)
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = pipe.transformer.state_dict()
    assert all(torch.allclose(made[name], expected[name], atol=1e-5) for name in expected)


def test_strengths_that_are_missing_or_of_another_adapter(tmp_path):
    pipe = build_pipeline()
    shapes = {
        n: tuple(m.weight.shape)
        for n, m in pipe.transformer.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    model = wrapped(pipe.transformer, r=4, lora_alpha=2)
    model.save_pretrained(tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    told = json.loads(config.read_text())
    assert {low.scale for low in read_lora(file, shapes).values()} == {0.5}
    for change, words in (
        ({"use_dora": True}, "made with use_dora; expected a plain LoRA"),
        ({"use_qalora": True}, "made with use_qalora"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the model's own"),
        ({"peft_type": "LOHA"}, "an adapter of the kind LOHA"),
        ({"r": 8}, "rank 4 where its config says 8"),
        ({"rank_pattern": {"to_q": 2}}, "rank 4 where its config says 2"),
        ({"lora_alpha": None}, "float"),
        ({"alpha_pattern": {"(": 3}}, "unterminated|missing"),
        ({"alpha_pattern": [3]}, "items"),
    ):
        config.write_text(json.dumps(told | change))
        with pytest.raises(ValueError, match=words) as caught:
            read_lora(file, shapes)
        assert str(tmp_path) in str(caught.value)
    config.write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_lora(file, shapes)
    config.unlink()
    with pytest.raises(ValueError, match="adapter_config.json, which is not there; expected that"):
        read_lora(file, shapes)


def test_dora_is_refused(tmp_path):
    pipe = build_pipeline()
    model = wrapped(pipe.transformer, r=4, use_dora=True)
    model.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="made with use_dora"):
        lora(tmp_path / "adapter_model.safetensors", tmp_path / "dense")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_that_is_not_finite(bad, tmp_path):
    pipe = build_pipeline()
    tensors = peft(factors(pipe.transformer), 3.0)
    pipe.save_pretrained(tmp_path / "dense")
    good = write(tmp_path / "good.safetensors", tensors)
    with pytest.raises(ValueError, match=r"--scale is -?(nan|inf); expected a finite number"):
        lora(good, tmp_path / "dense", tmp_path / "out", scale=bad)
    for key in ("transformer.proj_out.lora_A.weight", "transformer.proj_out.alpha"):
        broken = tensors[key].clone()
        broken.view(-1)[-1] = bad
        file = write(tmp_path / "bad.safetensors", tensors | {key: broken})
        with pytest.raises(ValueError, match=f"{key} holds NaN or infinity"):
            lora(file, tmp_path / "dense", tmp_path / "out")
    with pytest.raises(ValueError, match=r"is NaN or infinite with the LoRA at scale 1e\+300"):
        lora(good, tmp_path / "dense", tmp_path / "out", scale=1e300)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bad.safetensors",
        "dense",
        "good.safetensors",
    ]


def test_what_is_stored_twice_is_not_left_unfused(tmp_path):
    """A variant and a single file hold the weights as they were: OUT has none of them."""
    pipe = build_pipeline()
    pipe.save_pretrained(tmp_path / "dense")
    folder = tmp_path / "dense/transformer"
    weights = folder / "diffusion_pytorch_model.safetensors"
    for name in (
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "../flux1-tiny.safetensors",
    ):
        (folder / name).write_bytes(weights.read_bytes())
    for name in ("transformer/notes.md", "importance.safetensors", "vae/notes.safetensors"):
        (tmp_path / "dense" / name).write_bytes(weights.read_bytes())
    found = factors(pipe.transformer)
    lora(write(tmp_path / "a.safetensors", peft(found)), tmp_path / "dense", tmp_path / "out")
    inside = sorted(path.name for path in (tmp_path / "out/transformer").iterdir())
    assert inside == ["config.json", "diffusion_pytorch_model.safetensors", "notes.md"]
    assert not (tmp_path / "out/flux1-tiny.safetensors").exists()
    assert (tmp_path / "out/importance.safetensors").is_file()
    assert (tmp_path / "out/vae/notes.safetensors").is_file()
    expected = fused(pipe.transformer, found).state_dict()
    made = DiffusionPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    assert all(torch.allclose(made[name], expected[name], atol=1e-5) for name in expected)
