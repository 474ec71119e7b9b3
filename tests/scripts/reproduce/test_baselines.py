"""Baselines as recipes: each is valid, keeps the budget, and does what it says."""

import json
from dataclasses import replace

import pytest
import torch

from d2m.convert.sparse_pipeline import shapes_of
from d2m.distill.loop import distill
from d2m.families import family_of_model
from d2m.families.ffn_sites import read_ffn, sites_of
from d2m.model.sparse_transformer import sparse_model_of
from d2m.model.surgery import sparse_ffns
from d2m.recipe.recipe import from_dict, preset, to_dict
from runtime.files.parameters import count
from scripts.reproduce import baselines
from tests.tiny.flux2 import flux2_transformer
from tests.tiny.pair import THREE, grouped_pair, tiny_batches, tiny_pair
from tests.tiny.pipeline import tiny_inputs
from tests.tiny.zimage import zimage_transformer

DEPTH = {"double": 4, "single": 5}
ALL = {
    "random": baselines.random_split,
    "renormalised": baselines.renormalised,
    "no-stage-1": baselines.without_stage_one,
    "joint": baselines.joint,
    "frozen": baselines.frozen,
    "width-1.5": lambda recipe: baselines.width_pruned(recipe, 1.5),
    "width-2": lambda recipe: baselines.width_pruned(recipe, 2.0),
    "2-times-leaner": lambda recipe: baselines.leaner(recipe, 2),
    "depth-first": lambda recipe: baselines.depth_pruned(recipe, DEPTH, "first"),
    "depth-middle": lambda recipe: baselines.depth_pruned(recipe, DEPTH, "middle"),
}


@pytest.mark.parametrize("name", ALL)
def test_each_is_a_recipe_of_the_same_budget(name):
    recipe = ALL[name](THREE)
    assert recipe.name == f"tiny-{name}" and recipe.steps == THREE.steps
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert {stage.batch_size for stage in recipe.stages} == {2}


@pytest.mark.parametrize("name", ["width-1.5", "2-times-leaner", "joint", "depth-first"])
def test_each_trains(name, tmp_path):
    recipe = ALL[name](THREE)
    blocks = recipe.blocks
    stages = tuple(replace(stage, steps=1) for stage in recipe.stages)
    recipe = replace(recipe, stages=stages)
    fields = ("shared_ratio", "expert_ratio", "num_experts", "top_k")
    changes = {field: getattr(recipe, field) for field in fields}
    student, teacher = grouped_pair(blocks=blocks, **changes)
    options = {"workdir": tmp_path, "log": lambda text: None}
    history = distill(student, teacher, recipe, tiny_batches, **options)
    assert len(history) == len(recipe.stages)


def test_width_pruning_works_as_much_as_the_moe():
    """The same activated matrices as 1S12E2A: r = 1.5; and a smaller FFN that forgets the rest."""
    recipe = baselines.width_pruned(preset("L"), 1.5)
    assert (recipe.num_experts, recipe.shared_ratio, recipe.top_k) == (10, 1.5, 0)
    student, teacher = tiny_pair(recipe=recipe)
    counts = count(shapes_of(student), 0)
    assert counts["ffn_share"] == 0.375
    before = student(**tiny_inputs()).sample
    for ffn in sparse_ffns(student).values():
        torch.nn.init.normal_(ffn.experts.w1)
    assert torch.equal(student(**tiny_inputs()).sample, before)
    assert [stage.train for stage in recipe.stages] == [("shared",)]


