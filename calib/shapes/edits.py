"""Edits of shapes scenes: which instructions exist, what is before and after, which are held out.

An edit recolours, moves, replaces or removes one thing of a scene and keeps the rest as it is. A
*content* is what an instruction says (kind, thing, what becomes of it); an instruction is one of
its two wordings. Held out for evaluation: a quarter of the contents by their hash, with all their
wordings, and everything that names or shows a held-out (colour, shape) pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from calib.shapes.render import BORDER_Q, Box, Placed, Q, apart, paint, places, related
from calib.shapes.world import (
    RELATIONS,
    Scene,
    Split,
    Thing,
    World,
    caption_split,
    heldout_pairs,
    noun,
    vocabulary,
)

KINDS = ("recolour", "move", "replace", "remove")
WORDINGS: dict[str, tuple[str, str]] = {
    "recolour": ("paint {thing} {colour}", "make {thing} {colour}"),
    "move": ("move {thing} {relation} {anchor}", "put {thing} {relation} {anchor}"),
    "replace": ("replace {thing} with {new}", "turn {thing} into {new}"),
    "remove": ("remove {thing}", "erase {thing}"),
}
# How many things a scene has before, and how often.
COUNTS = {1: 0.15, 2: 0.5, 3: 0.35}
# Before a move the relation does not hold, nor nearly: see render.py's limits of what does.
NEARLY_ALONG, NEARLY_ACROSS = 0.06, 1.25
MOVED_Q = 4 * Q  # a moved thing's centre goes at least this far along an axis


@dataclass(frozen=True)
class Content:
    """What an instruction says; `new`: what `thing` becomes, `anchor`: what it moves to."""

    kind: str
    thing: Thing
    new: Thing | None = None
    anchor: Thing | None = None
    relation: str | None = None

    @property
    def wordings(self) -> tuple[str, ...]:
        words = {
            "thing": f"the {self.thing.colour} {self.thing.shape}",
            "colour": self.new.colour if self.new else "",
            "new": noun(self.new) if self.new else "",
            "anchor": f"the {self.anchor.colour} {self.anchor.shape}" if self.anchor else "",
            "relation": self.relation or "",
        }
        return tuple(wording.format(**words) for wording in WORDINGS[self.kind])


@dataclass(frozen=True)
class Edit:
    """One task: the things before and after, in the same order, and the instruction.

    after[i] is None where thing i was removed; `changed` is the index of the thing that changes.
    """

    content: Content
    caption: str
    before: tuple[Placed, ...]
    after: tuple[Placed | None, ...]
    changed: int

    @property
    def category(self) -> str:
        return self.content.kind

    def images(self, world: World) -> tuple[np.ndarray, np.ndarray]:
        """Before and after, uint8 [S, S, 3] each."""
        pair = np.empty((2, world.size, world.size, 3), np.uint8)
        paint(pair[0], self.before)
        paint(pair[1], [placed for placed in self.after if placed])
        return pair[0], pair[1]


@cache
def contents(world: World, kind: str, split: Split) -> tuple[Content, ...]:
    """All contents of a kind and split. Raises ValueError for an unknown kind or split."""
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r} must be 'train' or 'eval'")
    things = [Thing(s, c) for c in world.colour_names for s in world.shape_names]
    if kind == "recolour":
        rows = [
            Content(kind, t, new=Thing(t.shape, c))
            for t in things
            for c in world.colour_names
            if c != t.colour
        ]
    elif kind == "move":
        rows = [
            Content(kind, t, anchor=a, relation=r)
            for t in things
            for a in things
            if a != t
            for r in RELATIONS
        ]
    elif kind == "replace":
        rows = [Content(kind, t, new=n) for t in things for n in things if n.shape != t.shape]
    elif kind == "remove":
        rows = [Content(kind, t) for t in things]
    else:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    return tuple(c for c in rows if content_split(world, c) == split)


def content_split(world: World, content: Content) -> Split:
    """The split of a content and of all its wordings."""
    named = (content.thing, content.new, content.anchor)
    if any(t and (t.colour, t.shape) in heldout_pairs(world) for t in named):
        return "eval"
    return caption_split(f"to {content.wordings[0]}")


def sample_edit(
    world: World, rng: np.random.Generator, split: Split, content: Content | None = None
) -> Edit:
    """A random edit: kind (uniform), content (uniform) where none is given, wording and scene."""
    if content is None:
        rows = contents(world, KINDS[rng.integers(len(KINDS))], split)
        content = rows[rng.integers(len(rows))]
    while True:  # a scene without room for what is moved is given up
        before = _before(world, rng, split, content)
        after = _after(world, rng, content, before)
        if after is not None:
            break
    # The thing that changes is any in drawing order: nothing can be read from its place.
    order = rng.permutation(len(before))
    return Edit(
        content=content,
        caption=content.wordings[rng.integers(2)],
        before=tuple(before[i] for i in order),
        after=tuple(after[i] for i in order),
        changed=int(np.flatnonzero(order == 0)[0]),
    )


def eval_edits(world: World, n: int, seed: int) -> list[Edit]:
    """n evaluation edits, interleaved by kind, every content once before any comes again.

    Fixed by the seed, and any beginning of the list is that of a longer one's where n is a multiple
    of 4. Raises ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1 evaluation edit")
    rngs = [np.random.default_rng([seed, i]) for i in range(len(KINDS))]
    queues: list[list[Content]] = [[] for _ in KINDS]
    edits = []
    for i in range(n):
        k = i % len(KINDS)
        if not queues[k]:
            rows = contents(world, KINDS[k], "eval")
            queues[k] = [rows[j] for j in rngs[k].permutation(len(rows))]
        edits.append(sample_edit(world, rngs[k], "eval", queues[k].pop()))
    return edits


