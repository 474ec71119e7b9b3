"""The emoji suite: what its judge accepts and refuses, its rates, its grid."""

import json

import numpy as np
import pytest
from PIL import Image

from calib.emoji.render import render
from calib.emoji.suite import evaluate, save_grid, scores
from calib.emoji.verify import SHIFT, distances, verify
from calib.emoji.world import BACKGROUNDS, CATEGORIES, Scene, World, eval_scenes
from tests.tiny.emoji import make_art


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(folder=make_art(tmp_path_factory.mktemp("art") / "art", 40))


def artist(world, n, change=None):
    """A draw function that renders what is asked, changed by `change(scene, image, rng)`."""
    coming = iter(eval_scenes(world, n, 0))

    def draw(prompts, seeds):
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            scene, rng = next(coming), np.random.default_rng(seed)
            assert scene.caption == prompt
            image = render(scene, world, rng)
            images.append(Image.fromarray(change(scene, image, rng) if change else image))
        return images

    return draw


def test_what_is_drawn_as_asked_scores_one(world):
    calls = []
    result, samples = evaluate(
        artist(world, 82), 82, world=world, batch=32, progress=lambda *a: calls.append(a)
    )
    assert result == json.loads(json.dumps(result))
    assert (result["suite"], result["n"], result["seed"], result["emoji"]) == ("emoji", 82, 0, 40)
    assert result["overall"]["score"] == 1 and result["overall"]["n"] == 82
    assert tuple(result["categories"]) == CATEGORIES
    assert result["recall"]["at_1"]["overall"] == result["recall"]["at_5"]["overall"]
    assert result["recall"]["at_1"]["composed"]["n"] == 61
    assert [s.scene for s in samples] == eval_scenes(world, 82, 0)
    assert calls == [(32, 82), (64, 82), (82, 82)]


def test_noise_and_a_small_shift_are_forgiven(world):
    def change(scene, image, rng):
        shifted = np.roll(image, SHIFT, (0, 1)).astype(float) + rng.normal(0, 20, image.shape)
        return shifted.clip(0, 255).round().astype(np.uint8)

    result, _ = evaluate(artist(world, 80, change), 80, world=world)
    assert result["recall"]["at_1"]["overall"]["score"] > 0.95


def test_another_caption_is_refused(world):
    found = eval_scenes(world, 80, 0)
    images = [render(scene, world, np.random.default_rng(i)) for i, scene in enumerate(found)]
    verdicts = [verify(images[i - 4], scene, world) for i, scene in enumerate(found)]
    assert sum(v.ok for v in verdicts) <= 1
    assert sum(v.top1 for v in verdicts) <= 6  # chance is 1 in 40


def test_the_reason_says_what_is_seen(world):
    a, b, c = world.names[:3]
    rng = np.random.default_rng(0)
    pair = Scene("pair", (a, b), "left of", "white", f"{a} left of {b}")
    swapped = render(Scene("pair", (b, a), "left of", "white", ""), world, rng)
    verdict = verify(swapped, pair, world)
    assert (verdict.ok, verdict.top1, verdict.found) == (False, False, (b, a))
    assert verdict.reason == f"shows {b}, {a}"
    single = Scene("background", (c,), None, "blue", f"{c} on blue background")
    red = render(Scene("background", (c,), None, "red", ""), world, rng)
    assert verify(red, single, world).reason == "the background is red"
    assert verify(red, single, world).top1
    twice = Scene("count", (a, a), None, "white", f"{a} twice")
    three = render(Scene("count", (a, a, a), None, "white", ""), world, rng)
    assert not verify(three, twice, world).ok
    two = render(twice, world, rng)
    assert verify(two, twice, world).ok
    two[48:, :16] = 0  # something where nothing is asked for
    assert verify(two, twice, world).reason == "shows more than the caption says"


def test_distances_are_mean_squares_at_the_best_shift(world):
    rng = np.random.default_rng(1)
    part = rng.integers(0, 256, (32, 32, 3)).astype(np.float32)
    got = distances(part, "blue", world)
    ground = np.array(BACKGROUNDS["blue"], float)
    small = world.catalogue.small[7].astype(float)
    drawn = small[..., :3] * small[..., 3:] / 255 + ground * (1 - small[..., 3:] / 255)
    wide = np.full((36, 36, 3), ground)
    wide[2:34, 2:34] = part
    each = [
        ((wide[y : y + 32, x : x + 32] - drawn) ** 2).mean() for y in range(5) for x in range(5)
    ]
    assert got[7] == pytest.approx(min(each), rel=2e-2)  # pictures are rounded to whole values


def test_rates_count_what_they_say(world):
    def blank(scene, image, rng):
        return np.full_like(image, 255) if scene.category == "pair" else image

    _, samples = evaluate(artist(world, 40, blank), 40, world=world)
    found = scores(samples)
    assert [rate["score"] for rate in found["categories"].values()] == [1, 1, 0, 1]
    assert found["recall"]["at_1"]["composed"]["score"] == pytest.approx(2 / 3, abs=1e-3)
    assert found["overall"]["score"] == 0.75


def test_an_image_of_another_kind_is_refused(world):
    scene = eval_scenes(world, 1, 0)[0]
    with pytest.raises(ValueError, match=r"float64 \[64, 64, 3\], expected uint8"):
        verify(np.zeros((64, 64, 3)), scene, world)
    with pytest.raises(ValueError, match="32 x 32"):
        evaluate(lambda p, s: [Image.new("RGB", (32, 32))] * len(p), 4, world=world)


def test_the_grid_has_a_row_a_category(world, tmp_path):
    _, samples = evaluate(artist(world, 16), 16, world=world)
    save_grid(samples, tmp_path / "grid.png", per_category=3)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert ((sheet == (22, 150, 70)).all(-1)).sum() == 12 * (134**2 - 128**2)
    with pytest.raises(ValueError, match="at least one sample"):
        save_grid([], tmp_path / "none.png")
