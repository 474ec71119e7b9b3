"""FFNs that learn by themselves: what enters them, what they learn, the conversion of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from calib.data.option import open_data
from d2m.cli import main
from d2m.convert import streamed
from d2m.convert.local import energy, learn_ffn
from d2m.convert.streamed import block_names, convert_stream
from d2m.convert.teacher_inputs import TeacherInputs, dense_skeleton
from d2m.families import family_of_pipeline
from d2m.families.ffn_sites import DenseFFN
from d2m.families.generation_defaults import generation_defaults
from d2m.families.site import feed_forward, fused_gated
from d2m.model.routing import activate
from d2m.model.surgery import convert_ffn, gate_weight, split_neurons, stored_ffn
from d2m.recipe import recipe as recipes
from d2m.recipe.recipe import Local, SparseSpec, with_local
from d2m.shards import open_shards
from tests.tiny.data import folder
from tests.tiny.pipeline import tiny_inputs

LOCAL = Local(steps=60, tokens=256, samples=4, batch_size=2, rows=100_000, lr=3e-3)


def test_a_teacher_that_fails_or_is_left_stops_all_threads(
    tiny_dense_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    pipe = DiffusionPipeline.from_pretrained(tiny_dense_dir, local_files_only=True)
    family = family_of_pipeline(pipe)
    source = open_shards(tiny_dense_dir / "transformer")
    blocks = block_names(source, family)
    calls = [tiny_inputs(seed=seed) for seed in range(3)]
    before = threading.active_count()

    def inputs(order: list[str]) -> TeacherInputs:
        model = dense_skeleton(tiny_dense_dir / "transformer", family)
        return TeacherInputs(model, source, family, order, calls, rows=30)

    left = iter(inputs(blocks))
    _, kept = next(left)
    assert {len(x) for x in kept.values()} == {30}
    left.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before  # others may have ended meanwhile
    with pytest.raises(RuntimeError, match="the model runs transformer_blocks.0 after, expected"):
        list(inputs(blocks[::-1]))
    calls[1] = {**calls[1], "hidden_states": calls[1]["hidden_states"][..., :3]}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(inputs(blocks))
    assert threading.active_count() <= before


def ffn_of(activation: str, bias: bool, width: int = 16, neurons: int = 64) -> DenseFFN:
    """Neurons of very different importance, as in a trained model."""
    at = torch.Generator().manual_seed(3)
    rows = neurons * (2 if activation == "swiglu" else 1)
    scale = torch.logspace(0, -2, neurons)[torch.randperm(neurons, generator=at)]
    return DenseFFN(
        torch.randn(rows, width, generator=at) / width**0.5,
        torch.randn(rows, generator=at) if bias else None,
        torch.randn(width, neurons, generator=at) * scale,
        torch.randn(width, generator=at) if bias else None,
    )


@pytest.mark.parametrize("activation, bias", [("gelu_tanh", True), ("swiglu", False)])
def test_energy_and_learning(activation: str, bias: bool) -> None:
    dense, at = ffn_of(activation, bias), torch.Generator().manual_seed(5)
    x = torch.randn(4100, 16, generator=at)
    wide = [None if each is None else each.double() for each in dense]
    hidden = activate(F.linear(x.double(), wide[0], wide[1]), activation)
    expected = torch.stack(
        [(hidden[:, j, None] * wide[2][:, j]).square().sum(1).mean() for j in range(64)]
    )
    found = energy(x, dense, activation)
    assert torch.allclose(found.double(), expected, rtol=1e-5)

    site = feed_forward("b", "ff", "image") if bias else fused_gated("b", "ff", ("up", "down"), "x")
    site = dataclasses.replace(site, activation=activation)
    made = convert_ffn(dense, split_neurons(found, 16, 12), 16, 12)
    made["gate.weight"] = gate_weight("b.0.ff", 12, 16, 0)
    tensors = {f"b.0.ff.{key}": value for key, value in made.items()}
    errors = []
    for lr in (3e-3, 1e6):
        ffn = stored_ffn(tensors, "b.0.ff", dense, site, SparseSpec(), torch.float32)
        start = {key: value.clone() for key, value in ffn.state_dict().items()}
        local = dataclasses.replace(LOCAL, lr=lr, steps=300)
        at = torch.Generator().manual_seed(1)
        errors.append(learn_ffn(ffn, dense, activation, x, local, at))
        same = all(torch.equal(start[key], value) for key, value in ffn.state_dict().items())
        assert same == (lr > 1)
    learnt, worse = errors
    assert 0 < learnt["after"] < 0.8 * learnt["before"]
    assert worse["after"] == worse["before"] == learnt["before"]


RECIPE = dataclasses.replace(
    recipes.preset("L"), stages=(), local=LOCAL, experts="coactivation", router="energy"
)


def test_a_conversion_learns_goes_on_after_a_kill_and_loads(
    tiny_dense_dir: Path, tmp_path: Path
) -> None:
    pictures = open_data(
        str(folder(tmp_path / "pictures")), lambda: generation_defaults(tiny_dense_dir)
    )

    def run(dense: Path, out: Path, **options: Any) -> dict[str, Any]:
        options = {"log": lambda text: None, "data": pictures.label} | options
        return convert_stream(dense, out, RECIPE, batches=pictures.batches, **options)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    answer = run(tiny_dense_dir, whole)
    errors = json.loads((whole / "local.json").read_text())
    assert errors and all(row["after"] <= row["before"] for row in errors.values())
    assert answer["local"]["after"] < answer["local"]["before"]
    assert recipes.load(whole / "recipe.json").local == LOCAL

    class Killed(BaseException):
        pass

    def progress(phase: str, done: int, total: int) -> None:
        if phase == streamed.PHASE and done == 2:
            raise Killed

    with pytest.raises(Killed):
        run(tiny_dense_dir, broken, progress=progress)
    run(tiny_dense_dir, broken, resume=True)
    for path in sorted(whole.rglob("*.safetensors")):
        first, second = load_file(path), load_file(broken / path.relative_to(whole))
        assert all(torch.equal(first[key], second[key]) for key in first), path
    assert errors == json.loads((broken / "local.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(whole, local_files_only=True)
    assert type(pipe.transformer).__name__ == "SparseFluxTransformer2DModel"


def test_the_command_and_what_it_refuses(
    tiny_dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = str(folder(tmp_path / "pictures"))
    command = ["convert", str(tiny_dense_dir), "-o", str(tmp_path / "out"), "--local"]
    command += ["--data", pictures]
    assert main([*command, "--steps", "2", "--samples", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["importance"] == "activations" and set(answer["local"]) == {"before", "after"}
    for more in (["--init-only"], ["--stages", "1"], ["--budget", "0.5"]):
        assert main([*command, *more]) == 2
        assert "--local converts and trains in one pass" in capsys.readouterr().err
    assert main([*command[:5], "--data", "prompts.txt"]) == 2
    assert "prompts alone need the whole teacher" in capsys.readouterr().err
    assert main(["convert", str(tiny_dense_dir), "-o", "x", "--samples", "3"]) == 2
    assert "--samples is for --local" in capsys.readouterr().err


def test_recipes_hold_it_as_data() -> None:
    found = with_local(recipes.preset("L"), steps=7, samples=None)
    assert found.local == Local(steps=7) and found.stages == ()
    assert recipes.from_dict(json.loads(json.dumps(recipes.to_dict(found)))) == found
    assert "local" not in recipes.to_dict(recipes.preset("L"))
    for key, value in (("steps", -1), ("lr", 0), ("tokens", 0), ("unknown", 1)):
        text = {**recipes.to_dict(found), "local": {key: value}}
        with pytest.raises(ValueError, match=key):
            recipes.from_dict(text)
