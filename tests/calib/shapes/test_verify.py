"""The verifier: all of the ground truth passes, nearly nothing else does."""

import numpy as np
import pytest

from calib.shapes.render import render, render_batch
from calib.shapes.verify import components, find_objects, verify
from calib.shapes.world import BACKGROUND, CATEGORIES, COLOURS, Scene, Thing, World, sample_scene

HARD = World(size=32, colours=10, shapes=6, max_count=6)
HARD_64 = World(size=64, colours=10, shapes=6, max_count=6)


def softened(image: np.ndarray) -> np.ndarray:
    """A Gaussian blur of about 0.6 px, float [S, S, 3]: kernel (.15, .7, .15) both ways."""
    for axis in (0, 1):
        edge = np.pad(
            image.astype(float), [(1, 1) if a == axis else (0, 0) for a in range(3)], "edge"
        )
        lower, upper = (np.take(edge, range(k, k + image.shape[0]), axis) for k in (0, 2))
        image = 0.7 * image + 0.15 * (lower + upper)
    return image


def degraded(image: np.ndarray, rng: np.random.Generator, blur: bool) -> np.ndarray:
    """With noise of sigma 4/255 and perhaps blur, as a VAE of about 32 dB leaves it."""
    noisy = (softened(image) if blur else image) + rng.normal(0, 4, image.shape)
    return noisy.clip(0, 255).round().astype(np.uint8)


def painted(region, colour=(0, 0, 0), size: int = 32) -> np.ndarray:
    """An anti-aliased picture of {(u, v): region(u, v)}, u and v in pixels from the centre."""
    grid = (np.arange(size * 8) + 0.5) / 8 - size / 2
    inside = region(grid[None, :], grid[:, None]) & np.ones((size * 8, size * 8), bool)
    alpha = inside.reshape(size, 8, size, 8).mean((1, 3))[..., None]
    mixed = alpha * np.array(colour) + (1 - alpha) * np.array(BACKGROUND)
    return mixed.round().astype(np.uint8)


def content(scene: Scene):
    """What the caption says, either way round: "a left of b" is "b right of a"."""
    things = tuple((t.shape, t.colour) for t in scene.things)
    turned = {"right of": "left of", "below": "above"}.get(scene.relation)
    if turned:
        return scene.category, turned, things[::-1]
    return (
        scene.category,
        scene.relation,
        things if scene.relation else tuple(sorted(things, key=str)),
    )


def test_ground_truth_scores_one_over_5000_scenes():
    world, rng = World(), np.random.default_rng(0)
    for split in ("train", "eval"):
        scenes = [sample_scene(world, rng, split) for _ in range(2500)]
        images = render_batch(scenes, world, rng, split)
        failed = [
            (s.caption, v.reason)
            for s, i in zip(scenes, images)
            if not (v := verify(i, s, world)).ok
        ]
        assert not failed


@pytest.mark.parametrize("world, n", [(World(64), 120), (HARD, 400), (HARD_64, 180)])
def test_ground_truth_of_harder_worlds_scores_one(world, n):
    rng = np.random.default_rng(1)
    for i in range(n):
        scene = sample_scene(world, rng, "eval", CATEGORIES[i % 6])
        verdict = verify(render(scene, world, rng, "eval"), scene, world)
        assert verdict.ok, (scene.caption, verdict)


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("world, n", [(World(), 500), (HARD_64, 80)])
def test_noise_and_blur_of_a_vae_are_tolerated(world, n, blur):
    rng = np.random.default_rng(2)
    scenes = [sample_scene(world, rng, "eval") for _ in range(n)]
    clean = render_batch(scenes, world, rng, "eval")
    images = [degraded(image, rng, blur) for image in clean]
    error = np.mean((clean.astype(float) - images) ** 2)
    assert 10 * np.log10(255**2 / error) < (34.5 if blur else 37)  # it is a real degradation
    assert np.mean([verify(i, s, world).ok for s, i in zip(scenes, images)]) >= 0.998


def test_captions_of_other_content_fail_within_the_category():
    world, rng = World(), np.random.default_rng(3)
    for category in CATEGORIES:
        passed = total = 0
        while total < 80:
            a, b = (sample_scene(world, rng, "eval", category) for _ in range(2))
            if content(a) != content(b):
                passed += verify(render(a, world, rng, "eval"), b, world).ok
                total += 1
        assert passed == 0, category


