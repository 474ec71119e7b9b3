"""Presets: which file a name means for a model, and what is in the files."""

import json
from pathlib import Path

import pytest

from d2m.families import FLUX
from d2m.plan.count import structure_of
from d2m.plan.presets import ANY_DEPTH, FAMILIES, preset_file, preset_of, presets_for, recipe_named
from d2m.recipe.recipe import from_dict, load
from d2m.recipe.structure import active_blocks, check_depth

ROOT = Path(__file__).resolve().parents[3]
DEPTHS = {
    "19d-38s": {"double": 19, "single": 38},
    "6d-12s": {"double": 6, "single": 12},
    "6d-6s": {"double": 6, "single": 6},
}
OWN = FAMILIES / "flux" / "presets"
FILES = [path for folder in DEPTHS for path in sorted((OWN / folder).glob("*.json"))]


@pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
def test_all_sizes_are_there_for_both_models(depth):
    assert [*presets_for(FLUX, depth)] == ["L", "M", "S", "XS"]


def test_the_folder_of_the_depth_goes_first():
    assert preset_file("L", FLUX, DEPTHS["19d-38s"]) == OWN / "19d-38s/L.json"
    assert preset_file("L", FLUX, DEPTHS["6d-12s"]) == OWN / "6d-12s/L.json"
    assert presets_for(FLUX, {"double": 2, "single": 2}) == {"L": ANY_DEPTH / "L.json"}


def test_a_recipe_its_file_or_a_presets_name(tiny_dense_dir):
    path = OWN / "6d-12s/S.json"
    recipe = load(path)
    for named in (recipe, path, str(path)):
        assert recipe_named(named, "nowhere") == recipe
    assert recipe_named("L", tiny_dense_dir) == load(ANY_DEPTH / "L.json")
    with pytest.raises(ValueError, match="preset 'L.jsn' is not known"):
        recipe_named("L.jsn", tiny_dense_dir)


def test_a_name_of_another_model_is_refused_with_those_of_this_one():
    with pytest.raises(ValueError, match="expected one of L for FLUX.1 with 2 double and 2 single"):
        preset_file("S", FLUX, {"double": 2, "single": 2})


def test_the_shapes_models_l_is_the_plain_one_at_its_own_rates():
    """What the demo converts with: all blocks, a modulation per block; rates and steps differ."""
    dense = ROOT / "models/shapes-dense"
    assert preset_of("XS", dense) == OWN / "6d-12s/XS.json"
    mine, plain = (
        json.loads(path.read_text()) for path in (preset_of("L", dense), ANY_DEPTH / "L.json")
    )
    assert not {"blocks", "adaln"} & {*mine}
    for stage in (*mine["stages"], *plain["stages"]):
        del stage["lr"], stage["steps"]
    assert mine == plain


def test_an_unknown_name_is_answered_before_the_model_is_looked_for():
    with pytest.raises(ValueError, match="preset 'XXL' is not known; expected one of L, M, S, XS"):
        preset_of("XXL", "nothing")
    with pytest.raises(FileNotFoundError, match="nothing is no directory"):
        preset_of("S", "nothing")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_fit_their_models_and_differ_in_structure_alone(path):
    obj = json.loads(path.read_text())
    assert obj["name"] == path.stem
    structure, depth = structure_of(from_dict(obj, path.stem)), DEPTHS[path.parent.name]
    check_depth(structure.blocks, depth)
    assert structure.adaln.mode == ("single" if depth["double"] == 19 else "full")
    groups = structure.blocks.double + structure.blocks.single
    assert all(len(group) == 3 for group in groups)
    assert (structure.blocks.kappa, structure.blocks.alpha) == (1, 0.5)


# read: active blocks of FLUX.1 [dev]'s 19 double and 38 single ones.
PAPER = {"M": (15, 28), "S": (11, 24), "XS": (11, 16)}


@pytest.mark.parametrize("single", [12, 6])
@pytest.mark.parametrize("name", PAPER)
def test_small_counterparts_are_the_nearest_in_active_blocks(name, single):
    """Of all numbers of groups of three: nearest in all active blocks, then in both kinds."""

    def active(folder):
        obj = json.loads((OWN / folder / f"{name}.json").read_text())
        return (*active_blocks(structure_of(from_dict(obj, name)).blocks, DEPTHS[folder]).values(),)

    x, y = PAPER[name]
    assert active("19d-38s") == (x, y)

    def distance(a, b):
        parts = abs(a / 6 - x / 19), abs(b / single - y / 38)
        return abs((a + b) / (6 + single) - (x + y) / 57), sum(parts)

    choices = [(6 - 2 * d, single - 2 * s) for d in range(3) for s in range(single // 3 + 1)]
    assert active(f"6d-{single}s") == min(choices, key=lambda choice: distance(*choice))