@pytest.mark.parametrize("make", [flux2_transformer, zimage_transformer])
def test_gated_ffns_are_cut_to_their_most_important_neurons(make):
    """float64: what is left is the dense model in which all other neurons answer nothing."""
    dense, draw = make().double(), torch.Generator().manual_seed(0)
    family = family_of_model(dense)
    recipe = baselines.width_pruned(preset("L"), 1.5)
    sites = sites_of(dense.state_dict(), family)
    sizes = {n: read_ffn(dense.get_parameter, block, site).neurons for n, block, site in sites}
    scores = {name: torch.rand(size, generator=draw) for name, size in sizes.items()}
    pruned = sparse_model_of(dense, scores, recipe, family)
    if make is flux2_transformer:
        inputs = {"hidden_states": torch.randn(1, 12, 16), "timestep": torch.ones(1)}
        inputs |= {"encoder_hidden_states": torch.randn(1, 5, 72), "img_ids": torch.zeros(12, 4)}
        inputs |= {"txt_ids": torch.zeros(5, 4)}
    else:
        inputs = {"x": torch.randn(1, 4, 1, 8, 8), "t": torch.ones(1)}
        inputs["cap_feats"] = [torch.randn(5, 24, dtype=torch.float64)]
    inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    answer = lambda model: torch.stack(list(model(**inputs, return_dict=False)[0]))  # noqa: E731
    with torch.no_grad():
        whole = answer(dense)
        for name, block, site in sites:
            left = scores[name].argsort()[: sizes[name] * 5 // 8]  # the least important
            read_ffn(dense.get_parameter, block, site).fc2_w[:, left] = 0  # a view
        expected, found = answer(dense), answer(pruned)
    # Z-Image's rotation is complex64.
    assert float((found - expected).norm() / expected.norm()) < 1e-8
    assert float((found - whole).norm() / whole.norm()) > 1e-3
    assert pruned.config.top_k == 0 and count(shapes_of(pruned), 0)["ffn_share"] == 0.375


def test_a_leaner_moe_has_the_same_neurons_in_smaller_experts():
    recipe = baselines.leaner(preset("L"), 4)
    assert (recipe.shared_ratio, recipe.expert_ratio) == (0.25, 0.0625)
    assert (recipe.num_experts, recipe.top_k) == (60, 2)
    student, _ = tiny_pair(recipe=recipe)
    assert count(shapes_of(student), 2)["ffn_share"] == pytest.approx(0.375 / 4, rel=0.01)
    pruned = baselines.width_pruned(recipe, 0.375)
    assert (pruned.shared_ratio, pruned.num_experts, pruned.top_k) == (0.375, 58, 0)


@pytest.mark.parametrize("by", [0, -1])
def test_leaner_by_less_than_one_is_refused(by):
    with pytest.raises(ValueError, match="expected a whole number from 1"):
        baselines.leaner(preset("L"), by)


def test_depth_pruning_by_hand():
    """Groups 1-3 of the double, 0-1 and 2-4 of the single blocks, one of each is kept."""
    first = baselines.depth_pruned(THREE, DEPTH, "first").blocks
    assert (first.drop_double, first.drop_single) == ((2, 3), (1, 3, 4))
    middle = baselines.depth_pruned(THREE, DEPTH, "middle")
    assert (middle.blocks.drop_double, middle.blocks.drop_single) == ((1, 2), (1, 2, 3))
    assert [stage.train for stage in middle.stages][-1] == ("blocks",)
    assert middle.stages[:2] == THREE.stages[:2]
    runs = {
        "double": {"0-1": 0.3, "1-2": 0.4, "2-3": 0.1, "0-0": 0.0},
        "single": {"0-2": 0.2, "1-3": 0.1, "2-4": 0.3},
    }
    linear = baselines.depth_pruned(THREE, DEPTH, "linear", runs).blocks
    assert (linear.drop_double, linear.drop_single) == ((2, 3), (1, 2, 3))


def test_joint_and_without_stage_one_by_hand():
    (stage,) = baselines.joint(THREE).stages
    assert stage.train == ("shared", "experts", "gate", "groups", "router")
    assert set(stage.losses) == {"output", "feature", "balance", "group", "group_balance"}
    assert (stage.steps, stage.kappa, stage.top_k) == (18, 1, 2)
    assert [s.steps for s in baselines.without_stage_one(THREE).stages] == [9, 9]


def test_what_cannot_be():
    with pytest.raises(ValueError, match="ratio is 1.6; expected one that leaves a whole number"):
        baselines.width_pruned(THREE, 1.6)
    with pytest.raises(ValueError, match="by is 2; expected a whole number from 1 that leaves"):
        baselines.leaner(replace(preset("L"), expert_ratio=0.75, num_experts=4), 2)
    with pytest.raises(ValueError, match="expected way first, middle or linear, and a recipe"):
        baselines.depth_pruned(preset("L"), DEPTH, "first")
    with pytest.raises(ValueError, match="trains shared experts alone; nothing is left"):
        baselines.without_stage_one(replace(THREE, stages=THREE.stages[:1]))


def test_frozen_blocks_are_those_outside_groups():
    last = THREE.stages[-1]
    wide = replace(THREE, stages=(*THREE.stages[:-1], replace(last, train=("blocks", "router"))))
    assert baselines.frozen(wide).stages[-1].train == ("groups", "router")
    assert baselines.frozen(wide).stages[:-1] == THREE.stages[:-1]