def test_captions_of_another_category_mostly_fail():
    # Some pass rightly: the image of "a red circle" shows "a circle".
    world, rng = World(), np.random.default_rng(4)
    passed = []
    while len(passed) < 600:
        a, b = (sample_scene(world, rng, "eval") for _ in range(2))
        if a.category != b.category:
            passed.append(verify(render(a, world, rng, "eval"), b, world).ok)
    assert np.mean(passed) < 0.1


@pytest.mark.parametrize(
    "caption_things, relation, reason",
    [
        ([("circle", "red"), ("square", "blue")], None, "ok"),
        ([("square", "blue"), ("circle", "red")], None, "ok"),
        ([("circle", None), ("square", None)], None, "ok"),
        ([("circle", "blue"), ("square", "red")], None, "no blue circle"),
        ([("circle", "red"), ("square", "green")], None, "no green square"),
        (
            [("circle", None), ("triangle", None)],
            None,
            "1 circle, 1 square, expected 1 circle, 1 triangle",
        ),
        ([("circle", "red")], None, "2 objects, expected 1"),
        ([("circle", None)] * 3, None, "2 objects, expected 3"),
        ([("circle", None), ("square", None)], "left of", "ok"),
        ([("square", None), ("circle", None)], "right of", "ok"),
        ([("circle", None), ("square", None)], "right of", "the circle is not right of the square"),
        ([("circle", None), ("square", None)], "above", "the circle is not above the square"),
        ([("square", None), ("circle", None)], "left of", "the square is not left of the circle"),
    ],
)
def test_verdict_on_a_red_circle_left_of_a_blue_square(caption_things, relation, reason):
    image = painted(lambda u, v: (u + 8) ** 2 + v * v <= 25, (210, 25, 25))
    square = painted(lambda u, v: (abs(u - 8) <= 5) & (abs(v - 2) <= 5), (30, 50, 230))
    image[:, 16:] = square[:, 16:]
    scene = Scene("", tuple(Thing(*t) for t in caption_things), relation, "")
    verdict = verify(image, scene, World())
    assert (verdict.ok, verdict.reason) == (reason == "ok", reason)
    assert [(f.shape, f.colour) for f in verdict.found] == [("circle", "red"), ("square", "blue")]
    assert abs(verdict.found[0].x - 7.5) < 0.1 and abs(verdict.found[1].y - 17.5) < 0.1
    assert abs(verdict.found[1].size - 10) < 0.2


@pytest.mark.parametrize(
    "name, region",
    [
        ("3:2 ellipse", lambda u, v: (u / 7.5) ** 2 + (v / 5) ** 2 <= 1),
        ("2:1 rectangle", lambda u, v: (abs(u) <= 8) & (abs(v) <= 4)),
        ("half circle", lambda u, v: (u * u + v * v <= 49) & (v >= 0)),
        ("circle with a bite", lambda u, v: (u * u + v * v <= 49) & ~((u > 0) & (v > 0))),
        ("L", lambda u, v: (abs(u) <= 6) & (abs(v) <= 6) & ~((u > 0) & (v < 0))),
        ("T", lambda u, v: (abs(u) <= 6) & (abs(v + 4) <= 2) | (abs(u) <= 2) & (abs(v) <= 6)),
        ("triangle on its tip", lambda u, v: (abs(v) <= 6) & (abs(u) <= (6 - v) / 2)),
        ("two touching circles", lambda u, v: (abs(u) - 5) ** 2 + v * v <= 25),
        ("saltire", lambda u, v: (np.minimum(abs(u + v), abs(u - v)) <= 3) & (u * u + v * v < 50)),
        (
            "thin cross",
            lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.8) & (abs(u) <= 6) & (abs(v) <= 6),
        ),
        ("tiny circle", lambda u, v: u * u + v * v <= 2**2),
        ("huge circle", lambda u, v: u * u + v * v <= 12**2),
    ],
)
def test_what_is_no_clear_shape_is_unclear(name, region):
    (found,) = find_objects(painted(region), World())
    assert (found.shape, found.colour) == ("?", "black"), found


