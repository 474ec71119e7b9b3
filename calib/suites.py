"""The worlds by name: what `--data`, `--suite` and the scripts need of each.

shapes   coloured shapes of 32 pixels and more, judged exactly
shapes-edit   edits of shapes: recolour, move, replace, remove one and keep the rest
emoji    1,000 pictures of 64 pixels, judged by the nearest of all
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

NAMES = ("shapes", "shapes-edit", "emoji")


@dataclass(frozen=True)
class Suite:
    """One world.

    pixels: of the default world's images.
    world(pixels, settings): the world for images of that size, other numbers by name, ValueError
    where there is none; settings: those names. evaluate, save_grid: as `calib.shapes.suite` has
    them. batches(pipeline, seed): training batches. prompts(count): captions of evaluation.
    categories: what a batch's `category` counts. edits: `generate` is given an image a prompt.
    """

    name: str
    pixels: int
    world: Callable[[int, Mapping[str, int]], Any]
    settings: tuple[str, ...]
    evaluate: Callable[..., tuple[dict[str, Any], list[Any]]]
    save_grid: Callable[..., None]
    batches: Callable[[Any, int], Any]
    prompts: Callable[[int], list[str]]
    categories: tuple[str, ...]
    edits: bool = False


def suite_named(name: str) -> Suite:
    """The suite of a name; ValueError names the known ones."""
    if name not in NAMES:
        raise ValueError(f"--suite is {name!r}, expected one of {', '.join(NAMES)}")
    return {"shapes": _shapes, "shapes-edit": _shapes_edit, "emoji": _emoji}[name]()


def _shapes() -> Suite:
    from calib.shapes import batches, suite, world

    return Suite(
        name="shapes",
        pixels=world.World().size,
        world=lambda pixels, more: world.World(**{**more, "size": pixels}),
        settings=tuple(field.name for field in fields(world.World)),
        evaluate=suite.evaluate,
        save_grid=suite.save_grid,
        batches=lambda pipe, seed: batches.shapes_batches(pipe, seed=seed),
        prompts=lambda n: [s.caption for s in world.eval_scenes(world.World(), n, 0)],
        categories=world.CATEGORIES,
    )


def _shapes_edit() -> Suite:
    from calib.shapes import edit_batches, edit_suite, edits, world

    return dataclasses.replace(
        _shapes(),
        name="shapes-edit",
        evaluate=edit_suite.evaluate,
        save_grid=edit_suite.save_grid,
        batches=lambda pipe, seed: edit_batches.edit_batches(pipe, seed=seed),
        prompts=lambda n: [e.caption for e in edits.eval_edits(world.World(), n, 0)],
        categories=edits.KINDS,
        edits=True,
    )


def _emoji() -> Suite:
    from calib.emoji import batches, suite, world

    def sized(pixels: int, more: Mapping[str, int]) -> world.World:
        found = world.World(**dict[str, Any](more))
        if pixels != found.size:
            raise ValueError(
                f"the emoji world has images of {found.size} pixels, the model generates {pixels}; "
                "expected a model of emoji"
            )
        return found

    return Suite(
        name="emoji",
        pixels=world.World().size,
        world=sized,
        settings=("count", "seed"),
        evaluate=suite.evaluate,
        save_grid=suite.save_grid,
        batches=lambda pipe, seed: batches.emoji_batches(pipe, seed=seed),
        prompts=lambda n: [s.caption for s in world.eval_scenes(world.World(), n, 0)],
        categories=world.CATEGORIES,
    )
