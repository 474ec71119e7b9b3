"""Distillation by several processes (gloo, CPU): one process's losses, each other's checkpoints.

The cases are in tests/cases/many_processes.py; a subprocess forks as many processes as are asked
for.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2m.distill import processes
from d2m.distill.activations import blocks_of
from d2m.distill.batch_rows import batch_rows, check_shares, shares
from d2m.distill.loop import distill
from d2m.distill.processes import ALONE, Crew
from tests.cases.fresh_process import python
from tests.cases.many_processes import BATCH, EVERY, STAGES, THREE, run
from tests.tiny.pair import RECIPE, SHARED, grouped_pair, tiny_batches, tiny_pair

TESTS = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)


def many(size, case, workdir):
    """(exit code, lines that the processes printed as JSON) of a case run by `size` processes."""
    done = python(TESTS / "cases/many_processes.py", size, case, workdir, timeout=900)
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(log, weights) of one process that ran to the end."""
    history, student = run("whole", tmp_path_factory.mktemp("alone"))
    return history, {name: p.detach() for name, p in student.named_parameters()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(exit code, facts, last words, workdir) of two processes, stopped in the third stage."""
    workdir = tmp_path_factory.mktemp("stopped")
    code, (facts, words) = many(2, "stop", workdir)
    return code, facts, words, workdir


def near(weight, other):
    """Adam moves a weight without a gradient by the sign of rounding, so not every element is."""
    return float((weight - other).norm()) < 2e-3 * float(other.norm())


def same(history, reference):
    assert [line["done"] for line in history] == [line["done"] for line in reference]
    for line, other in zip(history, reference, strict=True):
        assert line.keys() == other.keys()
        for name in ("loss", "output", "feature", "group", "balance", "group_balance", "gradient"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-4), (name, line["done"])
        assert line["features"] == pytest.approx(other["features"], rel=1e-4)
        assert line.get("groups", {}).keys() == other.get("groups", {}).keys()
        for name, figures in other.get("groups", {}).items():
            assert line["groups"][name]["share"] == figures["share"]
        for name, figures in other.get("experts", {}).items():
            assert line["experts"][name]["share"] == pytest.approx(figures["share"], abs=2e-3)


# ---------------------------------------------------------------- two processes and others


def test_a_signal_to_one_stops_all_with_one_sentence(stopped):
    code, _, words, workdir = stopped
    assert code == 130 and words.startswith("stopped after 8 of 11 steps; the state is in")
    assert [path.name for path in (workdir / "checkpoints").iterdir()].count("02-0000002") == 1


def test_frozen_weights_lie_once_and_everything_is_halved(stopped):
    _, facts, _, _ = stopped
    # A single block's proj_out is cut in two by the conversion, so its half is the student's own.
    parts = (".shared.", ".experts.", ".gate.", ".router.", ".proj_out.linear.")
    names = facts["dtypes"]
    assert facts["shared"] == sorted(n for n in names if not any(part in n for part in parts))
    assert facts["whole"] == sorted(n for n in names if ".gate." in n or ".router." in n)
    assert facts["halves"] == len(names) - len(facts["whole"])
    assert facts["experts"] == [6, 32, 8]  # of [12, 32, 8]
    for name, dtype in names.items():
        fine = name in facts["trained"] or name in facts["whole"]
        assert dtype == ("torch.float32" if fine else "torch.bfloat16"), name


def test_four_go_on_with_what_two_have_left(stopped, alone, tmp_path):
    *_, workdir = stopped
    shutil.copytree(workdir, tmp_path / "run")
    code, (history,) = many(4, "resume", tmp_path / "run")
    assert code == 0
    same(history, alone[0])
    found = torch.load(tmp_path / "run" / "student.pt")
    for name, expected in alone[1].items():
        assert near(found[name], expected), name


def test_a_killed_process_ends_the_run_and_one_alone_goes_on(alone, tmp_path):
    code, words = many(2, "die", tmp_path)
    assert code == 1 and len(words) == 1
    assert words[0].startswith("one of the 2 processes ended without a message")
    history, student = run("resume", tmp_path)
    same(history, alone[0])
    for name, parameter in student.named_parameters():
        assert near(parameter, alone[1][name]), name


@pytest.mark.slow
def test_bfloat16_by_two(tmp_path):
    """Weights travel in bfloat16, sums are float32: near one process's bfloat16, and no nearer."""
    code, (history,) = many(2, "bfloat16", tmp_path / "two")
    assert code == 0
    reference, _ = run("bfloat16", tmp_path / "one")
    for line, other in zip(history, reference, strict=True):
        assert line["output"] == pytest.approx(other["output"], rel=0.05)


# ---------------------------------------------------------------- one process


def test_gradient_checkpointing_and_offload_change_no_bit(tmp_path):
    recipe = replace(THREE, stages=(replace(STAGES[1], steps=2), replace(EVERY, steps=2)))
    results = []
    for number, options in enumerate(({}, {"checkpointing": True}, {"offload": True})):
        student, teacher = grouped_pair()
        options |= {"workdir": tmp_path / str(number), "log": lambda text: None}
        history = distill(student, teacher, recipe, tiny_batches, **options)
        results.append(([line["loss"] for line in history], student))
        assert all("forward" not in vars(block) for block in blocks_of(student))
    for losses, student in results[1:]:
        assert losses == results[0][0]
        for name, parameter in results[0][1].named_parameters():
            assert torch.equal(parameter, student.get_parameter(name)), name


def test_gradient_accumulation_is_the_whole_batch(tmp_path):
    """Exactly so for the output's loss; features are weighed by each part's own losses."""
    stage = replace(SHARED, batch_size=BATCH, steps=3, losses={"output": 1.0})
    recipe = replace(RECIPE, stages=(stage,))
    results = []
    for parts in (1, 4):
        student, teacher = tiny_pair()
        options = {"workdir": tmp_path / str(parts), "parts": parts, "log_every": 1}
        history = distill(student, teacher, recipe, tiny_batches, **options)
        results.append(history)
    for line, other in zip(*results, strict=True):
        for name in ("loss", "gradient"):
            assert line[name] == pytest.approx(other[name], rel=1e-4)


def test_every_row_of_a_batch_is_run_once():
    for size, parts in ((1, 1), (2, 1), (2, 2), (4, 2)):
        rows = [row for rank in range(size) for row in shares(8, Crew(rank, size), parts)]
        assert sorted(i for first, end in rows for i in range(first, end)) == list(range(8))
    whole = tiny_batches(3, 4)
    part = batch_rows(tiny_batches, 3, 4, (1, 3))
    assert torch.equal(part["latents"], whole["latents"][1:3])
    assert torch.equal(part["img_ids"], whole["img_ids"])
    assert batch_rows(tiny_batches, 3, 4, (0, 4)).keys() == whole.keys()


@pytest.mark.parametrize(
    ("size", "parts", "words"),
    [
        (3, 1, "a batch of 8 for 3 processes"),
        (2, 8, "a multiple of 16"),
        (1, 0, "accumulation is 0, expected 1 part"),
    ],
)
def test_batches_that_do_not_divide(size, parts, words):
    with pytest.raises(ValueError, match=words):
        check_shares(THREE, Crew(0, size), parts)


def test_who_we_are(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes.from_environment() == ALONE == processes.join() and ALONE.leads
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.from_environment() == Crew(1, 2) and not processes.from_environment().leads
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.from_environment() == ALONE


def test_one_process_tells_the_end(monkeypatch, tmp_path):
    error = ValueError("the learning rate is no number")
    assert processes.final_error(error) == (error, True)
    monkeypatch.setattr(processes.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    gone = RuntimeError("[...] Connection closed by peer [127.0.0.1]:1")
    told, speaks = processes.final_error(gone)
    assert (
        speaks and isinstance(told, processes.ProcessLost) and "continue with --resume" in str(told)
    )
    assert processes.final_error(error) == (error, False)


# ---------------------------------------------------------------- the command line


@pytest.mark.slow
def test_torchrun_and_accelerate_convert_as_one_process_does(tmp_path):
    """Importance and split by the first, distillation by both, the result by the first again."""
    import numpy as np
    from safetensors.numpy import load_file

    from d2m.recipe import recipe as recipes

    stages = tuple(replace(stage, steps=2, batch_size=4) for stage in recipes.preset("L").stages)
    few = recipes.Calibration(batches=1, batch_size=2)
    recipe = recipes.to_dict(replace(recipes.preset("L"), stages=stages, calibration=few))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    convert = [
        "-m",
        "d2m",
        "convert",
        str(TESTS.parent / "models/shapes-dense"),
        "--no-report",
        "--score",
        "0",
    ]
    convert += ["--recipe", str(tmp_path / "recipe.json"), "--json", "--gradient-checkpointing"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Its launcher for one machine wants to hear of GPUs; the processes find none and use gloo.
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    starts = {"two": torchrun, "launched": accelerate, "one": []}
    path = os.pathsep.join([str(TESTS.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    answers = {}
    for name, start in starts.items():
        command = [sys.executable, "-W", "ignore", *start, *convert, "-o", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        answers[name] = json.loads(done.stdout)  # of the first process alone
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*starts, "recipe.json"])
    weights = {
        name: load_file(next((tmp_path / name / "transformer").glob("*.safetensors")))
        for name in starts
    }
    for several in ("two", "launched"):
        assert answers[several]["losses"].keys() == answers["one"]["losses"].keys()
        for stage, losses in answers["one"]["losses"].items():
            assert answers[several]["losses"][stage] == pytest.approx(losses, rel=1e-4)
        assert weights[several].keys() == weights["one"].keys()
        for name, value in weights["one"].items():
            assert weights[several][name].dtype == value.dtype
            difference = np.linalg.norm((weights[several][name] - value).astype(np.float64))
            assert difference <= 2e-3 * np.linalg.norm(value.astype(np.float64)), name
    # One sentence and exit code 2 where an argument is wrong, not one from each process.
    command = [sys.executable, *torchrun, *convert, "-o", str(tmp_path / "two"), "--seed", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "exists and is not empty" in done.stderr
