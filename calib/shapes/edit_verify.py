"""Whether an edited image shows what its instruction asks and keeps the rest.

Written from the image before and the instruction alone: where the drawn things stand afterwards is
not looked at. Everything that was found in the image before must be found again, at its place, in
its colour, shape and size, but for the thing that the instruction names; and nothing else.
"""

from __future__ import annotations

import numpy as np

from calib.shapes.edits import Edit
from calib.shapes.verify import DetectedObject, Verdict, find_objects, relation_holds
from calib.shapes.world import Thing, World

KEPT = 0.09  # how far a thing that stays may be from its place, as a share of the image's side
SWAPPED = 0.14  # likewise what stands in its place: a triangle's centroid is not its box's middle
SIZES = (0.7, 1.4)  # its size, as a share of what it was


def verify_edit(image: np.ndarray, before: np.ndarray, edit: Edit, world: World) -> Verdict:
    """Judge an edited image; both uint8 [S, S, 3]. Raises ValueError for another shape or dtype,
    and where the image before does not hold the thing that is to change."""
    found = find_objects(image, world)
    reason = _difference(list(found), find_objects(before, world), edit, world)
    return Verdict(reason is None, reason or "ok", found)


def _difference(
    found: list[DetectedObject], before: tuple[DetectedObject, ...], edit: Edit, world: World
) -> str | None:
    """What is wrong; None if nothing is. Empties `found` on its way."""
    content = edit.content
    target = next((b for b in before if _is(b, content.thing)), None)
    if target is None:
        raise ValueError(f"the image before shows no {_words(content.thing)}")
    unclear = [f for f in found if "?" in (f.shape, f.colour)]
    if unclear:
        return f"an unclear object at ({unclear[0].x:.0f}, {unclear[0].y:.0f})"
    for kept in before:
        if kept is target:
            continue
        thing = Thing(kept.shape, kept.colour)
        same = next((f for f in found if _is(f, thing) and _near(f, kept, KEPT, world)), None)
        if same is None:
            return f"the {_words(thing)} is not kept"
        found.remove(same)
    if content.kind == "remove":
        return f"{_listed(found)} left, expected nothing" if found else None
    wanted = content.new or content.thing
    if len(found) != 1 or not _is(found[0], wanted):
        return f"{_listed(found) or 'nothing'} in its place, expected a {_words(wanted)}"
    if content.kind != "move":
        reach = KEPT if content.kind == "recolour" else SWAPPED
        place = _near(found[0], target, reach, world)
        return None if place else f"the {_words(wanted)} is not at the place of the old one"
    if not SIZES[0] <= found[0].size / target.size <= SIZES[1]:
        return f"the {_words(wanted)} has another size"
    anchor = next(b for b in before if content.anchor and _is(b, content.anchor))
    if not relation_holds(found[0], anchor, str(content.relation), world):
        return f"the {found[0].shape} is not {content.relation} the {anchor.shape}"
    return None


def _is(found: DetectedObject, thing: Thing) -> bool:
    return (found.shape, found.colour) == (thing.shape, thing.colour)


def _near(one: DetectedObject, other: DetectedObject, share: float, world: World) -> bool:
    """At the same place and of the same size."""
    distance = max(abs(one.x - other.x), abs(one.y - other.y))
    return distance <= share * world.size and SIZES[0] <= one.size / other.size <= SIZES[1]


def _words(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _listed(found: list[DetectedObject]) -> str:
    return ", ".join(f"{f.colour} {f.shape}" for f in found)
