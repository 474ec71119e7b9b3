"""Scenes, captions, splits and images of the emoji world, on glyphs drawn here."""

from itertools import combinations

import numpy as np
import pytest

from calib.emoji.render import COUNTED, HALF, arranged, over, render, render_batch, ways
from calib.emoji.world import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    Scene,
    World,
    eval_scenes,
    held_out,
    sample_scene,
    split_of,
    vocabulary,
)
from tests.tiny.emoji import make_art


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(folder=make_art(tmp_path_factory.mktemp("art") / "art", 40))


def scenes(world, split, n=400, seed=0):
    rng = np.random.default_rng(seed)
    return [sample_scene(world, rng, split) for _ in range(n)]


def test_a_scene_is_of_its_split_and_says_what_it_is(world):
    for split in ("train", "eval"):
        found = scenes(world, split)
        assert {scene.category for scene in found} == set(CATEGORIES)
        for scene in found:
            assert split_of(world, scene) == split
            words = f" {scene.caption} "
            assert all(f" {name} " in words for name in scene.things)
            assert (scene.relation is not None) == (scene.category == "pair")
            assert (scene.background == "white") == (scene.category != "background")
            assert len(scene.caption.split()) <= 10
            assert set(scene.caption.split()) <= set(vocabulary(world))


def test_what_is_held_out_is_in_no_training_scene_whatever_its_order_and_prefix(world):
    trained = scenes(world, "train", 3000)
    pairs = {frozenset(s.things) for s in trained if s.category == "pair"}
    held = {frozenset(p) for p in combinations(world.names, 2) if held_out(world, *sorted(p))}
    assert not pairs & held and 0.15 < len(held) / (40 * 39 / 2) < 0.35
    coloured = {(s.things[0], s.background) for s in trained if s.category == "background"}
    assert not any(held_out(world, *pair) for pair in coloured) and len(coloured) > 150
    other = World(folder=world.folder, seed=1)
    moved = [p for p in combinations(world.names, 2) if held_out(other, *sorted(p))]
    assert {frozenset(p) for p in moved} != held


def test_evaluation_is_fixed_by_its_seed_and_balanced_from_the_start(world):
    found = eval_scenes(world, 90, 3)
    assert found == eval_scenes(world, 90, 3) and found != eval_scenes(world, 90, 4)
    assert found[:40] == eval_scenes(world, 40, 3)
    assert [s.category for s in found[:8]] == [*CATEGORIES, *CATEGORIES]
    assert all(split_of(world, scene) == "eval" for scene in found)
    with pytest.raises(ValueError, match="n=0"):
        eval_scenes(world, 0, 0)


def test_emoji_come_round_in_turn(world):
    singles = [s.things[0] for s in eval_scenes(world, 160, 0) if s.category == "background"]
    assert len(set(singles)) > 30  # 40 in turn; the next one where the split has none


def test_a_single_is_its_picture_on_its_background(world):
    name = world.names[5]
    scene = Scene("background", (name,), None, "blue", f"{name} on blue background")
    image = render(scene, world, np.random.default_rng(0)).astype(float)
    picture = world.catalogue.large[5].astype(float)
    cover = picture[..., 3:] / 255
    exact = picture[..., :3] * cover + np.array(BACKGROUNDS["blue"]) * (1 - cover)
    assert np.abs(image - exact).max() <= 0.5


def test_pairs_stand_where_the_caption_says(world):
    a, b = world.names[3], world.names[8]
    images = {
        relation: render(
            Scene("pair", (a, b), relation, "white", f"{a} {relation} {b}"),
            world,
            np.random.default_rng(0),
        )
        for relation in ("left of", "right of", "above", "below")
    }
    white = np.full((HALF, HALF, 3), 255, np.uint8)
    first, second = (over(world.catalogue.small[i], white) for i in (3, 8))
    assert (images["left of"][16:48, :32] == first).all()
    assert (images["left of"][16:48, 32:] == second).all()
    assert (images["left of"][:16] == 255).all() and (images["left of"][48:] == 255).all()
    assert (images["above"][:32, 16:48] == first).all()
    assert (images["above"][32:, 16:48] == second).all()
    assert (images["right of"][16:48, 32:] == first).all()
    assert (images["below"][32:, 16:48] == first).all()


def test_counted_things_take_every_way_that_is_allowed_and_no_other(world):
    scene = Scene("count", (world.names[0],) * 3, None, "white", f"{world.names[0]} three times")
    rng = np.random.default_rng(0)
    seen = {arranged(scene, rng) for _ in range(50)}
    assert seen == set(ways(scene)) == set(COUNTED[3])


def test_a_batch_is_its_images_one_by_one(world):
    found = scenes(world, "train", 12)
    whole = render_batch(found, world, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    assert all((render(s, world, rng) == image).all() for s, image in zip(found, whole))


@pytest.mark.parametrize("values", [{"count": 1}, {"count": 3000}, {"seed": -1}, {"seed": True}])
def test_values_outside_their_range_are_refused(values):
    with pytest.raises(ValueError, match=f"World: {next(iter(values))}="):
        World(**values)


def test_bad_requests_are_refused(world):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="split 'test'"):
        sample_scene(world, rng, "test")
    with pytest.raises(ValueError, match="category 'triple'"):
        sample_scene(world, rng, "train", "triple")


def test_no_two_backgrounds_are_close():
    colours = np.array(list(BACKGROUNDS.values()), float)
    away = np.sqrt(((colours[:, None] - colours[None]) ** 2).sum(-1))
    assert away[np.triu_indices(len(colours), 1)].min() > 60 and len(COLOURS) == 8
