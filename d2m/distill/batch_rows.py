"""Which rows of a batch a process runs, one part after another, and a batch cut to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from d2m.distill.processes import Crew
from d2m.recipe.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


def check_shares(recipe: Recipe, crew: Crew, parts: int) -> None:
    """ValueError unless every stage's batch divides by processes and parts."""
    if parts < 1:
        raise ValueError(f"accumulation is {parts}, expected 1 part of a batch or more.")
    for stage in recipe.stages:
        if not stage.skip and stage.batch_size % (crew.size * parts):
            raise ValueError(
                f"stage {stage.name!r} has a batch of {stage.batch_size} for {crew.size} processes "
                f"and {parts} parts in each, expected a multiple of {crew.size * parts}; change "
                "the recipe's batch_size, the number of processes or the accumulation."
            )


def shares(batch: int, crew: Crew, parts: int) -> list[tuple[int, int]]:
    """The rows (first, end) of a batch that this process runs, one part after another."""
    rows = batch // (crew.size * parts)
    firsts = [(part * crew.size + crew.rank) * rows for part in range(parts)]
    return [(first, first + rows) for first in firsts]


def batch_rows(batches: Any, step: int, size: int, rows: tuple[int, int]) -> Mapping[str, Tensor]:
    """The rows from rows[0] up to rows[1] of the batch of `size` at `step`.

    `batches(step, size)` makes all of it; where it has a function `rows(step, size, first, end)`,
    that one makes no more than is asked for.
    """
    if rows == (0, size):
        return batches(step, size)
    if hasattr(batches, "rows"):
        return batches.rows(step, size, *rows)
    return cut(batches(step, size), rows)


def cut(batch: Mapping[str, Tensor], rows: tuple[int, int]) -> dict[str, Tensor]:
    """Those rows of a batch; positions (`..._ids`) are the same for every sample."""
    part = slice(*rows)
    return {name: t if name.endswith("_ids") else t[part] for name, t in batch.items()}