def instruction_words() -> list[str]:
    """All words of captions and instructions, sorted: what a tokenizer of an editor knows."""
    extra = {w for pair in WORDINGS.values() for text in pair for w in text.split()}
    return sorted({*vocabulary(), "the", *(w for w in extra if "{" not in w)})


def _before(world: World, rng: np.random.Generator, split: Split, content: Content) -> list[Placed]:
    """The thing that changes, the one it moves to, then others; no two ever look the same."""
    named = [t for t in (content.thing, content.anchor) if t]
    count = int(rng.choice(list(COUNTS), p=list(COUNTS.values())))
    held = heldout_pairs(world) if split == "train" else frozenset()
    free = [
        Thing(s, c)
        for c in world.colour_names
        for s in world.shape_names
        if (c, s) not in held and Thing(s, c) not in (*named, content.new)
    ]
    others = rng.permutation(len(free))[: max(0, count - len(named))]
    things = (*named, *(free[i] for i in others))
    boxes = places(Scene("edit", things, None, ""), world, rng)
    return [(t.shape, str(t.colour), box) for t, box in zip(things, boxes, strict=True)]


def _after(
    world: World, rng: np.random.Generator, content: Content, before: Sequence[Placed]
) -> list[Placed | None] | None:
    """What is there afterwards; None where the move has no room or was made before."""
    (shape, colour, box), rest = before[0], list(before[1:])
    if content.kind == "remove":
        return [None, *rest]
    if content.new:
        return [(content.new.shape, str(content.new.colour), box), *rest]
    side, d, anchor = world.size * Q, box[2], rest[0][2]
    if _nearly(box, anchor, str(content.relation), side):
        return None
    room = side - 2 * BORDER_Q - d + 1
    for x, y in (BORDER_Q + rng.integers(room, size=(40, 2))).tolist():
        moved: Box = (x, y, d)
        far = max(abs(x - box[0]), abs(y - box[1])) >= MOVED_Q
        if (
            far
            and all(apart(moved, other) for _, _, other in rest)
            and related([moved, anchor], content.relation, side)
        ):
            return [(shape, colour, moved), *rest]
    return None


def _nearly(box: Box, anchor: Box, relation: str, side: int) -> bool:
    """Whether a judge might say that the relation holds: such a scene asks for no move."""
    right = anchor[0] + anchor[2] / 2 - box[0] - box[2] / 2
    down = anchor[1] + anchor[2] / 2 - box[1] - box[2] / 2
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    if relation in ("right of", "below"):
        along = -along
    return along >= NEARLY_ALONG * side and abs(across) <= NEARLY_ACROSS * along
