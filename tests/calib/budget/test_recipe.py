"""A budget becomes an ordinary recipe: within it, convertible, and refused where out of reach."""

import dataclasses
import json

import pytest
import torch

from calib.budget import recipe as budgets
from calib.budget.costs import check_reach, costs_of, flops_of, resized, shares_of
from calib.budget.recipe import earlier_recipe, recipe_for, stages_for
from d2m.families import FLUX
from d2m.families.ffn_sites import sites_of
from d2m.model.sparse_transformer import sparse_model_of
from d2m.model.surgery import identity_error
from d2m.plan.count import plan
from d2m.plan.model_config import subject_of
from d2m.recipe import recipe as recipes
from d2m.recipe.recipe import Calibration, preset
from d2m.recipe.structure import Blocks, Shares
from tests.tiny.pair import THREE, tiny_batches
from tests.tiny.pipeline import tiny_inputs

L = dataclasses.replace(preset("L"), calibration=Calibration(1, 2))


@pytest.fixture(scope="module")
def dense(tiny_dense_dir):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(tiny_dense_dir / "transformer").eval()
    generator = torch.Generator().manual_seed(0)
    names = [name for name, _, _ in sites_of(model.state_dict(), FLUX)]
    return tiny_dense_dir, model, {n: torch.rand(128, generator=generator) for n in names}


@pytest.mark.parametrize("share", [0.45, 0.6, 0.75])
def test_a_recipe_within_the_budget(dense, share, tmp_path):
    directory, model, scores = dense
    made, facts = recipe_for(directory, model, tiny_batches, scores, share, L)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipes.to_dict(made)))
    assert recipes.load(path) == made and made.name == f"L-budget-{share:g}"
    counted = plan(directory, recipe=path)["flops_vs_dense"]
    assert counted == pytest.approx(facts["flops_vs_dense"])
    assert facts["smallest"] <= counted <= share
    assert counted > share - 0.12  # of a model of four blocks: a block's size is a large step
    json.dumps(facts, allow_nan=False)
    assert made.blocks.kappa == 1
    assert ("router" in made.stages[-1].train) == made.blocks.grouped
    student = sparse_model_of(model, scores, made, FLUX)
    assert identity_error(student, model, tiny_inputs(0)) < 1e-5


def test_more_room_is_no_more_damage(dense):
    directory, model, scores = dense
    shares = (0.4, 0.5, 0.6, 0.7, 0.8)
    found = [recipe_for(directory, model, tiny_batches, scores, s, L)[1] for s in shares]
    damages = [facts["predicted_damage"] for facts in found]
    assert damages == sorted(damages, reverse=True) and damages[0] > damages[-1]


def test_out_of_reach_names_the_smallest_before_anything_is_measured(dense):
    directory, _, scores = dense
    with pytest.raises(
        ValueError, match=r"--budget is 0.1, but groups .* still need (0\.\d+)"
    ) as e:
        recipe_for(directory, None, None, scores, 0.1, L)  # no model is asked
    least = float(str(e.value).rsplit("expected ", 1)[1].split()[0])
    recipe_for(directory, dense[1], tiny_batches, scores, least, L)
    for wrong in (0, 1, -2.0):
        with pytest.raises(ValueError, match="expected a share of the dense model's FLOPs"):
            recipe_for(directory, None, None, scores, wrong, L)


def test_costs_are_the_plans(tiny_dense_dir):
    """Fixed parts, blocks and routers add up to what plan counts of the whole recipe."""
    subject = subject_of(tiny_dense_dir)
    options = shares_of(L, 128)
    assert options == [2.5, 1.75, 1.0, 0.25]
    costs = costs_of(subject, L, options)
    assert list(costs.router) == [2]  # two blocks of a kind make no longer groups
    for place, share in enumerate(options):
        blocks = (costs.block[kind][i][place] for kind in ("double", "single") for i in (0, 1))
        assert costs.fixed + sum(blocks) == flops_of(subject, resized(L, share))
    mixed = dataclasses.replace(
        L, shares=Shares((2.5, 0.25), (1.0, 1.0)), blocks=Blocks(single=((0, 1),))
    )
    double, single = costs.block["double"], costs.block["single"]
    parts = double[0][0] + double[1][3] + single[1][2]
    assert costs.fixed + parts + costs.router[2] == flops_of(subject, mixed)
    assert costs.dense == plan(tiny_dense_dir)["flops"]
    cheapest = costs.fixed + min(double[1]) + min(single[1])
    least = (cheapest + 2 * costs.router[2]) / costs.dense
    assert check_reach(subject, costs, 0.9) == pytest.approx(least)


def test_stages_follow_the_groups(tiny_dense_dir):
    subject, groups = subject_of(tiny_dense_dir), Blocks(single=((0, 1),))
    assert stages_for(L, Blocks(), subject) == L.stages
    assert stages_for(THREE, Blocks(), subject) == THREE.stages[:2]
    assert stages_for(THREE, groups, subject) == THREE.stages
    added = stages_for(L, groups, subject)
    assert added[:2] == L.stages and added[2].train == ("groups", "router") and added[2].kappa == 1
    assert stages_for(dataclasses.replace(L, stages=()), groups, subject) == ()


def test_a_resume_takes_the_recipe_that_was_chosen(tmp_path):
    out = tmp_path / "out"
    assert earlier_recipe(out, 0.45) is None
    named = dataclasses.replace(L, name="L-budget-0.45")
    (tmp_path / "out.work").mkdir()
    record = {"recipe": recipes.to_dict(named)}
    (tmp_path / "out.work" / "run.json").write_text(json.dumps(record))
    assert earlier_recipe(out, 0.45) == named
    with pytest.raises(ValueError, match="recipe L-budget-0.45, which is not one for --budget 0.5"):
        earlier_recipe(out, 0.5)
    out.mkdir()
    (out / "recipe.json").write_text(json.dumps(recipes.to_dict(L)))
    with pytest.raises(ValueError, match="by the recipe L, which is not"):
        earlier_recipe(out, 0.45)


def test_sizes_of_experts_that_do_not_fit():
    with pytest.raises(ValueError, match="expert_ratio 0.25 quarters of the FFN's 28 neurons have"):
        budgets.shares_of(L, 28)
