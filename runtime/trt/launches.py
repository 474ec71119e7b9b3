"""What a program of plans consists of: launches, copies of rows, and sections of the program.

What runtime.trt.launch_schedule works out. Rows are copied where samples of a batch choose for
themselves; until a group's router has been asked, its launches are not known, so a program with
groups of blocks is cut before every group (runtime.bundle.block_groups).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle.block_groups import Runs

if TYPE_CHECKING:
    from runtime.cuda.arena import Buffer


@dataclass(frozen=True)
class Launch:
    """One plan, or the experts' kernels, run once: tensor name -> buffer, or weight's full name."""

    plan: str
    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]
    weights: Mapping[str, str]


@dataclass(frozen=True)
class Copy:
    """Rows of one buffer copied to another: (row there, row here, how many). No plan is run."""

    source: Buffer
    target: Buffer
    spans: tuple[tuple[int, int, int], ...]
    fresh: bool  # whether the target begins with this copy

    @property
    def inputs(self) -> dict[str, Buffer]:
        """What is read."""
        return {"source": self.source} | ({} if self.fresh else {"target": self.target})

    @property
    def outputs(self) -> dict[str, Buffer]:
        """What is written."""
        return {"target": self.target} if self.fresh else {}

    def moves(self, base: int) -> list[tuple[int, int, int]]:
        """(target address, source address, bytes) of each span, in an arena at `base`."""
        row = self.source.size // max(self.source.shape[0], 1)
        target, source = base + self.target.offset, base + self.source.offset
        return [
            (target + there * row, source + here * row, n * row) for there, here, n in self.spans
        ]


@dataclass(frozen=True)
class Section:
    """Calls `begin` to `end` of a program, then a router.

    `env`: the tensors that the section before has left; `runs`: which samples make which calls, see
    runtime.bundle.block_groups.
    """

    begin: int = 0
    end: int | None = None
    runs: Runs = field(default_factory=dict)
    env: Mapping[str, Buffer] | None = None
    router: Mapping[str, Any] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for pieces whose launches and addresses are equal."""
        runs = tuple((call, tuple(rows.tolist())) for call, rows in sorted(self.runs.items()))
        env = () if self.env is None else tuple((n, b.offset) for n, b in sorted(self.env.items()))
        return self.begin, self.end, runs, env


class BufferRows:
    """Rows of buffers: copies among the launches (see runtime.program.executor.Rows)."""

    def __init__(self, launches: list[Launch | Copy]) -> None:
        self.launches = launches

    def take(self, value: Buffer, chosen: np.ndarray) -> Buffer:
        """A new buffer with the rows `chosen`."""
        part = replace(value, shape=(len(chosen), *value.shape[1:]), offset=-1)
        self.launches.append(Copy(value, part, spans(chosen, into=True), True))
        return part

    def put(self, value: Buffer, part: Buffer, chosen: np.ndarray) -> Buffer:
        """The same buffer: `part` is copied into it, for nothing reads the old rows any more."""
        self.launches.append(Copy(part, value, spans(chosen, into=False), False))
        return value


def spans(chosen: np.ndarray, *, into: bool) -> tuple[tuple[int, int, int], ...]:
    """Rows [2, 3, 5] as (target, source, count): from their places to 0, 1, ... or back."""
    runs: list[tuple[int, int, int]] = []
    for index, row in enumerate(chosen.tolist()):
        target, source = (index, row) if into else (row, index)
        if runs and row == chosen[index - 1] + 1:
            first_target, first_source, count = runs[-1]
            runs[-1] = (first_target, first_source, count + 1)
        else:
            runs.append((target, source, 1))
    return tuple(runs)