@pytest.mark.parametrize(
    "shape, region",
    [
        ("circle", lambda u, v: u * u + v * v <= 36),
        ("square", lambda u, v: (abs(u) <= 5) & (abs(v) <= 5)),
        ("triangle", lambda u, v: (abs(v) <= 5.2) & (abs(u) <= (v + 5.2) * 0.577)),
        ("cross", lambda u, v: (np.minimum(abs(u), abs(v)) <= 2) & (abs(u) <= 6) & (abs(v) <= 6)),
        ("diamond", lambda u, v: abs(u) + abs(v) <= 6),
        ("ring", lambda u, v: (u * u + v * v <= 36) & (u * u + v * v >= 9)),
    ],
)
def test_shapes_are_known_by_their_definition(shape, region):
    # In the default world too: a diamond is no circle where nobody draws diamonds.
    for colour, rgb in (("black", (0, 0, 0)), ("yellow", (250, 230, 40))):
        (found,) = find_objects(painted(region, rgb), World())
        assert (found.shape, found.colour) == (shape, colour) and found.iou > 0.9


@pytest.mark.parametrize("colour", [(230, 130, 110), (90, 90, 90), (190, 190, 190), (255, 140, 0)])
def test_a_thing_of_no_known_colour_counts_as_a_thing(colour):
    image = painted(lambda u, v: (u + 8) ** 2 + v * v <= 25, (210, 25, 25))
    scene = Scene("colours", (Thing("circle", "red"),), None, "a red circle")
    assert verify(image, scene, World()).ok
    image[:, 16:] = painted(lambda u, v: (u - 8) ** 2 + v * v <= 20, colour)[:, 16:]
    verdict = verify(image, scene, World())
    assert not verdict.ok and "unclear" in verdict.reason and len(verdict.found) == 2


@pytest.mark.parametrize("second", ["blue", "black"])  # black alone keeps the shape: see MAX_IMPURE
@pytest.mark.parametrize("cut", [16, 18])
def test_a_thing_of_two_colours_is_unclear(second, cut):
    def circle(u, v):
        return u * u + v * v <= 36

    image = painted(circle, COLOURS["red"])
    image[:, cut:] = painted(circle, COLOURS[second])[:, cut:]
    assert all("?" in (f.shape, f.colour) for f in find_objects(image, World()))


@pytest.mark.parametrize("down, ok", [(7, True), (11, False), (14, False)])
def test_a_relation_must_dominate_the_other_axis(down, ok):
    # The square is 10 px right of the circle and `down` px below it.
    image = painted(lambda u, v: (u + 5) ** 2 + (v + 7) ** 2 <= 16, COLOURS["red"])
    square = painted(lambda u, v: (abs(u - 5) <= 4) & (abs(v + 7 - down) <= 4), COLOURS["blue"])
    image[:, 16:] = square[:, 16:]
    scene = Scene("position", (Thing("circle"), Thing("square")), "left of", "")
    verdict = verify(image, scene, World())
    assert len(verdict.found) == 2 and verdict.ok is ok
    above = Scene("position", scene.things, "above", "")
    assert verify(image, above, World()).ok is not ok


def test_specks_and_another_background_do_not_matter():
    image = painted(lambda u, v: u * u + v * v <= 36, (210, 25, 25)).astype(int)
    image[2:4, 2:4] = 255
    image = np.where((image == 128).all(-1, keepdims=True), 140, image).astype(np.uint8)
    scene = Scene("colours", (Thing("circle", "red"),), None, "a red circle")
    assert verify(image, scene, World()).ok


def test_any_image_gets_a_verdict():
    rng = np.random.default_rng(0)
    scene = sample_scene(World(), rng, "eval")
    images = [np.full((32, 32, 3), value, np.uint8) for value in (0, 128, 255)]
    images += [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(20)]
    images += [
        np.repeat(rng.integers(0, 256, (32, 32, 1), dtype=np.uint8), 3, -1) for _ in range(20)
    ]
    images += [
        rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(20)
    ]
    assert not any(verify(image, scene, World()).ok for image in images)
    empty = verify(images[1], scene, World())
    assert empty.found == () and empty.reason.startswith("0 objects")


def test_components_are_4_connected_and_counted():
    mask = np.array([[1, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0]], bool)
    labels, areas = components(mask)
    assert labels.tolist() == [[1, 1, 0, 2], [0, 1, 0, 2], [3, 0, 4, 0]]
    assert areas == [3, 2, 1, 1]
    assert components(np.zeros((3, 3), bool))[1] == []


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64, 3), np.uint8), np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3))]
)
def test_an_image_of_another_kind_is_refused(image):
    with pytest.raises(ValueError, match=r"expected uint8 \[32, 32, 3\]"):
        verify(image, sample_scene(World(), np.random.default_rng(0), "eval"), World())
