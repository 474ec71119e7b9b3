"""The conversion as a whole on a tiny pipeline: result, refusals, resume to the same bits."""

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
from calib.measure.routing import routing_table
from calib.shapes.batches import shapes_batches
from calib.shapes.suite import evaluate
from calib.shapes.world import World
from d2m.model.surgery import split_neurons
from d2m.recipe import recipe as recipes
from tests.cases.conversions import converted
from tests.cases.fresh_process import python
from tests.tiny.pipeline import tiny_pipeline

RECIPE = dataclasses.replace(
    recipes.preset("L"),
    calibration=recipes.Calibration(batches=2, batch_size=2),
    stages=tuple(
        dataclasses.replace(stage, steps=3, batch_size=2) for stage in recipes.preset("L").stages
    ),
)


def batches(pipe, seed):
    return shapes_batches(pipe, World(size=32), seed)


def score(draw):
    return evaluate(draw, n=6, world=World(size=32))[0]


def run(dense, out, recipe=RECIPE, **options):
    options = {"log": lambda text: None, "statistics": routing_table, "score": score} | options
    options = {"prompts": ["a red circle", "two blue squares"]} | options
    return converted(dense, out, recipe, batches, neuron_importance, **options)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tiny_pipeline(tmp_path_factory.mktemp("dense") / "pipe")
    defaults = {"num_inference_steps": 2, "height": 32, "width": 32}
    (path / "defaults.json").write_text(json.dumps(defaults))
    return path


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory):
    """An uninterrupted run: (directory, answer)."""
    out = tmp_path_factory.mktemp("whole") / "sparse"
    return out, run(dense, out)


def contents(folder):
    """Every file's bytes, but for the report, which tells how long things took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.stem != "report"
    }


def test_result_is_a_pipeline(dense, whole):
    out, answer = whole
    assert answer["identity_error"] < 1e-5 and answer["steps"] == 6
    assert answer["parameters"]["sparse"]["ffn_share"] == 0.375
    assert answer["losses"].keys() == {"shared", "experts"}
    assert answer["scores"]["sparse"]["n"] == answer["scores"]["dense"]["n"] == 6
    assert answer["seconds"].keys() >= {"importance", "stage experts", "routing statistics"}
    assert json.loads(json.dumps(answer)) == answer
    assert sorted(path.name for path in out.parent.iterdir()) == ["sparse"]
    assert recipes.load(out / "recipe.json") == RECIPE
    assert (out / "defaults.json").read_bytes() == (dense / "defaults.json").read_bytes()
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        assert contents(out / name) == contents(dense / name)
    pipe = DiffusionPipeline.from_pretrained(out)
    scores = load_file(out / "importance.safetensors")
    for name, score in scores.items():
        neurons = pipe.transformer.get_submodule(name).neurons
        assert torch.equal(neurons, split_neurons(score, 32, 12))
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red circle", height=32, width=32, num_inference_steps=1, max_sequence_length=16)
    assert drawn.images[0].size == (32, 32)


def test_files_can_be_read_by_whoever_may_read_the_directory(whole):
    modes = {path.stat().st_mode & 0o777 for path in whole[0].rglob("*") if path.is_file()}
    assert modes == {(whole[0] / "model_index.json").stat().st_mode & 0o777}


def test_card_and_report(whole):
    out, _ = whole
    card, report = (out / "README.md").read_text(), json.loads((out / "report.json").read_text())
    assert "import d2m" in card and "L" in card
    assert report["recipe"]["name"] == "L" and len(report["images"]) == 2
    assert (
        report["scores"]["dense"]["categories"].keys()
        == report["scores"]["sparse"]["categories"].keys()
    )
    assert len(report["routing"]["layers"]) == 6
    html = (out / "report.html").read_text()
    assert "a red circle" in html and 'src="http' not in html


def test_only_what_the_stages_train_has_moved(dense, whole):
    before = DiffusionPipeline.from_pretrained(dense).transformer.state_dict()
    after = DiffusionPipeline.from_pretrained(whole[0]).transformer.state_dict()
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    shared = after["transformer_blocks.0.ff.shared.fc2.bias"]
    assert not torch.equal(shared, before["transformer_blocks.0.ff.net.2.bias"])


def test_init_only_and_random_split(dense, tmp_path):
    recipe = dataclasses.replace(RECIPE, split="random", precision="bfloat16")
    answer = run(dense, tmp_path / "out", recipe, init_only=True, seed=3, write=False, score=None)
    assert answer["scores"] == {} and not (tmp_path / "out" / "report.html").exists()
    assert answer["steps"] == 0 and answer["losses"] == {}
    assert recipes.load(tmp_path / "out" / "recipe.json").seed == 3
    state = DiffusionPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    before = DiffusionPipeline.from_pretrained(dense).transformer.state_dict()
    neurons = state["transformer_blocks.1.ff.neurons"]
    expected = before["transformer_blocks.1.ff.net.0.proj.weight"][neurons[:32]]
    assert torch.equal(state["transformer_blocks.1.ff.shared.fc1.weight"], expected)


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from tests.d2m.convert.test_in_memory import run

def progress(phase, done, total):
    if phase == "stage experts" and done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

run(sys.argv[1], sys.argv[2], progress=progress, save_seconds=0)
"""


