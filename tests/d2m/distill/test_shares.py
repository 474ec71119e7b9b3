"""Shared experts of unequal size: as data, in a model, in a plan, and on disk."""

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2m.families import FLUX, family_of_model
from d2m.families.flux.weights import weights
from d2m.families.weights import Structure
from d2m.model.sparse_transformer import SparseFluxTransformer2DModel, sparse_model_of
from d2m.model.surgery import identity_error, sparse_ffns
from d2m.plan.count import plan, used_share
from d2m.recipe import recipe as recipes
from d2m.recipe.recipe import SparseSpec, preset
from d2m.recipe.structure import Blocks, Shares, check_shares, shares_from
from runtime.inspect.directory import inspect
from tests.cases import flops
from tests.tiny.pair import tiny_pair
from tests.tiny.pipeline import TRANSFORMER_CONFIG, tiny_inputs, tiny_transformer

# At width 32: shared 80, 32 and 8 neurons, experts of 4, 8 and 10.
SHARES = Shares((2.5, 1.0), (0.25, 2.5))
RECIPE = dataclasses.replace(preset("L"), shares=SHARES, stages=())


def test_nothing_said_is_one_size():
    spec = SparseSpec()
    assert not Shares() and shares_from({}, Blocks()) == Shares()
    assert spec.at("double", 7) == spec == preset("L").spec
    assert "shares" not in recipes.to_dict(preset("L"))


def test_what_the_shared_expert_has_less_the_experts_have_more():
    spec = RECIPE.spec
    assert spec.at("single", 0) == SparseSpec(shared_ratio=0.25, expert_ratio=0.3125)
    assert spec.at("double", 0) == SparseSpec(shared_ratio=2.5, expert_ratio=0.125)
    assert spec.at("double", 1) == SparseSpec()
    assert shares_from(json.loads(json.dumps(SHARES.to_dict())), Blocks()) == SHARES
    assert recipes.from_dict(json.loads(json.dumps(recipes.to_dict(RECIPE)))) == RECIPE
    # two FFNs in a double block, one in a single
    assert used_share(128, spec, FLUX) == pytest.approx(
        (2 * 0.6875 + 2 * 0.375 + 0.21875 + 0.6875) / 6
    )


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"double": [1.0, 0]}, "shares.double is .*; expected a list of numbers over 0"),
        ({"triple": [1.0]}, "shares has the unknown key 'triple'"),
        ({"single": [1.0, 2.5]}, r"single is \[1.0, 2.5\]; expected one number for the group"),
        ([1.0], "expected an object"),
    ],
)
def test_mistakes_in_one_sentence(shares, words):
    obj = recipes.to_dict(preset("L")) | {"shares": shares}
    obj |= {"blocks": {"groups": {"single": [[0, 1]]}}}
    with pytest.raises(ValueError, match=words):
        recipes.from_dict(obj)


def test_as_many_as_blocks():
    check_shares(SHARES, {"double": 2, "single": 2})
    with pytest.raises(ValueError, match="shares name 2 single blocks; expected 3, as many as"):
        check_shares(SHARES, {"double": 2, "single": 3})
    with pytest.raises(ValueError, match="shares name 2 double blocks; expected 1"):
        SparseFluxTransformer2DModel(
            **TRANSFORMER_CONFIG | {"num_layers": 1}, shares=SHARES.to_dict()
        )
    with pytest.raises(ValueError, match="do not make up the FFN's 128 neurons"):
        odd = Shares((1.1, 1.0), (1.0, 1.0)).to_dict()
        SparseFluxTransformer2DModel(**TRANSFORMER_CONFIG, shares=odd)


def test_the_model_is_the_dense_one_with_all_experts_on():
    student, teacher = tiny_pair(0, RECIPE, torch.float64)
    sizes = {name: tuple(ffn.experts.w1.shape) for name, ffn in sparse_ffns(student).items()}
    assert sizes["transformer_blocks.0.ff_context"] == (12, 32, 4)
    assert sizes["transformer_blocks.1.ff"] == (12, 32, 8)
    assert sizes["single_transformer_blocks.0.proj_mlp"] == (12, 32, 10)
    inputs = tiny_inputs(0, torch.float64)
    assert identity_error(student, teacher, inputs) < 1e-13


