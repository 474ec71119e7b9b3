"""Edits of shapes: what is asked is what is judged, and nothing held out is trained on."""

import json

import numpy as np
import pytest
from PIL import Image

from calib.shapes.edit_suite import evaluate, save_grid
from calib.shapes.edit_verify import verify_edit
from calib.shapes.edits import KINDS, contents, eval_edits, instruction_words, sample_edit
from calib.shapes.render import paint
from calib.shapes.world import World, heldout_pairs

WORLD = World()


def test_truth_passes_and_what_was_not_edited_does_not():
    edits = eval_edits(WORLD, 80, 0)
    assert [edit.category for edit in edits[:4]] == list(KINDS)
    for edit in edits:
        before, after = edit.images(WORLD)
        assert verify_edit(after, before, edit, WORLD).ok, edit.caption
        assert not verify_edit(before, before, edit, WORLD).ok, edit.caption


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_to_be_wrong_is_seen(kind):
    """A thing that was to stay is gone, has moved or another colour; one too many is there."""
    rng, seen = np.random.default_rng(1), set()
    rows = [sample_edit(WORLD, rng, "eval", contents(WORLD, kind, "eval")[0]) for _ in range(60)]
    for edit in (edit for edit in rows if len(edit.before) == 3):
        after = [placed for placed in edit.after if placed]
        kept = next(p for i, p in enumerate(edit.before) if i != edit.changed)
        shape, colour, (x, y, d) = kept
        other = next(c for c in WORLD.colour_names if all(c != p[1] for p in edit.before))
        rest = [placed for placed in after if placed != kept]
        far = (4 if x > 64 else 128 - 4 - d, 4 if y > 64 else 128 - 4 - d, d)
        for name, things in (
            ("gone", rest),
            ("recoloured", [*rest, (shape, other, (x, y, d))]),
            ("elsewhere", [*rest, (shape, colour, far)]),
        ):
            wrong = np.empty((32, 32, 3), np.uint8)
            paint(wrong, things)
            verdict = verify_edit(wrong, edit.images(WORLD)[0], edit, WORLD)
            assert not verdict.ok, (name, edit.caption)
            seen.add(name)
    assert seen == {"gone", "recoloured", "elsewhere"}


def test_training_sees_nothing_that_is_held_out():
    held = {each for kind in KINDS for each in contents(WORLD, kind, "eval")}
    known = {each for kind in KINDS for each in contents(WORLD, kind, "train")}
    assert not held & known and all(len(contents(WORLD, kind, "train")) > 10 for kind in KINDS)
    rng, pairs = np.random.default_rng(0), heldout_pairs(WORLD)
    for _ in range(300):
        edit = sample_edit(WORLD, rng, "train")
        shown = [*edit.before, *(placed for placed in edit.after if placed)]
        assert edit.content in known and not {(c, s) for s, c, _ in shown} & pairs
        assert set(edit.caption.split()) <= set(instruction_words())
    assert {edit.content for edit in eval_edits(WORLD, 100, 3)} <= held


def test_a_perfect_editor_scores_one_and_the_grid_shows_both_images(tmp_path):
    edits = {}

    def edited(prompts, seeds, images):
        for prompt, image in zip(prompts, images, strict=True):
            edit = edits[seeds[prompts.index(prompt)]]
            assert np.array_equal(np.asarray(image), edit.images(WORLD)[0])
        return [Image.fromarray(edits[seed].images(WORLD)[1]) for seed in seeds]

    edits |= {2_000_000 + i: edit for i, edit in enumerate(eval_edits(WORLD, 22, 2))}
    result, samples = evaluate(edited, 22, 2, batch=8)
    assert result["overall"]["score"] == 1 and result == json.loads(json.dumps(result))
    assert [rate["n"] for rate in result["categories"].values()] == [6, 6, 5, 5]
    save_grid(samples, tmp_path / "grid.png", 2)
    with Image.open(tmp_path / "grid.png") as grid:
        colours = {colour for _, colour in grid.convert("RGB").getcolors(1 << 20)}
    assert (128, 128, 128) in colours and (22, 150, 70) in colours
    unedited, _ = evaluate(lambda prompts, seeds, images: images, 22, 2)
    assert unedited["overall"]["score"] == 0