def test_kill_and_resume_give_the_same_bytes(dense, whole, tmp_path):
    out = tmp_path / "sparse"
    root = Path(__file__).parents[3]
    paths = [str(root)]
    command = ["-c", KILLED, str(dense), str(out), *paths]
    killed = python(*command, env={"OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists() and (tmp_path / "sparse.work").is_dir()
    with pytest.raises(ValueError, match="unfinished conversion; continue with --resume"):
        run(dense, out)
    with pytest.raises(ValueError, match="another recipe, seed or steps"):
        run(dense, out, resume=True, seed=9)
    said, phases = [], []
    run(dense, out, resume=True, log=said.append, progress=lambda *a: phases.append(a[0]))
    assert any("after 4 of 6 steps" in text for text in said) and "importance" not in phases
    expected, actual = contents(whole[0]), contents(out)
    differing = [name for name in expected if expected[name] != actual.get(name)]
    assert expected.keys() == actual.keys() and differing == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse"]
    assert run(dense, out, resume=True) == {"out": str(out), "already_converted": True}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 5, "init_only": True}, "steps is 5 but init_only"),
        ({"steps": 0}, "steps is 0; expected a whole number from 1"),
        ({"recipe": "M"}, "preset 'M' is not known; expected one of L"),
        ({"recipe": dataclasses.replace(RECIPE, num_experts=8)}, "do not make up the FFN's 128"),
    ],
)
def test_settings_that_cannot_be(dense, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        run(dense, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_data_that_cannot_be_made_leaves_nothing_behind(dense, tmp_path):
    def failing(pipe, seed):
        raise ValueError("no such world")

    with pytest.raises(ValueError, match="no such world"):
        converted(dense, tmp_path / "out", RECIPE, failing, neuron_importance)
    assert not list(tmp_path.iterdir())


def test_directories_in_use(dense, whole, tmp_path):
    with pytest.raises(ValueError, match="exists and is not empty"):
        run(dense, whole[0])
    with pytest.raises(ValueError, match="already converted with other settings"):
        run(dense, whole[0], resume=True, steps=9)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty"):
        run(dense, tmp_path / "file")


def test_dense_that_is_none(dense, whole, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no directory; expected a diffusers pipeline"):
        run(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="is a SparseFluxTransformer2DModel; expected a dense"):
        run(whole[0], tmp_path / "out")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(ValueError, match="PixArtAlphaPipeline, which d2m does not know; known are"):
        run(tmp_path / "pipe", tmp_path / "out")
    assert not (tmp_path / "out.work").exists()