def test_equal_shares_are_no_shares():
    ones = dataclasses.replace(RECIPE, shares=Shares((1.0,) * 2, (1.0,) * 2))
    none = dataclasses.replace(RECIPE, shares=Shares())
    states = [tiny_pair(0, recipe)[0].state_dict() for recipe in (ones, none)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_every_weight_and_flop_is_counted():
    blocks = Blocks(single=((1, 2, 3),))
    shares = Shares((2.5, 1.0, 1.0, 0.25), (0.25, 1.0, 1.0, 1.0, 2.5))
    recipe = dataclasses.replace(RECIPE, blocks=blocks, shares=shares)
    deep = {"num_layers": 4, "num_single_layers": 5}
    teacher = tiny_transformer(0, **deep)
    scores = {n: torch.rand(128) for n in _sites(teacher)}
    model = sparse_model_of(teacher, scores, recipe, family_of_model(teacher))
    config = {**TRANSFORMER_CONFIG, **deep, "patch_size": 1, "out_channels": None}
    stacks = weights(config, Structure(recipe.spec, recipe.blocks, recipe.adaln), 16, 8)
    counted = sum(stack.count * weight.size for stack in stacks for weight in stack.weights)
    assert counted == sum(p.numel() for p in model.parameters())
    flops.register()
    math = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's flash attention
    with torch.no_grad(), math, FlopCounterMode(display=False) as counter:
        model(**tiny_inputs(batch=1, image_tokens=16, text_tokens=8))
    total = sum(stack.active * weight.flops for stack in stacks for weight in stack.weights)
    assert total == counter.get_total_flops()


def _sites(model):
    from d2m.families.ffn_sites import sites_of

    return [name for name, _, _ in sites_of(model.state_dict(), family_of_model(model))]


def test_on_disk_and_in_a_plan(tiny_dense_dir, tmp_path):
    student, _ = tiny_pair(0, RECIPE)
    student.save_pretrained(tmp_path / "transformer")
    loaded = SparseFluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert loaded.config.shares == SHARES.to_dict()
    inputs = tiny_inputs(0)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, student(**inputs).sample)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipes.to_dict(RECIPE)))
    ours, theirs = plan(tmp_path / "transformer"), plan(tiny_dense_dir, recipe=path)
    assert ours["total_params"] == theirs["total_params"]
    assert (
        ours["ffn_activated_share"]
        == theirs["ffn_activated_share"]
        == used_share(128, RECIPE.spec, FLUX)
    )
    assert plan(tiny_dense_dir, preset="L")["ffn_activated_share"] == 0.375
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", "transformer": ["d2m", "SparseFlux"]})
    )
    experts = inspect(tmp_path)["experts"]
    assert experts["expert_hidden"] == [4, 10] and experts["shared_hidden"] == [8, 80]


def test_block_by_block_conversion(tiny_dense_dir, tmp_path):
    """The way of models larger than memory: the same sizes, checked on disk."""
    from calib.measure.importance import magnitudes
    from d2m.convert.streamed import convert_stream

    out, lines = tmp_path / "out", []
    answer = convert_stream(tiny_dense_dir, out, RECIPE, magnitudes, "magnitude", log=lines.append)
    assert answer["checked"] and max(answer["checked"].values()) < 1e-5
    model = SparseFluxTransformer2DModel.from_pretrained(out / "transformer")
    sizes = {name: ffn.experts.w1.shape[2] for name, ffn in sparse_ffns(model).items()}
    assert sizes["transformer_blocks.0.ff"] == 4 and sizes["transformer_blocks.1.ff"] == 8
    assert sizes["single_transformer_blocks.0.proj_mlp"] == 10
