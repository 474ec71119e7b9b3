"""The sparse transformer inside diffusers: directories round-trip and draw."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

import d2m
from d2m.families import FLUX
from d2m.model.block_group import block_groups
from d2m.model.sparse_transformer import SparseFluxTransformer2DModel, set_top_k
from d2m.model.surgery import convert_state_dict, sites_of, sparse_ffns, split_neurons
from d2m.recipe.recipe import SparseSpec
from tests.tiny.pipeline import (
    TRANSFORMER_CONFIG,
    build_pipeline,
    randomize,
    tiny_inputs,
    tiny_transformer,
)

SPEC = SparseSpec(num_experts=12, shared_ratio=1.0, expert_ratio=0.25, top_k=2)


def sparse_transformer(seed=0):
    dense = tiny_transformer(seed)
    state = dense.state_dict()
    generator = torch.Generator().manual_seed(seed)
    permutations = {
        name: split_neurons(torch.rand(128, generator=generator), 32, 12)
        for name, _, _ in sites_of(state, FLUX)
    }
    model = SparseFluxTransformer2DModel(**TRANSFORMER_CONFIG).eval()
    model.load_state_dict(convert_state_dict(state, permutations, SPEC, FLUX, seed))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pipe = build_pipeline()
    pipe.register_modules(transformer=sparse_transformer())
    path = tmp_path_factory.mktemp("sparse")
    pipe.save_pretrained(path)
    return path, pipe


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red circle",
        height=16,
        width=16,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


def test_directory_names_our_class(saved):
    path, _ = saved
    index = json.loads((path / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert index["transformer"] == ["d2m", "SparseFluxTransformer2DModel"]
    config = json.loads((path / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "SparseFluxTransformer2DModel"
    expected = {"num_experts": 12, "shared_ratio": 1.0, "expert_ratio": 0.25, "top_k": 2}
    assert expected.items() <= config.items()
    assert {key: config[key] for key in ("num_layers", "guidance_embeds")} == {
        "num_layers": 2,
        "guidance_embeds": True,
    }


def test_round_trip(saved, tmp_path):
    path, pipe = saved
    loaded = DiffusionPipeline.from_pretrained(path)
    assert type(loaded) is FluxPipeline
    assert (
        type(loaded.transformer)
        is SparseFluxTransformer2DModel
        is (d2m.SparseFluxTransformer2DModel)
    )
    # The same weights at other addresses: kernels may round differently.
    assert (draw(loaded) - draw(pipe)).abs().max() < 1e-4
    loaded.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    first, second = loaded.transformer.state_dict(), again.transformer.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_state_dict_names(saved):
    keys = saved[1].transformer.state_dict().keys()
    assert {
        "transformer_blocks.0.ff.shared.fc1.weight",
        "transformer_blocks.1.ff_context.experts.w1",
        "transformer_blocks.1.ff_context.neurons",
        "single_transformer_blocks.1.proj_mlp.gate.weight",
        "single_transformer_blocks.1.proj_out.linear.weight",
    } <= keys
    assert not any(".net." in key or "proj_out.linear.bias" in key for key in keys)


def test_bfloat16_keeps_gates_float32_and_neurons_exact(saved):
    path, pipe = saved
    loaded = DiffusionPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
    exact = pipe.transformer.state_dict()
    for name, tensor in loaded.transformer.state_dict().items():
        if name.endswith("neurons"):
            assert torch.equal(tensor, exact[name])
        elif name.endswith("gate.weight"):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, exact[name])
        else:
            assert tensor.dtype == torch.bfloat16, name
    assert torch.isfinite(draw(loaded)).all()


GROUPED = {
    "groups": {"double": [[0, 1]], "single": [[1, 2, 3]]},
    "kappa": 1,
    "alpha": 0.25,
    "drop": {"single": [4]},
    "num_single_layers": 5,
}


@pytest.mark.parametrize("adaln", ["full", "single", "lowrank"])
def test_groups_and_modulation_round_trip(adaln, tmp_path):
    config = TRANSFORMER_CONFIG | GROUPED | {"adaln": adaln}
    model = SparseFluxTransformer2DModel(**config).eval()
    randomize(model, 5)
    set_top_k(model, 1)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: saved[key] for key in GROUPED} == GROUPED and saved["adaln"] == adaln
    loaded = SparseFluxTransformer2DModel.from_pretrained(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    groups = block_groups(loaded)
    assert list(groups) == ["transformer_blocks.0", "single_transformer_blocks.1"]
    assert {group.router.alpha for group in groups.values()} == {0.25}
    set_top_k(loaded, 1)
    with torch.no_grad():
        inputs = tiny_inputs(batch=3)
        torch.testing.assert_close(loaded(**inputs).sample, model(**inputs).sample)
    half = SparseFluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for name, tensor in half.state_dict().items():
        exact = "router" in name or name.endswith("gate.weight")
        if exact:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
        elif tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16, name
    if adaln != "full":  # held once, and every norm refers to the loaded one
        assert half.transformer_blocks[0].blocks["1"].norm1._shared[0] is half.modulation


def test_checkpoints_from_before_groups_load(saved, tmp_path):
    path, pipe = saved
    pipe.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("groups", "kappa", "alpha", "drop", "adaln", "adaln_rank", "renormalise"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = SparseFluxTransformer2DModel.from_pretrained(tmp_path)
    assert not block_groups(loaded) and loaded.config.adaln == "full"
    with torch.no_grad():
        expected = pipe.transformer(**tiny_inputs()).sample
        torch.testing.assert_close(loaded(**tiny_inputs()).sample, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups": {"double": [[1, 2]]}}, "name double block 2; expected 0 to 1"),
        ({"groups": {"double": [[1]]}}, "the config's blocks.groups.double is"),
        ({"adaln": "half"}, "the config's adaln.mode is 'half'; expected one of full"),
    ],
)
def test_structures_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        SparseFluxTransformer2DModel(**TRANSFORMER_CONFIG, **changes)


def test_loads_in_a_fresh_process_after_import_d2m(saved):
    program = (
        "import d2m, sys; assert 'torch' not in sys.modules; from diffusers import "
        "DiffusionPipeline as P; print(type(P.from_pretrained(sys.argv[1]).transformer).__name__)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(saved[0])], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip().endswith("SparseFluxTransformer2DModel")


def test_structure_on_the_meta_device():
    with torch.device("meta"):
        model = SparseFluxTransformer2DModel(**TRANSFORMER_CONFIG)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(sparse_ffns(model)) == 2 * 2 + 2


def test_flux_dev_size_on_the_meta_device():
    """19 + 38 blocks at d = 3072: the dense count is FLUX.1 [dev]'s, the sparse adds its gates."""
    with torch.device("meta"):
        model = SparseFluxTransformer2DModel(guidance_embeds=True)
    gates = (2 * 19 + 38) * 12 * 3072
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320 + gates


