"""What the editor learns: instructions, the images before and after, what both say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calib.shapes.edits import KINDS, Edit, instruction_words, sample_edit
from calib.shapes.world import COLOURS, RELATIONS, SHAPES, World
from scripts.teacher.scenes import patch_names, shapes_subject
from scripts.teacher.subject import Subject

# Kind, thing's shape and colour, the other's shape and colour, relation; the last of each: none.
ATTRIBUTES = (
    len(KINDS) + 1,
    len(SHAPES) + 1,
    len(COLOURS) + 1,
    len(SHAPES) + 1,
    len(COLOURS) + 1,
    len(RELATIONS) + 1,
)


def edits_subject(world: World) -> Subject:
    """The shapes subject with edits as its scenes; `pictures` are those afterwards."""
    shapes = shapes_subject(world)

    def pictures(edits: Sequence[Edit], seed: int) -> tuple[Tensor, Tensor]:
        return images(world, edits)[1], torch.arange(len(edits))

    return dataclasses.replace(
        shapes,
        name="shapes-edit",
        words=instruction_words(),
        draw=lambda n, seed: draw_edits(world, n, seed),
        pictures=pictures,
        classes=ATTRIBUTES,
        attributes=attributes,
        token_classes=ATTRIBUTES,
        tokens=lambda edit: [attributes(edit)] * shapes.length,
        labels=lambda edits, seed: patch_names(world, [[p for p in e.after if p] for e in edits]),
    )


def draw_edits(world: World, n: int, seed: int) -> list[Edit]:
    """`n` edits of the training split."""
    rng = np.random.default_rng(seed)
    return [sample_edit(world, rng, "train") for _ in range(n)]


def images(world: World, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """Before and after, uint8 [N, 3, S, S] each."""
    pairs = [edit.images(world) for edit in edits]
    before, after = (
        torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous() for rows in zip(*pairs)
    )
    return before, after


def attributes(edit: Edit | None) -> list[int]:
    """Classes of kind, the thing, the other one (what it becomes or moves to) and the relation."""
    if edit is None:
        return [n - 1 for n in ATTRIBUTES]
    content = edit.content
    shapes, colours = list(SHAPES), list(COLOURS)
    other = content.new or content.anchor
    return [
        KINDS.index(content.kind),
        shapes.index(content.thing.shape),
        colours.index(str(content.thing.colour)),
        shapes.index(other.shape) if other else len(shapes),
        colours.index(str(other.colour)) if other else len(colours),
        RELATIONS.index(content.relation) if content.relation else len(RELATIONS),
    ]
