"""The shapes suite: intervals, the result's form, reproducible prompts and seeds, the grid."""

import json

import numpy as np
import pytest
from PIL import Image

from calib.score.rates import wilson
from calib.shapes.render import render
from calib.shapes.suite import evaluate, save_grid, scores
from calib.shapes.world import CATEGORIES, World, eval_scenes


def artist(world: World, n: int, seed: int = 0, wrong: str | None = None):
    """A draw function that renders what is asked, and grey for the category `wrong`."""
    scenes = {scene.caption: scene for scene in eval_scenes(world, n, seed)}

    def draw(prompts, seeds):
        images = []
        for prompt, image_seed in zip(prompts, seeds, strict=True):
            scene = scenes[prompt]
            image = render(scene, world, np.random.default_rng(image_seed), "eval")
            if scene.category == wrong:
                image[...] = 128
            images.append(Image.fromarray(image))
        return images

    return draw


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 1, 0.2065, 1.0),
        (540, 600, 0.8734, 0.9215),
    ],
)
def test_wilson_against_known_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation_and_narrows_with_z():
    low, high = wilson(30, 80)
    for bound in (low, high):  # the score test's statistic is z at both ends
        assert abs(30 / 80 - bound) / (bound * (1 - bound) / 80) ** 0.5 == pytest.approx(1.959964)
    assert low < wilson(30, 80, z=1)[0] < 30 / 80 < wilson(30, 80, z=1)[1] < high


@pytest.mark.parametrize("successes, n", [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_no_proportion(successes, n):
    with pytest.raises(ValueError, match=f"{successes} of {n}"):
        wilson(successes, n)


def test_a_perfect_model_scores_one_and_the_result_is_json():
    world, calls = World(), []
    result, samples = evaluate(artist(world, 62), 62, batch=16, progress=lambda *a: calls.append(a))
    assert result == json.loads(json.dumps(result))
    assert set(result) == {"suite", "n", "seed", "overall", "categories", "images_per_second"}
    assert (result["suite"], result["n"], result["seed"]) == ("shapes", 62, 0)
    assert result["overall"] == {"score": 1.0, "low": 0.9417, "high": 1.0, "n": 62}
    assert tuple(result["categories"]) == CATEGORIES
    assert [rate["n"] for rate in result["categories"].values()] == [11, 11, 10, 10, 10, 10]
    assert [s.scene for s in samples] == eval_scenes(world, 62, 0)
    assert calls == [(16, 62), (32, 62), (48, 62), (62, 62)]


def test_a_category_that_fails_shows_in_its_score_alone():
    result, samples = evaluate(artist(World(), 60, wrong="counting"), 60)
    found = {name: rate["score"] for name, rate in result["categories"].items()}
    assert found == {name: float(name != "counting") for name in CATEGORIES}
    assert result["overall"]["score"] == pytest.approx(5 / 6, abs=1e-4)
    assert {s.verdict.reason.split(",")[0] for s in samples if not s.verdict.ok} == {"0 objects"}


def test_prompts_and_seeds_do_not_depend_on_the_batch_and_seeds_do_not_repeat():
    seen: dict[int, list] = {}

    def recorder(batch):
        draw = artist(World(), 30, seed=2)

        def record(prompts, seeds):
            assert len(prompts) <= batch
            seen.setdefault(batch, []).extend(zip(prompts, seeds))
            return draw(prompts, seeds)

        return record

    results = [evaluate(recorder(batch), 30, seed=2, batch=batch)[0] for batch in (1, 7, 64)]
    assert seen[1] == seen[7] == seen[64]
    assert len({image_seed for _, image_seed in seen[1]}) == 30
    assert results[0]["categories"] == results[1]["categories"] == results[2]["categories"]


def test_speed_counts_the_drawing_alone(monkeypatch):
    draw, now = artist(World(), 12), [100.0]
    monkeypatch.setattr("calib.score.loop.time.perf_counter", lambda: now[0])

    def slow(prompts, seeds):
        now[0] += 2
        return draw(prompts, seeds)

    def elsewhere(done, n):
        now[0] += 50

    result, _ = evaluate(slow, 12, batch=6, progress=elsewhere)
    assert result["images_per_second"] == 12 / 4


def test_another_world_is_evaluated_at_its_size():
    world = World(size=64, colours=10, shapes=6, max_count=6)
    result, samples = evaluate(artist(world, 18), 18, world=world)
    assert result["overall"]["score"] == 1 and samples[0].image.shape == (64, 64, 3)


def test_bad_drawings_are_refused():
    with pytest.raises(ValueError, match="1 images for 16 prompts"):
        evaluate(lambda prompts, seeds: [Image.new("RGB", (32, 32))], 60)
    with pytest.raises(ValueError, match="64 x 64.*32 x 32.*size=64"):
        evaluate(lambda prompts, seeds: [Image.new("RGB", (64, 64))] * len(prompts), 60)
    with pytest.raises(ValueError, match="batch=0"):
        evaluate(artist(World(), 6), 6, batch=0)
    with pytest.raises(ValueError, match="n=0"):
        evaluate(artist(World(), 6), 0)
    with pytest.raises(ValueError, match="at least one sample"):
        save_grid([], "nowhere.png")


def test_grid_shows_images_enlarged_with_green_and_red_borders(tmp_path):
    _, samples = evaluate(artist(World(), 60, wrong="position"), 60)
    path = tmp_path / "new folder" / "grid.png"
    save_grid(samples, path)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]  # no temporary file left
    sheet = np.asarray(Image.open(path))
    green, red = ((sheet == colour).all(-1) for colour in ((22, 150, 70), (205, 40, 40)))
    # Seven images a row, each with a filled box of 134 px around 128 px: 1572 border pixels.
    assert green.sum() == 5 * 7 * (134**2 - 128**2)
    assert red.sum() >= 7 * (134**2 - 128**2)  # and the reasons in red letters
    rows, columns = np.nonzero(green)
    image = sheet[rows[0] + 3 :, columns[0] + 3 :][:128, :128]
    assert (image == samples[0].image.repeat(4, 0).repeat(4, 1)).all()
    only = [s for s in samples if s.scene.category == "counting"]
    save_grid(only[:2], path, per_category=7)  # overwrites; rows and columns only as needed
    assert Image.open(path).height < sheet.shape[0] / 3


def test_a_failed_write_leaves_the_old_grid(tmp_path, monkeypatch):
    _, samples = evaluate(artist(World(), 6), 6)
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def fail(self, file, format):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_grid(samples, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_scores_of_nothing_are_refused():
    with pytest.raises(ValueError):
        scores([])
