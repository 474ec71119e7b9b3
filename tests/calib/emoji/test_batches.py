"""Emoji as training data: batches pure in (seed, step), `--data emoji`, `--suite emoji`."""

import pytest
import torch

from calib.data.option import check_data, open_data
from calib.emoji.batches import emoji_batches
from calib.emoji.world import World
from calib.suites import NAMES, suite_named
from tests.tiny.emoji import make_art
from tests.tiny.pipeline import build_pipeline


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(folder=make_art(tmp_path_factory.mktemp("art") / "art", 12))


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_batches_are_pure_and_their_rows_are_theirs(pipe, world):
    batches = emoji_batches(pipe, world, seed=1)
    expected = batches(7, 4)
    batches(8, 4)
    assert equal(batches(7, 4), expected)
    assert equal(emoji_batches(pipe, world, seed=1)(7, 4), expected)
    assert not equal(batches(8, 4), expected)
    part = batches.rows(7, 4, 1, 3)
    for name in ("latents", "encoder_hidden_states", "pooled_projections"):
        assert torch.allclose(part[name], expected[name][1:3], atol=1e-5), name
    assert torch.equal(part["category"], expected["category"][1:3])
    assert {name: tuple(each.shape) for name, each in expected.items()} == {
        "latents": (4, 256, 16),
        "encoder_hidden_states": (4, 16, 32),
        "pooled_projections": (4, 32),
        "img_ids": (256, 3),
        "txt_ids": (16, 3),
        "category": (4,),
    }


def test_data_emoji_is_told_from_others_and_refuses_what_it_cannot_use():
    data = open_data("emoji", dict)
    assert (data.label, data.kind) == ("emoji", "emoji")
    assert data.categories == ("single", "background", "pair", "count")
    assert open_data("shapes", dict).label is None
    with pytest.raises(ValueError, match="--size is '32', but emoji are made at the"):
        open_data("emoji", dict, size=32)


def test_a_model_of_another_size_is_told_so(tiny_dense_dir, monkeypatch, world):
    monkeypatch.setenv("D2M_EMOJI", str(world.folder))
    data = open_data("emoji", dict)
    with pytest.raises(ValueError, match="--data is emoji, but .* generates 16 pixels"):
        check_data(tiny_dense_dir, data)
    with pytest.raises(ValueError, match="images of 64 pixels, the model generates 16"):
        suite_named("emoji").world(16, {})
    assert suite_named("emoji").world(64, {"count": 7}).count == 7


def test_suites_by_name():
    for name in NAMES:
        assert suite_named(name).name == name and suite_named(name).settings
    with pytest.raises(
        ValueError, match="--suite is 'letters', expected one of shapes, shapes-edit, emoji"
    ):
        suite_named("letters")
