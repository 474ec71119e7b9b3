"""Stages run apart, each from the directory of those before; shared modulation in a conversion."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import d2m  # noqa: F401 - diffusers finds our class in a module that is imported
from calib.measure.importance import neuron_importance
from calib.shapes.batches import shapes_batches
from calib.shapes.world import World
from d2m.model.block_group import block_groups
from d2m.model.grouping import dense_name
from d2m.recipe import recipe as recipes
from d2m.recipe.structure import AdaLN, Blocks
from tests.cases.conversions import converted
from tests.cases.fresh_process import python
from tests.tiny.pipeline import tiny_pipeline

LOSSES = {"output": 1.0, "group": 1.0, "group_balance": 0.01}
GROUPS = recipes.Stage("groups", ("groups", "router"), 2, 2, 1e-3, LOSSES, batch_size=2, kappa=1)
SHORT = [dataclasses.replace(s, steps=2, batch_size=2) for s in recipes.preset("L").stages]
SHORT[0] = dataclasses.replace(SHORT[0], train=("shared", "adaln"))
RECIPE = dataclasses.replace(
    recipes.preset("L"),
    calibration=recipes.Calibration(batches=2, batch_size=2),
    stages=(*SHORT, GROUPS),
    blocks=Blocks(double=((0, 1),), single=((0, 1),)),
    adaln=AdaLN("lowrank"),
    experts="coactivation",
    router="energy",
)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def run(dense, out, recipe=RECIPE, **options):
    def batches(pipe, seed):
        return shapes_batches(pipe, World(size=32), seed)

    options = {"log": lambda text: None, "write": False} | options
    return converted(dense, out, recipe, batches, neuron_importance, **options)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("dense") / "pipe")


@pytest.fixture(scope="module")
def first(dense, tmp_path_factory):
    """Stages 1 and 2: (directory, answer)."""
    out = tmp_path_factory.mktemp("first") / "sparse"
    return out, run(dense, out, stages=[1, 2])


def test_stages_from_directory_to_directory_are_the_run_of_all(dense, first, tmp_path):
    out, answer = first
    assert answer["steps"] == 4 and answer["losses"].keys() == {"shared", "experts"}
    assert answer["identity_error"] < 1e-5
    assert [stage.skip for stage in recipes.load(out / "recipe.json").stages] == [
        False,
        False,
        True,
    ]
    last = run(dense, tmp_path / "last", stages=["groups"], start=out)
    assert last["steps"] == 2 and last["losses"].keys() == {"groups"}
    whole = run(dense, tmp_path / "whole")
    assert whole["steps"] == 6
    parts, all_at_once = (
        load_file(tmp_path / "last" / WEIGHTS),
        load_file(tmp_path / "whole" / WEIGHTS),
    )
    assert parts.keys() == all_at_once.keys()
    for name, tensor in all_at_once.items():
        assert torch.equal(tensor, parts[name]), name
    name = "importance.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "last" / name).read_bytes()
    # Stage 3 once more, with another seed, from the same start.
    run(dense, tmp_path / "again", stages=[3], start=out, seed=5)
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert any(not torch.equal(again[name], parts[name]) for name in parts)


def test_a_start_without_groups_is_the_start_of_any(dense, first, tmp_path):
    plain = dataclasses.replace(RECIPE, blocks=Blocks(), stages=RECIPE.stages[:2])
    run(dense, tmp_path / "plain", plain)
    run(dense, tmp_path / "grouped", start=tmp_path / "plain", init_only=True)
    run(dense, tmp_path / "split", init_only=True)
    before, after, split = (
        load_file(tmp_path / name / WEIGHTS) for name in ("plain", "grouped", "split")
    )
    learnt = {name for name in after if not torch.equal(after[name], split[name])}
    assert any(".blocks.1.ff.experts." in name for name in learnt)
    for name, tensor in after.items():
        # Routers are those of a run that had groups from the beginning.
        assert torch.equal(tensor, split[name] if ".router." in name else before[dense_name(name)])
    # Blocks dropped for good: what is left keeps the start's weights.
    rank = AdaLN("lowrank", 6)  # which by itself follows from the number of blocks
    dropped = dataclasses.replace(plain, blocks=Blocks(drop_double=(1,)), adaln=rank)
    run(dense, tmp_path / "dropped", dropped, start=tmp_path / "plain", init_only=True)
    after = load_file(tmp_path / "dropped" / WEIGHTS)
    assert {name for name in before if name.startswith("transformer_blocks.1.")}
    assert after.keys() == {n for n in before if not n.startswith("transformer_blocks.1.")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    # But groups are not undone.
    with pytest.raises(ValueError, match="has groups {'double'.* where the recipe makes None"):
        run(dense, tmp_path / "undone", plain, start=first[0])


def test_result_is_a_pipeline_with_groups(dense, first):
    out, answer = first
    pipe = DiffusionPipeline.from_pretrained(out)
    model = pipe.transformer
    assert list(block_groups(model)) == ["transformer_blocks.0", "single_transformer_blocks.0"]
    assert model.config.adaln == "lowrank" and model.config.adaln_rank == 6 * 33 // 31
    counts = answer["parameters"]["sparse"]
    assert counts["activated"] < counts["total"] - counts["experts"] * 10 // 12
    config = json.loads((out / "recipe.json").read_text())
    assert config["adaln"] == {"mode": "lowrank", "rank": None}
    assert config["blocks"]["groups"] == {"double": [[0, 1]], "single": [[0, 1]]}


def test_starts_that_do_not_fit(dense, first, tmp_path):
    other = dataclasses.replace(RECIPE, adaln=AdaLN("single"))
    with pytest.raises(ValueError, match="has adaln 'lowrank' where the recipe makes 'single'"):
        run(dense, tmp_path / "out", other, stages=[3], start=first[0])
    with pytest.raises(FileNotFoundError, match="has no importance.safetensors; expected a sparse"):
        run(dense, tmp_path / "other", stages=[3], start=dense)
    with pytest.raises(ValueError, match="stage '4' is not in recipe 'L'; it has 1 .shared."):
        run(dense, tmp_path / "third", stages=["4"])
    with pytest.raises(ValueError, match="stages is .'1'. but init_only trains nothing"):
        run(dense, tmp_path / "third", stages=["1"], init_only=True)
    with pytest.raises(ValueError, match="name double block 2; expected 0 to 1"):
        run(dense, tmp_path / "third", dataclasses.replace(RECIPE, blocks=Blocks(((1, 2),))))


def test_resume_with_another_start_is_refused(dense, first, tmp_path):
    def stop(phase, done, total):
        raise KeyboardInterrupt

    options = {"stages": [3], "start": first[0]}
    with pytest.raises(KeyboardInterrupt):
        run(dense, tmp_path / "out", progress=stop, **options)
    with pytest.raises(ValueError, match="a conversion with another start; resume it with"):
        run(dense, tmp_path / "out", stages=[3], resume=True)
    run(dense, tmp_path / "out", resume=True, **options)
    assert (tmp_path / "out" / WEIGHTS).is_file()


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[4:]
from tests.d2m.convert.test_first_student import run

def progress(phase, done, total):
    if phase == "stage groups" and done == 1:
        os.kill(os.getpid(), signal.SIGKILL)

run(sys.argv[1], sys.argv[2], stages=[3], start=sys.argv[3], progress=progress, save_seconds=0)
"""


def test_kill_in_stage_three_and_resume_give_the_same_bits(dense, first, tmp_path):
    options = {"stages": [3], "start": first[0]}
    run(dense, tmp_path / "whole", **options)
    root = Path(__file__).parents[3]
    paths = [str(root)]
    directories = [str(dense), str(tmp_path / "out"), str(first[0])]
    command = ["-c", KILLED, *directories, *paths]
    killed = python(*command, env={"OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run(dense, tmp_path / "out", resume=True, **options)
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
