"""Captions, splits and held-out pairs of the shapes world."""

from collections import Counter

import numpy as np
import pytest

from calib.shapes.world import (
    BACKGROUND,
    CATEGORIES,
    COLOURS,
    Scene,
    World,
    caption_split,
    catalogue,
    eval_scenes,
    heldout_pairs,
    sample_scene,
    vocabulary,
)

HARDEST = World(size=64, colours=10, shapes=6, max_count=6)
WORLDS = [World(), HARDEST]


def scenes(world: World, category: str, split: str) -> list[Scene]:
    return [scene for group in catalogue(world, category, split) for scene in group]


def test_captions_read_as_in_geneval():
    captions = {
        s.caption for c in CATEGORIES for sp in ("train", "eval") for s in scenes(HARDEST, c, sp)
    }
    for caption in (
        "a photo of a circle",
        "a photo of a circle and a square",
        "a photo of three circles",
        "a photo of two crosses",
        "a photo of a red circle",
        "a photo of an orange ring",
        "a photo of a circle left of a square",
        "a photo of a red circle and a blue square",
        "there is a circle above a square",
        "there are four triangles",
        "a red circle",
    ):
        assert caption in captions
    assert not any(" a orange" in c or " an r" in c or "there is two" in c for c in captions)
    assert not any("there are a" in c or c != " ".join(c.split()) for c in captions)


@pytest.mark.parametrize("world", WORLDS)
def test_splits_are_disjoint_and_every_category_has_both(world):
    train = Counter(s.caption for c in CATEGORIES for s in scenes(world, c, "train"))
    evaluation = Counter(s.caption for c in CATEGORIES for s in scenes(world, c, "eval"))
    assert not train.keys() & evaluation.keys()
    assert max((train + evaluation).values()) == 1  # no two scenes share a caption
    for category in CATEGORIES:
        # Every content is seen in training unless it names a held-out pair; all are evaluated.
        held = heldout_pairs(world)
        for group in catalogue(world, category, "train"):
            assert not any((t.colour, t.shape) in held for t in group[0].things)
        groups_eval, groups_train = (catalogue(world, category, sp) for sp in ("eval", "train"))
        named = sum(any((t.colour, t.shape) in held for t in g[0].things) for g in groups_eval)
        assert len(groups_eval) >= len(groups_train) > 0
        assert len(groups_train) + named >= 0.99 * len(groups_eval)
        free = [
            s
            for g in groups_eval
            for s in g
            if not any((t.colour, t.shape) in held for t in s.things)
        ]
        share = len(free) / (len(free) + len(scenes(world, category, "train")))
        assert 0.15 < share < 0.35, (category, share)


def test_the_split_of_a_caption_never_changes():
    # Recorded: another split would leak evaluation captions of committed models into training.
    recorded = {
        "a photo of a circle": "train",
        "a photo of three circles": "train",
        "a picture of a red circle and a blue square": "eval",
        "a square left of a triangle": "eval",
    }
    assert {caption: caption_split(caption) for caption in recorded} == recorded


@pytest.mark.parametrize("world", WORLDS)
def test_heldout_pairs_leave_every_colour_and_shape_in_training(world):
    held = heldout_pairs(world)
    assert 0.1 <= len(held) / (world.colours * world.shapes) <= 0.2
    assert max(Counter(colour for colour, _ in held).values()) == 1
    assert max(Counter(shape for _, shape in held).values()) <= 2
    assert heldout_pairs(World()) <= heldout_pairs(HARDEST)
    assert len(heldout_pairs(World())) == 4


def test_training_never_names_a_heldout_pair_and_evaluation_does_at_its_natural_share():
    world, rng = World(), np.random.default_rng(0)
    held = heldout_pairs(world)

    def share(split, category):
        drawn = [sample_scene(world, rng, split, category) for _ in range(3000)]
        return np.mean([any((t.colour, t.shape) in held for t in s.things) for s in drawn])

    assert share("train", "colours") == share("train", "colour_attribution") == 0
    assert abs(share("eval", "colours") - 4 / 24) < 0.03
    assert 0.25 < share("eval", "colour_attribution") < 0.37


def test_sampling_is_fixed_by_the_seed_and_reaches_every_category():
    world = World()

    def sequence(seed):
        rng = np.random.default_rng(seed)
        return [sample_scene(world, rng, "train") for _ in range(50)]

    assert sequence(1) == sequence(1) != sequence(2)
    rng = np.random.default_rng(0)
    counts = Counter(sample_scene(world, rng, "train").category for _ in range(1200))
    assert set(counts) == set(CATEGORIES) and min(counts.values()) > 140


@pytest.mark.parametrize("n", [1, 7, 600, 610])
def test_eval_scenes_are_balanced_deterministic_and_distinct(n):
    world = World()
    drawn = eval_scenes(world, n, seed=3)
    assert drawn == eval_scenes(world, n, seed=3)
    counts = Counter(s.category for s in drawn)
    assert sum(counts.values()) == n
    assert [counts[c] for c in CATEGORIES] == [n // 6 + (i < n % 6) for i in range(6)]
    for category in CATEGORIES:
        captions = Counter(s.caption for s in drawn if s.category == category)
        available = {s.caption for s in scenes(world, category, "eval")}
        assert set(captions) <= available
        assert len(captions) == min(counts[category], len(available))
        if captions:
            assert max(captions.values()) - min(captions.values()) <= 1


def test_another_seed_gives_other_eval_scenes():
    assert eval_scenes(World(), 60, seed=0) != eval_scenes(World(), 60, seed=1)


def test_vocabulary_covers_the_hardest_world_and_captions_are_short():
    words = vocabulary(World())
    assert words == sorted(set(words)) == vocabulary(HARDEST)
    for category in CATEGORIES:
        for split in ("train", "eval"):
            for scene in scenes(HARDEST, category, split):
                tokens = scene.caption.split()
                assert len(tokens) <= 14 and set(tokens) <= set(words), scene.caption


def test_default_colours_are_far_apart():
    values = [np.array(rgb, float) for rgb in list(COLOURS.values())[:6]] + [np.array(BACKGROUND)]
    for i, a in enumerate(values):
        assert all(np.linalg.norm(a - b) > 125 for b in values[:i])


@pytest.mark.parametrize(
    "bad",
    [{"size": 20}, {"size": 36}, {"colours": 11}, {"shapes": 1}, {"max_count": 7}, {"size": 32.0}],
)
def test_a_bad_world_is_refused_by_name_and_value(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        World(**bad)


def test_bad_arguments_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="color_attr.*colour_attribution"):
        sample_scene(World(), rng, "train", "color_attr")
    with pytest.raises(ValueError, match="'test'"):
        sample_scene(World(), rng, "test")
    with pytest.raises(ValueError, match="n=0"):
        eval_scenes(World(), 0, 0)
