"""The editing teacher: what it learns from, and the committed one as it is kept."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from calib.shapes.world import World
from scripts.teacher.edits.difference import WEIGHTS, pack, packed, unpack, unpacked
from scripts.teacher.edits.subject import attributes, draw_edits, edits_subject, images

ROOT = Path(__file__).parents[3]


def test_a_difference_in_four_bits_is_off_by_half_a_level():
    difference = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    parts = packed(difference)
    assert parts["levels"].dtype == torch.uint8 and parts["levels"].shape == (6, 5)
    scale = parts["scale"].float()[:, None]
    error = (unpacked(**parts) - difference).abs()
    assert (error <= 0.5 * scale + 2e-3).all() and torch.all(scale < difference.abs().max() / 6)


def test_the_committed_teacher_is_whole_and_packs_to_itself(tmp_path):
    from diffusers import DiffusionPipeline

    unpack(tmp_path / "whole", ROOT / "models/shapes-edit", ROOT / "models/shapes-dense")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert type(pipe).__name__ == "FluxKontextPipeline"
    ids = pipe.tokenizer_2("replace the red circle with a blue square").input_ids
    assert len([i for i in ids if i > 2]) == 8  # a word is a token
    pack(tmp_path / "whole", tmp_path / "kept", ROOT / "models/shapes-dense")
    unpack(tmp_path / "again", tmp_path / "kept", ROOT / "models/shapes-dense")
    for part, file in WEIGHTS.items():
        first, second = (load_file(tmp_path / name / part / file) for name in ("whole", "again"))
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0.02, atol=2e-3)


def test_what_an_edit_says_and_shows():
    world = World()
    subject = edits_subject(world)
    edits = draw_edits(world, 40, 0)
    before, after = images(world, edits)
    assert before.shape == after.shape == (40, 3, 32, 32)
    assert not (before == after).flatten(1).all(1).any()
    labels = subject.labels(edits, 0)
    for edit, names in zip(edits, labels, strict=True):
        for value, classes in zip(attributes(edit), subject.classes, strict=True):
            assert 0 <= value < classes
        gone = replace(edit, after=(None,) * len(edit.after))
        shown = {tuple(row) for row in names.tolist()} - {
            tuple(row) for row in subject.labels([gone], 0)[0].tolist()
        }
        assert len(shown) == sum(placed is not None for placed in edit.after)
