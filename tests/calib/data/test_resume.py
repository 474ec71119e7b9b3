"""A conversion that stopped in the middle of an epoch goes on with the same bits."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from calib.data.option import open_data
from calib.measure.importance import neuron_importance
from d2m.families.generation_defaults import generation_defaults
from d2m.recipe import recipe as recipes
from tests.cases.conversions import converted
from tests.tiny import data as tinydata
from tests.tiny.pipeline import tiny_pipeline

RECIPE = dataclasses.replace(
    recipes.preset("L"),
    calibration=recipes.Calibration(batches=2, batch_size=2),
    stages=tuple(
        dataclasses.replace(stage, steps=4, batch_size=3) for stage in recipes.preset("L").stages
    ),
)


class Crash(Exception):
    """What no code of ours expects."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tiny_pipeline(tmp_path_factory.mktemp("dense") / "pipe")
    defaults = {"num_inference_steps": 3, "height": 16, "width": 16}
    (path / "defaults.json").write_text(json.dumps(defaults))
    return path


def run(dense, out, how, cache=None, seen=None, **options):
    """Convert with `--data how`; `seen` gets every training batch by its step."""
    data = open_data(
        how,
        lambda: generation_defaults(dense),
        cache=cache,
        window=5,
        skip=2,
        log=lambda text: None,
    )

    def batches(pipe, seed):
        made = data.batches(pipe, seed)

        def batch(step, size):
            answer = made(step, size)
            if seen is not None and seed == RECIPE.seed:
                seen[step] = answer
            return answer

        return batch

    settings = {"write": False, "log": lambda text: None, "save_seconds": 0, "data": data.label}
    return converted(dense, out, RECIPE, batches, neuron_importance, **settings | options)


def contents(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", ["shards", "parquet", "prompts"])
def test_resumed_in_the_middle_of_an_epoch(dense, tmp_path, kind):
    """24 samples are taken of 12 (with two damaged ones), and it stops after 15 of them."""
    if kind == "parquet":
        pytest.importorskip("datasets", reason="the extra data is not installed")
    how = str(getattr(tinydata, kind)(tmp_path / "set"))
    if kind == "prompts":
        how = str((tmp_path / "set").rename(tmp_path / "set.txt"))
    if kind == "shards":
        shard = tmp_path / "set/train-001.tar"
        data = bytearray(shard.read_bytes())
        data[512:1500] = bytes(988)  # of the first picture in it
        shard.write_bytes(data)
    whole: dict = {}
    run(dense, tmp_path / "whole/out", how, seen=whole)
    assert sorted(whole) == list(range(8))

    def crash(phase, done, total):
        if phase == "stage experts" and done == 2:
            raise Crash

    # The step whose progress is told is not saved yet: 5 are, the first of this stage among them.
    cache, first, rest, said = tmp_path / "cache", {}, {}, []
    with pytest.raises(Crash):
        run(dense, tmp_path / "again/out", how, cache, first, progress=crash)
    with pytest.raises(ValueError, match="a conversion with other training data; resume it with"):
        run(dense, tmp_path / "again/out", str(tinydata.folder(tmp_path / "other")), resume=True)
    run(dense, tmp_path / "again/out", how, cache, rest, resume=True, log=said.append)
    assert any("after 5 of 8 steps" in text for text in said)
    assert sorted(first) == list(range(6)) and sorted(rest) == [5, 6, 7]
    for step, batch in [*first.items(), *rest.items()]:
        assert all(torch.equal(batch[name], whole[step][name]) for name in whole[step])
    assert contents(tmp_path / "whole/out") == contents(tmp_path / "again/out")
