"""Conversion block by block, from file to file: as in memory, resumable, and checked on disk."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

import d2m  # noqa: F401 - diffusers finds our class in a module that is imported
from calib.measure.importance import magnitudes, scores_of
from d2m.convert.modulation_fit import compress_adaln
from d2m.convert.streamed import block_names, check_blocks, convert_stream, sampled
from d2m.families import FLUX
from d2m.families.flow import generator_at
from d2m.model.modulation import norms
from d2m.model.sparse_transformer import SparseFluxTransformer2DModel, sparse_model_of
from d2m.recipe import recipe as recipes
from d2m.recipe.structure import AdaLN, Blocks
from d2m.shards import INDEX, STEM, open_shards
from tests.cases.fresh_process import python
from tests.tiny.pipeline import tiny_inputs, tiny_pipeline

RECIPE = dataclasses.replace(recipes.preset("L"), stages=(), split="magnitude")
GROUPED = dataclasses.replace(RECIPE, blocks=Blocks(double=((0, 1),), drop_single=(1,), alpha=0.25))


def quiet(text):
    pass


def run(dense, out, recipe=RECIPE, **options):
    options = {"log": quiet} | options
    return convert_stream(dense, out, recipe, magnitudes, "magnitude", **options)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny pipeline whose transformer lies in several shards."""
    folder = tiny_pipeline(tmp_path_factory.mktemp("dense") / "pipe")
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="60KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 3
    return folder


def in_memory(dense, recipe):
    model = FluxTransformer2DModel.from_pretrained(dense / "transformer")
    return sparse_model_of(model, scores_of(model, magnitudes), recipe, FLUX)


@pytest.mark.parametrize("recipe", [RECIPE, GROUPED], ids=["L", "grouped"])
def test_it_is_the_conversion_in_memory(dense, tmp_path, recipe):
    answer = run(dense, tmp_path / "out", recipe)
    model = SparseFluxTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    expected = in_memory(dense, recipe)
    mine, theirs = model.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor) and mine[name].dtype == tensor.dtype, name
    names = [name for name in model.config if not name.startswith("_")]
    assert {n: model.config[n] for n in names} == {
        n: expected.config.get(n, model.config[n]) for n in names
    }
    assert recipes.load(tmp_path / "out" / "recipe.json") == recipe
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.transformer) is type(model)
    sparse = answer["parameters"]["sparse"]
    assert sparse["total"] == sum(p.numel() for p in model.parameters())
    assert answer["checked"] and max(answer["checked"].values()) < 1e-6
    assert not (tmp_path / "out.work").exists()
    scores = load_file(tmp_path / "out" / "importance.safetensors")
    model = FluxTransformer2DModel.from_pretrained(dense / "transformer")
    assert scores.keys() == scores_of(model, magnitudes).keys()


@pytest.mark.parametrize("adaln", [AdaLN("single"), AdaLN("lowrank"), AdaLN("lowrank", 5)])
def test_shared_modulation_is_the_fit_in_memory(dense, tmp_path, adaln):
    """The same least squares for the same embeddings, a norm in memory at a time."""
    recipe = dataclasses.replace(RECIPE, adaln=adaln)
    told = []
    run(dense, tmp_path / "out", recipe, log=told.append)
    assert "random pooled text" in told[0]
    model = SparseFluxTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    plain = FluxTransformer2DModel.from_pretrained(dense / "transformer")
    draw = generator_at(recipe.seed, "modulation")
    n = recipe.calibration.batches * recipe.calibration.batch_size
    t = torch.sigmoid(torch.randn(n, generator=draw) * recipe.t_std + recipe.t_mean) * 1000
    pooled = torch.randn(n, 32, generator=draw)
    with torch.no_grad():
        s = plain.time_text_embed(t, torch.full((n,), 3500.0), pooled)
        s = torch.nn.functional.silu(s).double()
        moments = {"mean": s.mean(0), "covariance": (s - s.mean(0)).T @ (s - s.mean(0)) / n}
        expected = compress_adaln(in_memory(dense, RECIPE), adaln, moments)
        temb = plain.time_text_embed(t[:4], torch.full((4,), 3500.0), pooled[:4])
        for name in norms(expected):
            a, b = (m.get_submodule(name).modulation(temb) for m in (model, expected))
            assert (a - b).norm() / b.norm() < 1e-3, name
        inputs = tiny_inputs()
        a, b = (m(**inputs, return_dict=False)[0] for m in (model, expected))
    assert (a - b).norm() / b.norm() < 1e-3


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from tests.d2m.convert.test_streamed import run

