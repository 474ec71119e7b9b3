"""The renderer: what is drawn, where, in which colours, and how fast."""

import time

import numpy as np
import pytest

from calib.shapes.render import render, render_batch
from calib.shapes.world import (
    BACKGROUND,
    CATEGORIES,
    COLOURS,
    NUMBERS,
    SHAPES,
    Scene,
    Thing,
    World,
    heldout_pairs,
    sample_scene,
)

HARDEST = World(size=64, colours=10, shapes=6, max_count=6)


def drawn(world: World, n: int, split: str = "train", category: str | None = None, seed: int = 0):
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(world, rng, split, category) for _ in range(n)]
    return scenes, render_batch(scenes, world, rng, split)


def pure(image: np.ndarray, colour: str) -> np.ndarray:
    """Where the image has exactly the colour, bool [S, S]."""
    return (image == COLOURS[colour]).all(-1)


def test_images_are_fixed_by_the_seed_and_batches_are_single_images():
    world = World()
    scenes, images = drawn(world, 40)
    assert images.dtype == np.uint8 and images.shape == (40, 32, 32, 3)
    assert (images == drawn(world, 40)[1]).all()
    assert (images != drawn(world, 40, seed=1)[1]).any()
    rng, again = np.random.default_rng(7), np.random.default_rng(7)
    singles = np.stack([render(scene, world, rng) for scene in scenes])
    assert (singles == render_batch(scenes, world, again)).all()


@pytest.mark.parametrize("world", [World(), World(max_count=6), HARDEST])
def test_the_border_is_background_and_things_are_two_pixels_apart(world):
    scenes, images = drawn(world, 600, category="counting")
    for scene, image in zip(scenes, images):
        paint = (image != BACKGROUND).any(-1)
        assert not (paint[0].any() or paint[-1].any() or paint[:, 0].any() or paint[:, -1].any())
        assert scene.caption.split()[-2] == NUMBERS[len(scene.things)]


def test_plain_shapes_have_the_area_of_their_definition():
    world, rng = World(size=128, shapes=6), np.random.default_rng(0)
    wanted = {"circle": 0.785, "square": 1, "triangle": 0.5, "diamond": 0.5}
    fractions = {}
    for shape in SHAPES:
        scene = Scene("colours", (Thing(shape, "black"),), None, "")
        image = render(scene, world, rng, "eval")
        rows, columns = np.nonzero(image[..., 0] < 64)
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        fractions[shape] = len(rows) / box
        side = np.ptp(columns) + 1
        assert 0.25 < side / world.size < 0.45
    for shape, fraction in wanted.items():
        assert abs(fractions[shape] - fraction) < 0.05, (shape, fractions[shape])
    assert 0.4 < fractions["cross"] < 0.7 and 0.4 < fractions["ring"] < 0.7


def test_edges_are_anti_aliased_and_inner_pixels_pure():
    scene = Scene("colours", (Thing("circle", "white"),), None, "a white circle")
    image = render(scene, World(), np.random.default_rng(0))
    between = (image[..., 0] > 128) & (image[..., 0] < 255)
    assert pure(image, "white").sum() > 40 and between.sum() > 12


def test_named_colours_are_drawn():
    world = World()
    scenes, images = drawn(world, 400, "eval", "colour_attribution")
    for scene, image in zip(scenes, images):
        seen = {colour for colour in world.colour_names if pure(image, colour).sum() >= 5}
        assert seen == {thing.colour for thing in scene.things}


def test_counted_things_share_one_colour():
    world = World()
    for image in drawn(world, 400, category="counting")[1]:
        assert sum(pure(image, colour).sum() >= 5 for colour in world.colour_names) == 1


@pytest.mark.parametrize("category", ["single_object", "counting"])
def test_training_images_avoid_heldout_pairs_and_evaluation_images_do_not(category):
    world = World()
    pairs = {}
    for split in ("train", "eval"):
        scenes, images = drawn(world, 1000, split, category)
        pairs[split] = {
            (colour, scene.things[0].shape)
            for scene, image in zip(scenes, images)
            for colour in world.colour_names
            if pure(image, colour).sum() >= 5
        }
    everything = {(colour, shape) for colour in world.colour_names for shape in world.shape_names}
    assert pairs["train"] == everything - heldout_pairs(world)
    assert pairs["eval"] == everything


def test_a_heldout_scene_is_not_drawn_for_training():
    colour, shape = sorted(heldout_pairs(World()))[0]
    scene = Scene("colours", (Thing(shape, colour),), None, f"a {colour} {shape}")
    with pytest.raises(ValueError, match=f"a {colour} {shape} is held out.*split='eval'"):
        render(scene, World(), np.random.default_rng(0))
    assert pure(render(scene, World(), np.random.default_rng(0), "eval"), colour).any()


@pytest.mark.parametrize(
    "relation, axis, sign",
    [("left of", 1, 1), ("right of", 1, -1), ("above", 0, 1), ("below", 0, -1)],
)
def test_relations_are_clear(relation, axis, sign):
    things = (Thing("circle", "black"), Thing("square", "white"))
    scene = Scene("position", things, relation, f"a circle {relation} a square")
    world, rng = World(), np.random.default_rng(0)
    for image in render_batch([scene] * 300, world, rng):
        centres = [np.argwhere(pure(image, colour)).mean(0) for colour in ("black", "white")]
        offset = (centres[1] - centres[0]) * sign
        assert offset[axis] >= 0.25 * world.size - 1
        assert offset[axis] > 1.3 * abs(offset[1 - axis])


def test_sizes_and_places_vary():
    scene = Scene("single_object", (Thing("square"),), None, "a square")
    images = render_batch([scene] * 500, World(), np.random.default_rng(0))
    paint = (images != BACKGROUND).any(-1)
    areas = paint.sum((1, 2))
    assert areas.min() < 100 < 150 < areas.max()
    seen = paint.any(0)
    assert seen[2:-2, 2:-2].mean() > 0.99 and not seen[0].any()  # anywhere, down to the border


def test_more_than_2000_images_a_second():
    world, rng = World(), np.random.default_rng(0)
    scenes = [sample_scene(world, rng, "train") for _ in range(1000)]
    render_batch(scenes, world, rng)  # fills the sprite cache
    before = time.process_time()
    render_batch(scenes, world, rng)
    assert 1000 / (time.process_time() - before) > 2000
    assert set(CATEGORIES) == {scene.category for scene in scenes}
