"""The emoji world as the teacher's stages see it, and a teacher of it in a few steps."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch

from calib.emoji.render import render_batch
from calib.emoji.world import World
from scripts.teacher.emoji import GRID, PARTS, emoji_subject
from scripts.teacher.text import make_tokenizers, tokenise
from tests.tiny.emoji import make_art


@pytest.fixture(scope="module")
def art(tmp_path_factory) -> Path:
    return make_art(tmp_path_factory.mktemp("art") / "art", 12)


@pytest.fixture(scope="module")
def subject(art):
    return emoji_subject(World(folder=art))


def test_every_image_is_drawn_once_and_found_again(art, subject):
    scenes = subject.draw(300, 5)
    images, rows = subject.pictures(scenes, 5)
    assert len(images) < len(scenes) == len(rows) and len(set(rows.tolist())) == len(images)
    plain = render_batch(scenes, World(folder=art), np.random.default_rng(6))
    assert (images[rows].permute(0, 2, 3, 1).numpy() == plain).all()


def test_patches_are_named_by_what_stands_there(subject):
    scenes = subject.draw(200, 5)
    images, rows = subject.pictures(scenes, 5)
    labels = subject.labels(scenes, 5)
    nothing = subject.label_classes[0] - 1
    assert labels.shape == (200, GRID * GRID, 2) and subject.label_classes[1] == PARTS
    for scene, image, named in zip(scenes, images[rows], labels, strict=True):
        patches = image.unfold(1, 16, 16).unfold(2, 16, 16)  # [3, 4, 4, 16, 16]
        empty = (named[:, 0] == nothing).view(GRID, GRID)
        assert (named[:, 1] == PARTS - 1).view(GRID, GRID).equal(empty)
        assert (patches[:, empty] == 255).all()  # compositions stand on white
        assert int((~empty).sum()) == (16 if len(scene.things) == 1 else 4 * len(scene.things))
        if len(scene.things) > 1:
            cells = named[~empty.flatten()]
            parts = cells[:, 1].reshape(-1).sort().values.tolist()
            assert parts == sorted([16, 17, 18, 19] * len(scene.things))


def test_every_caption_fits_and_has_its_own_tokens(subject):
    captions = sorted({scene.caption for scene in subject.draw(2000, 1)})
    tokenizers = make_tokenizers(subject)
    clip, t5 = tokenise(tokenizers, captions)
    assert clip.shape == t5.shape == (len(captions), subject.length)
    for ids in (clip, t5):
        assert len({tuple(row) for row in ids.tolist()}) == len(captions)
    longest = max(len(tokenizer(c).input_ids) for tokenizer in tokenizers for c in captions)
    assert longest <= subject.length
    unknown = tokenizers[1].unk_token_id
    assert not (t5 == unknown).any()


def test_what_a_caption_says_is_within_its_classes(subject):
    rows = torch.tensor([subject.attributes(s) for s in [*subject.draw(400, 2), None]])
    assert (rows >= 0).all() and (rows < torch.tensor(subject.classes)).all()
    assert (rows[-1] == torch.tensor(subject.classes) - 1).all()
    assert not (rows[:-1] == rows[-1]).all(1).any()


def test_a_pairs_words_tell_of_the_emoji_they_name_and_of_its_place(subject):
    scenes = subject.draw(400, 2)
    rows = torch.tensor([subject.tokens(s) for s in [*scenes, None]])
    assert rows.shape == (401, subject.length, len(subject.token_classes))
    assert (rows >= 0).all() and (rows < torch.tensor(subject.token_classes)).all()
    places = {("left of", 0): 1, ("left of", 1): 2, ("right of", 0): 2, ("right of", 1): 1}
    places |= {("above", 0): 3, ("above", 1): 4, ("below", 0): 4, ("below", 1): 3}
    names = sorted({name for scene in scenes for name in scene.things})
    number = {}  # of every emoji, the same whichever word says it
    for scene, said in zip(scenes, rows):
        words = scene.caption.split()
        for order, name in enumerate(dict.fromkeys(scene.things)):
            last = name.split()[-1]
            at = words.index(last) if order == 0 else len(words) - 1
            emoji, place = said[at, :2].tolist()
            assert number.setdefault(name, emoji) == emoji
            assert place == places.get((scene.relation, order), 0)
    assert len(set(number.values())) == len(names)


@pytest.mark.slow
def test_a_teacher_in_a_few_steps_and_one_that_goes_on_from_it(art, tmp_path, monkeypatch):
    from diffusers import FluxPipeline

    from scripts.teacher.__main__ import main

    monkeypatch.setenv("D2M_EMOJI", str(art))
    few = "--world emoji --device cpu --no-compile --scenes 30 --batch 2 --lr 0.05 --until flow"
    counts = "--vae-steps 1 --text-steps 2 --flow-steps 2".split()

    def teach(work: Path, *more: str) -> Path:
        arguments = ["teacher", *few.split(), *counts, "--work", str(work), *more]
        monkeypatch.setattr(sys, "argv", arguments)
        main()
        return work / "snapshot"

    first = teach(tmp_path / "first")
    pipe = FluxPipeline.from_pretrained(first, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    defaults = json.loads((first / "defaults.json").read_text())
    assert defaults["guidance_scale"] == 1.0 and defaults["height"] == 64
    config = pipe.transformer.config
    assert (config.num_layers, config.num_single_layers, config.in_channels) == (6, 6, 64)
    options = defaults | {"num_inference_steps": 2, "output_type": "np"}
    [image] = pipe("draw glyph aaa", **options).images
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()

    again = teach(tmp_path / "again", "--init", str(first), "--keep-text")
    second = FluxPipeline.from_pretrained(again, local_files_only=True)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        parts = zip(getattr(pipe, name).parameters(), getattr(second, name).parameters())
        assert all(torch.equal(a, b) for a, b in parts), name
    moved = zip(pipe.transformer.parameters(), second.transformer.parameters())
    assert not all(torch.equal(a, b) for a, b in moved)