def test_top_k_is_a_run_time_knob():
    model, inputs = sparse_transformer(), tiny_inputs()
    outputs = []
    for top_k in (0, 1, 2, 12):
        set_top_k(model, top_k)
        with torch.no_grad():
            outputs.append(model(**inputs, return_dict=False)[0])
    assert all(torch.isfinite(output).all() for output in outputs)
    assert not any(torch.equal(a, b) for a, b in zip(outputs, outputs[1:]))
    with pytest.raises(ValueError, match="top_k=13 .* 0 to 12"):
        set_top_k(model, 13)
    assert {ffn.top_k for ffn in sparse_ffns(model).values()} == {12}


def test_ratios_that_lose_neurons_are_refused():
    with pytest.raises(ValueError, match="shared_ratio 1 and 8 experts of expert_ratio 0.25"):
        SparseFluxTransformer2DModel(**TRANSFORMER_CONFIG, num_experts=8)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_float16_flips_near_ties_alone(top_k):
    """Routing loses no precision in fp16: given float32's logits, the error stays what it is.

    Measured with 4 and 8 blocks: .12 % without experts, .14 % with two, flips of at most 6e-4.
    """
    model = randomize(SparseFluxTransformer2DModel(**TRANSFORMER_CONFIG), 5).eval()
    set_top_k(model, top_k)
    half = copy.deepcopy(model).half()
    for exact, other in zip(sparse_ffns(model).values(), sparse_ffns(half).values()):
        other.gate.float().weight.data.copy_(exact.gate.weight.data)
    inputs = tiny_inputs(batch=8)
    # Times that fp16 holds, times 1000: 999.3 is off by up to .25 there, no matter of gates.
    inputs |= {"timestep": torch.full((8,), 0.5), "guidance": torch.full((8,), 3.5)}
    narrow = {n: t if n.endswith("_ids") else t.half() for n, t in inputs.items()}
    inputs = {n: t if n.endswith("_ids") else t.float() for n, t in narrow.items()}

    def run(model, inputs, forced=None):
        logits = []
        for i, ffn in enumerate(sparse_ffns(model).values()):

            def hook(module, args, found, i=i):
                logits.append(found.flatten(0, -2))
                return forced[i].view_as(found) if forced else None

            hooks.append(ffn.gate.register_forward_hook(hook))
        with torch.no_grad():
            result = model(**inputs).sample.float()
        while hooks:
            hooks.pop().remove()
        return result, logits

    hooks = []
    expected, exact = run(model, inputs)
    found, rounded = run(half, narrow)
    forced, _ = run(half, narrow, exact)
    flips = 0
    for first, second in zip(exact, rounded):
        gates = first.softmax(-1).sort(-1, descending=True).values
        sets = [each.topk(top_k, -1).indices.sort(-1).values for each in (first, second)]
        flipped = (sets[0] != sets[1]).any(-1)
        flips += int(flipped.sum())
        margin = gates[:, top_k - 1] - gates[:, top_k]
        assert float((margin * flipped).max()) < 2e-3
    assert flips < 0.01 * sum(map(len, exact))
    errors = [float((each - expected).norm() / expected.norm()) for each in (found, forced)]
    assert errors[1] < 0.005 and errors[0] < 2 * errors[1]
