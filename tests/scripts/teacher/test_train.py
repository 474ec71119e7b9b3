"""The dense teacher's scripts, run whole in subprocesses, a few steps a stage."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cases.fresh_process import python

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[3]
STAGES = ("vae", "text", "flow", "guidance")
# --lr: a rate at which even two steps of warm-up move every weight.
SMALL = "--device cpu --threads 1 --no-compile --scenes 40 --batch 2 --snapshot-every 0 --lr 0.05"


def script(
    name: str, *arguments: object, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", name, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(env or {})},
    )


def trained(folder: Path, steps: int, *more: object) -> str:
    """What the training script says, with work/ and shapes/ in `folder`."""
    done = python("-m", "scripts.teacher", *arguments(folder, steps, *more))
    assert done.returncode == 0, done.stderr
    return done.stdout


def arguments(folder: Path, steps: int, *more: object) -> list[object]:
    """`steps` steps of every stage."""
    counts = itertools.chain(*((f"--{stage}-steps", steps) for stage in STAGES))
    where = ("--work", folder / "work", "--out", folder / "shapes")
    return [*SMALL.split(), *counts, *where, *more]


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return out


def train(
    folder: Path, steps: int, *more: object, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """The training script under way, to be killed or one of several."""
    return script("scripts.teacher", *arguments(folder, steps, *more), env=env)


def make_card(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """python -m scripts.teacher.card, in this process."""
    from scripts.teacher import card

    monkeypatch.setattr(sys, "argv", ["card", *map(str, arguments)])
    card.main()


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_four_stages_make_a_pipeline_that_draws_and_gets_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import torch
    from diffusers import FluxPipeline

    shapes = tmp_path / "shapes"
    assert trained(tmp_path, 2).endswith(f"{shapes} is ready\n")
    work = {f"{stage}.{end}" for stage in STAGES for end in ("jsonl", "safetensors")}
    others = {"latents.safetensors", "run.json"}
    assert {path.name for path in (tmp_path / "work").iterdir()} == work | others
    assert {path.name for path in tmp_path.iterdir()} == {"work", "shapes"}

    pipe = FluxPipeline.from_pretrained(shapes, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    defaults = json.loads((shapes / "defaults.json").read_text())
    options = defaults | {"num_inference_steps": 2, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    [image] = pipe("a photo of a red circle", generator=generator, **options).images
    assert image.shape == (32, 32, 3)
    assert np.isfinite(image).all() and image.std() > 0.01

    row = {"score": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    scores = {"n": 4, "seed": 7, "categories": {"two_object": row}, "overall": row}
    (shapes / "scores.json").write_text(json.dumps(scores))
    done = python("-m", "scripts.teacher.card", shapes, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    card = (shapes / "README.md").read_text()
    assert "| two object | 0.500 | 0.250 to 0.750 | 4 |" in card
    assert f"| transformer | {sum(p.numel() for p in pipe.transformer.parameters()):,} |" in card
    logs = json.loads((shapes / "training.json").read_text())
    assert logs.pop("earlier") is None
    assert {stage: [row["step"] for row in rows] for stage, rows in logs.items()} == {
        stage: [2] for stage in STAGES
    }
    drawing = (shapes / "training.svg").read_text()
    assert drawing.startswith("<svg ") and 'xmlns="http://www.w3.org/2000/svg"' in drawing

    # A second training goes on from the first: its VAE stays, its logs live on.
    again = tmp_path / "again"
    trained(again, 2, "--init", shapes)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (again / "shapes" / vae).read_bytes() == (shapes / vae).read_bytes()
    for config in (again / "shapes").glob("*/config.json"):  # nobody's directories in a model
        assert str(tmp_path) not in config.read_text()
    (again / "shapes" / "scores.json").write_text(json.dumps(scores))
    make_card(monkeypatch, again / "shapes", "--work", again / "work")
    card = (again / "shapes" / "README.md").read_text()
    assert "come from 2 trainings in a row" in card
    assert "| VAE, training 1 | 2 |" in card and "| flow matching | 2 |" in card
    logs = json.loads((again / "shapes" / "training.json").read_text())
    assert set(logs) == {*STAGES[1:], "earlier"} and set(logs["earlier"]) == {*STAGES, "earlier"}


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """They share every batch, so only the order of the sums differs.

    Compared are the gradients of one step, as AdamW's first moments hold them. Weights would not
    do: where a gradient is nearly nought, AdamW makes a whole step of the sign of its rounding.
    """
    import torch
    from safetensors.torch import load_file

    alone, shared = tmp_path / "alone", tmp_path / "shared"
    finished(train(alone, 1, "--no-bf16"))
    finished(train(shared, 1, "--no-bf16", "--until", "text"))
    for stage in ("flow", "guidance"):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        options = ("--no-bf16", "--until", stage)
        workers = [train(shared, 1, *options, env=group | {"RANK": str(r)}) for r in range(2)]
        said = [finished(worker) for worker in workers]
        assert [f"{stage} 1/1" in each for each in said] == [True, False]  # the first one writes
        expected = alone / "work" / f"{stage}.safetensors"
        one, two = load_file(expected), load_file(shared / "work" / expected.name)
        moments = [key for key in one if key.endswith(".exp_avg")]
        assert one.keys() == two.keys() and moments
        first, second = (torch.cat([each[k].flatten() for k in moments]) for each in (one, two))
        assert (first - second).norm() < 1e-4 * first.norm(), stage
        # The next stage begins with the same weights.
        shutil.copyfile(expected, shared / "work" / expected.name)


def test_processes_without_latents_are_told_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.teacher.__main__ import main

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["teacher", *SMALL.split(), "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no latents.safetensors: run this once with --until"):
        main()


def test_a_stage_without_its_log_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.json").write_text('{"init": false}')
    words = f"{tmp_path / 'vae.jsonl'} is missing; run python -m scripts.teacher"
    with pytest.raises(FileNotFoundError, match=re.escape(words)):
        make_card(monkeypatch, tmp_path, "--work", tmp_path)


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Tokenizers too: made anew by every process, they have to come out alike."""
    steps = 12
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    finished(train(whole, steps))
    for stage in STAGES:
        process = train(torn, steps, "--save-every", 0)
        until = time.monotonic() + 600
        while not (torn / "work" / f"{stage}.safetensors").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert 0 < step_of(torn / "work" / f"{stage}.safetensors") < steps, stage
    finished(train(torn, steps, "--save-every", 0))
    expected, got = contents(whole / "shapes"), contents(torn / "shapes")
    assert expected.keys() == got.keys()
    assert [name for name in expected if expected[name] != got[name]] == []
    for stage in STAGES:  # weights, averages and moments, too
        name = f"{stage}.safetensors"
        assert (whole / "work" / name).read_bytes() == (torn / "work" / name).read_bytes(), name


def step_of(checkpoint: Path) -> int:
    from safetensors import safe_open

    with safe_open(checkpoint, "np") as file:
        return json.loads(file.metadata()["meta"])["step"]
