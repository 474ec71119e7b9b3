"""Recipes as data: presets, JSON round trip, strict validation, sharing out steps."""

import copy
import json
import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2m.recipe import recipe as recipes


def test_preset_l_is_the_papers():
    recipe = recipes.preset("L")
    assert recipe.spec == recipes.SparseSpec(12, 1.0, 0.25, 2)
    assert recipe.split == "taylor"
    shared, experts = recipe.stages
    assert shared.train == ("shared",) and shared.top_k == 0
    assert experts.train == ("experts", "gate") and experts.top_k == 2
    assert experts.losses["balance"] == 0.01
    assert recipes.presets() == ["L"]


def test_round_trip(tmp_path):
    recipe = recipes.preset("L")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipes.to_dict(recipe)))
    assert recipes.load(path) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe == copy.deepcopy(recipe)


def edited(**changes):
    """Preset L as a dict with dotted paths changed: {"stages.0.lr": 1}."""
    obj = recipes.to_dict(recipes.preset("L"))
    for path, value in changes.items():
        *parents, last = path.split(".")
        target = obj
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target[part]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    return obj


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "L"}, "unknown key 'preset'; known are name, num_experts"),
        ({"stages.1.step": 3}, r"stages\[1\] has the unknown key 'step'"),
        ({"stages.1.lr": "fast"}, r"stages\[1\]: lr is 'fast'; expected a number"),
        ({"stages.1.steps": 2.5}, "steps is 2.5; expected a whole number"),
        ({"stages.0.steps": True}, "steps is True; expected a whole number"),
        ({"stages.0.train": ["gates"]}, "train has 'gates'; known are shared, experts, gate"),
        ({"stages.0.train": "shared"}, "train is 'shared'; expected a list of strings"),
        ({"stages.0.losses": {"mse": 1.0}}, "losses has 'mse'; known are output"),
        ({"stages.0.losses.output": -1}, "losses.output is -1; expected at least 0"),
        ({"stages.0.losses.output": "1"}, "losses.output is '1'"),
        ({"stages.0.losses": {}}, "losses is {}; expected at least one"),
        ({"stages.0.lr": ...}, r"stages\[0\] has no 'lr'; add it"),
        ({"name": ...}, "has no 'name'"),
        ({"split": "best"}, "split is 'best'; expected one of taylor, magnitude, random"),
        ({"top_k": 13}, "top_k is 13; expected 0 to 12"),
        ({"stages.1.top_k": -1}, r"stages\[1\].top_k is -1"),
        ({"num_experts": 0}, "num_experts is 0; expected at least 1"),
        ({"calibration": 3}, "calibration is 3; expected an object"),
        ({"calibration.batches": 0}, "calibration.batches is 0"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected float32 or bfloat16"),
        ({"t_std": float("nan")}, "t_std is nan; expected a number"),
        ({"blocks.kapa": 1}, "blocks has the unknown key 'kapa'; known are groups, kappa, alpha"),
        ({"adaln.mode": "none"}, "adaln.mode is 'none'; expected one of full, single, lowrank"),
        ({"stages.0.kappa": 1}, r"stages\[0\].kappa is 1; expected null, since the recipe has no"),
        ({"stages.0.skip": 1}, r"stages\[0\]: skip is 1; expected true or false"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        recipes.from_dict(edited(**changes), "recipe my.json")
    assert str(caught.value).startswith("recipe my.json")


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file"):
        recipes.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        recipes.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        recipes.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="preset 'XXL' is not known; expected one of L"):
        recipes.preset("XXL")


@given(total=st.integers(1, 10**6))
def test_steps_are_shared_out_exactly(total):
    recipe = recipes.preset("L")
    shared = recipes.with_steps(recipe, total)
    assert shared.steps == total
    for before, after in zip(recipe.stages, shared.stages):
        assert abs(after.steps - total * before.steps / recipe.steps) <= 1


@pytest.mark.parametrize("total", [0, -3, 1.5, True])
def test_impossible_steps(total):
    with pytest.raises(ValueError, match="expected a whole number from 1"):
        recipes.with_steps(recipes.preset("L"), total)


def test_stages_are_chosen_by_number_or_name():
    recipe = recipes.preset("L")
    second = recipes.with_stages(recipe, ["2"])
    assert second == recipes.with_stages(recipe, ["experts"]) == recipes.with_stages(recipe, [2])
    assert [stage.skip for stage in second.stages] == [True, False]
    assert second.steps == recipe.stages[1].steps
    assert recipes.with_stages(second, [1, 2]) == recipe
    # A stage on its own is as long as it is among the others.
    alone = recipes.with_stages(recipes.with_steps(recipe, 30), [2])
    assert alone.steps == 20 and recipes.with_steps(second, 30) == alone
    for wrong in ("3", 0, "gates"):
        with pytest.raises(ValueError, match=r"is not in recipe 'L'; it has 1 \(shared\), 2"):
            recipes.with_stages(recipe, [wrong])


def test_groups_and_modulation_round_trip():
    groups = {"double": [[3, 4, 5]], "single": [[2, 3, 4], [7, 8]]}
    changes = {"blocks": {"groups": groups, "kappa": 2}, "stages.1.kappa": 2}
    recipe = recipes.from_dict(edited(**changes, adaln={"mode": "lowrank", "rank": 8}))
    assert recipe.blocks.single == ((2, 3, 4), (7, 8)) and recipe.adaln.rank == 8
    assert recipes.from_dict(json.loads(json.dumps(recipes.to_dict(recipe)))) == recipe
    with pytest.raises(ValueError, match=r"stages\[1\].kappa is 3; expected 1 to 2"):
        recipes.from_dict(edited(blocks={"groups": groups}, **{"stages.1.kappa": 3}))


def test_no_torch():
    import subprocess

    program = "import d2m.recipe.recipe, d2m.families, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_one_run_has_otherwise():
    recipe = recipes.preset("L")
    assert recipes.changed(recipe) == recipe
    made = recipes.changed(
        recipe, steps=30, stages=["experts"], seed=5, precision="bfloat16", ema=0.9
    )
    assert (made.seed, made.precision, made.steps) == (5, "bfloat16", 20)
    assert [(stage.skip, stage.ema) for stage in made.stages] == [(True, 0.9), (False, 0.9)]
    assert recipes.changed(recipe, init_only=True, seed=5).stages == ()
    for changes, words in (
        ({"steps": 5, "init_only": True}, "steps is 5 but init_only trains nothing"),
        ({"stages": ["1"], "init_only": True}, r"stages is \['1'\] but init_only trains nothing"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected float32 or bfloat16"),
        ({"ema": 1.0}, r"ema is 1.0; expected 0 \(none\) or a decay under 1"),
    ):
        with pytest.raises(ValueError, match=words):
            recipes.changed(recipe, **changes)