def progress(phase, done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

run(__import__("pathlib").Path(sys.argv[1]), sys.argv[2], progress=progress)
"""


def test_killed_it_goes_on_at_the_block_it_was_killed_in(dense, tmp_path):
    run(dense, tmp_path / "whole")
    root = Path(__file__).parents[3]
    paths = [str(root)]
    killed = python("-c", KILLED, dense, tmp_path / "out", *paths)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = sorted((tmp_path / "out.work/result/transformer").glob("*.safetensors"))
    assert len(done) == 5  # outside, and two blocks of two shards
    times = [path.stat().st_mtime_ns for path in done]
    (done[0].parent / f".{done[0].name}.0123456789ab.tmp").write_bytes(b"half")
    with pytest.raises(ValueError, match="holds an unfinished conversion; continue with --resume"):
        run(dense, tmp_path / "out")
    with pytest.raises(ValueError, match="a conversion with another importance; resume it with"):
        convert_stream(dense, tmp_path / "out", RECIPE, magnitudes, "mine", resume=True, log=quiet)
    run(dense, tmp_path / "out", resume=True)
    for file in sorted((tmp_path / "whole").rglob("*")):
        twin = tmp_path / "out" / file.relative_to(tmp_path / "whole")
        if file.is_file() and file.name != "README.md":
            assert file.read_bytes() == twin.read_bytes(), file
    kept = [tmp_path / "out/transformer" / path.name for path in done]
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert not list((tmp_path / "out").rglob(".*"))
    told = []
    run(dense, tmp_path / "out", resume=True, log=told.append)
    assert "nothing is left to do" in told[0]


def test_what_is_on_disk_is_checked(dense, tmp_path):
    run(dense, tmp_path / "out")
    source, written = (open_shards(path / "transformer") for path in (dense, tmp_path / "out"))
    blocks = block_names(source, FLUX)
    assert blocks == [f"{kind}.{i}" for _, kind in FLUX.blocks.kinds for i in range(2)]
    assert sampled(blocks, 0) == blocks
    for name in (
        "transformer_blocks.1.ff.experts.w2",
        "single_transformer_blocks.0.attn.to_k.bias",
    ):
        file = written.folder / written.where[name]
        before = file.read_bytes()
        tensor = written.read([name])[name].numpy().tobytes()
        at = before.index(tensor)
        file.write_bytes(before[: at + 3] + bytes([before[at + 3] ^ 64]) + before[at + 4 :])
        with pytest.raises(ValueError, match=f"{'.'.join(name.split('.')[:2])} read back from"):
            check_blocks(source, written, blocks, RECIPE, FLUX)
        file.write_bytes(before)
    check_blocks(source, written, blocks, RECIPE, FLUX)


def test_bfloat16_stays_bfloat16(dense, tmp_path):
    folder = tmp_path / "pipe"
    shutil.copytree(dense, folder)
    model = FluxTransformer2DModel.from_pretrained(
        dense / "transformer", torch_dtype=torch.bfloat16
    )
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer")
    answer = run(folder, tmp_path / "out")
    error = max(answer["checked"].values())
    assert 1e-5 < error < 1e-2
    # The first block: experts are in a shard of their own.
    shards = [tmp_path / "out/transformer" / f"{STEM}-0000{n}-of-00009.safetensors" for n in (2, 3)]
    rest, experts = map(load_file, shards)
    assert all(".experts." in name for name in experts)
    assert not any(".experts." in name for name in rest)
    tensors = rest | experts
    kinds = {name.rpartition(".")[2]: t.dtype for name, t in tensors.items()}
    assert kinds["w1"] == kinds["bias"] == torch.bfloat16 and kinds["neurons"] == torch.int64
    assert tensors["transformer_blocks.0.ff.gate.weight"].dtype == torch.float32


def test_bad_checkpoints(dense, tmp_path):
    folder = tmp_path / "pipe"
    shutil.copytree(dense, folder)
    index = folder / "transformer" / INDEX
    told = json.loads(index.read_text())
    shard = folder / "transformer" / sorted(set(told["weight_map"].values()))[1]
    whole = shard.read_bytes()
    for content, words in (
        (whole[:-1], "is not valid safetensors"),
        (whole[:3], "is not valid safetensors"),
        (b"\xff" * 8 + whole[8:], "is not valid safetensors"),
    ):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            run(folder, tmp_path / "out")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="is missing, expected weights"):
        run(folder, tmp_path / "out")
    shard.write_bytes(whole)
    name = next(key for key, file in told["weight_map"].items() if file != shard.name)
    told["weight_map"][name] = "../elsewhere.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="expected files of its own directory"):
        run(folder, tmp_path / "out")
    told["weight_map"][name] = shard.name
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"lacks {name}, which"):
        run(folder, tmp_path / "out")
    for text, words in (
        ("[]", "expected a JSON object"),
        ("{}", "is not an index of shards"),
        ('{"weight_map": {"a": 1}}', "is not an index of shards"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=words):
            run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_scores_that_do_not_fit(dense, tmp_path):
    with pytest.raises(ValueError, match=r"importance of .*ff has shape \[3\]; expected \[128\]"):
        convert_stream(dense, tmp_path / "out", RECIPE, lambda *a: torch.ones(3), "mine", log=quiet)
    assert not (tmp_path / "out").exists()


def test_command_line(dense, tmp_path):
    from d2m.cli import main

    out = str(tmp_path / "out")
    arguments = ["convert", str(dense), "-o", out, "--init-only", "--json"]
    assert main([*arguments, "--importance", "magnitude"]) == 0
    scores = f"{out}/importance.safetensors"
    again = str(tmp_path / "again")
    assert main(["convert", str(dense), "-o", again, "--init-only", "--importance", scores]) == 0
    a, b = (open_shards(f"{each}/transformer") for each in (out, again))
    for file in set(a.where.values()):
        assert (a.folder / file).read_bytes() == (b.folder / file).read_bytes()
    assert main([*arguments[:3], str(tmp_path / "no"), "--init-only", "--importance", "maths"]) == 2
    assert not (tmp_path / "no").exists()
    assert os.listdir(tmp_path / "again")
