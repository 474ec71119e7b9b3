"""Step caching: in some steps the blocks are not run, an estimate of what they add takes its place.

Between the program's ends the blocks add a residual to `hidden_states`. From step to step it
changes little, so where it is expected to have hardly changed, what the last computed steps added
is used again. Nothing is trained. Decided on the host, for every row of a batch by itself (with
classifier-free guidance an image has two rows); a StepCache holds one generation's state.

    none                  every step is computed
    first-block:T         the first block runs; all others are left out where its residual differs
                          by less than T from the one of the last computed step:
                          mean |r - r'| / mean |r'| < T, so 0 leaves out nothing
    interval:N            every Nth step is computed, of the others no block runs
    taylor:WHEN[:ORDER]   WHEN is one of the two above; the residual is extrapolated from the last
                          ORDER + 1 computed steps (default 1) instead of used as it was
    auto                  AUTO from LEAST steps on, none below: few steps differ too much

The extrapolation is Taylor's polynomial with divided differences in place of derivatives, over the
noise level: the polynomial through the last ORDER + 1 residuals. (First block: ParaAttention and
cache-dit; intervals and extrapolation: FORA and TaylorSeer, where the distance is in steps.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.bundle.block_groups import Runs, blocks_of
from runtime.files.checked_json import show
from runtime.files.tensors import cast, to_float32

AUTO, LEAST = "first-block:0.1", 12
MAX_ORDER = 4
FORMS = (
    "none, auto, first-block:THRESHOLD such as first-block:0.1, interval:N such as interval:2, or"
    " taylor: before one of the last two"
)
GRAMMAR = re.compile(
    r"(?P<taylor>taylor:)?(?:first-block:(?P<threshold>\d*\.?\d+)|interval:(?P<interval>\d+))"
    r"(?(taylor)(?::(?P<order>\d+))?)"
)


@dataclass(frozen=True)
class Method:
    """What a text such as "taylor:interval:3:2" says; `text` is its one spelling."""

    text: str = "none"
    threshold: float | None = None  # of first-block
    interval: int = 1
    order: int = 0

    @property
    def skips(self) -> bool:
        """Whether any step can be left out."""
        return bool(self.threshold) or self.interval > 1


def read_method(cache: Any, steps: int) -> Method:
    """The method that `cache` names for so many steps; None is "none". ValueError, one sentence."""
    if cache is None or cache == "none" or (cache == "auto" and steps < LEAST):
        return Method()
    text = AUTO if cache == "auto" else cache
    found = GRAMMAR.fullmatch(text) if isinstance(text, str) and len(text) <= 64 else None
    if found is None:
        raise ValueError(f"cache is {show(cache)}, expected {FORMS}.")
    threshold = None if found["threshold"] is None else float(found["threshold"])
    interval = int(found["interval"] or 1)
    order = int(found["order"] or 1) if found["taylor"] else 0
    if not 1 <= interval <= 1000 or (threshold or 0) > 100 or not order <= MAX_ORDER:
        raise ValueError(
            f"cache is {show(cache)}, expected an interval from 1 to 1000, a threshold from 0 to"
            f" 100 and an order from 1 to {MAX_ORDER}."
        )
    when = f"interval:{interval}" if threshold is None else f"first-block:{threshold:g}"
    text = f"taylor:{when}:{order}" if order else when
    return Method(text, threshold, interval, order)


def check_method(method: Method, component: Mapping[str, Any]) -> None:
    """ValueError where a component has no block that could be left out."""
    StepCache(method, component)


class StepCache:
    """One generation's state: what the last computed steps added, row by row.

    For every step `begin`; then the executor runs the program in sections cut at `cuts`, asks
    `wants` before each, narrows its calls with `restrict`, and shows TENSOR where it is `due`.
    `skipped` counts the steps that were left out, [rows].
    """

    def __init__(
        self, method: Method, component: Mapping[str, Any], tokens: int | None = None
    ) -> None:
        """tokens: how many of TENSOR decide, the first ones: references stand behind them."""
        self.tokens = tokens
        blocks = blocks_of(component)
        self.method = method
        first, self.tail = (blocks[0], blocks[-1] + 1) if blocks else (0, 0)
        self.head = first  # where it is decided whether the calls up to `tail` run
        self.cuts: tuple[int, ...] = (first, self.tail)
        if method.threshold is not None:
            # A first block of a group is the group's: which of its blocks runs may change, and
            # then the residual has changed.
            groups = [group["calls"] for group in component.get("groups", {}).values()]
            self.head = next((calls[-1] for calls in groups if first in calls), first) + 1
            self.cuts = (first, self.head, self.tail)
        if self.head >= self.tail:
            raise ValueError(
                f"cache is {method.text} but the model has no block after the first, expected"
                " none; leave it out."
            )
        self.skipped = np.zeros(0, np.int64)
        self._step, self._level = -1, 0.0
        self._waiting: list[int] = []
        self._rows: np.ndarray | None = None  # that are computed; None: not decided yet
        self._count = 0  # of rows
        self._before = self._entry = np.zeros(0, np.float32)
        self._first: dict[int, np.ndarray] = {}  # row -> the first block's residual
        self._known: dict[int, list[tuple[float, np.ndarray]]] = {}  # row -> level, residual

    def begin(self, level: float) -> None:
        """A step begins; `level`: its noise level."""
        self._step, self._level = self._step + 1, float(level)
        self._waiting, self._rows = list(self.cuts), None

    @property
    def idle(self) -> bool:
        """Whether it is known before a step runs that none of its blocks will."""
        never = self.method.threshold is None and self._step % self.method.interval != 0
        return never and 0 < len(self._known) == self._count

    def wants(self, begin: int, end: int) -> bool:
        """Whether a section is run at all."""
        inside = begin >= self.head and end <= self.tail
        return not inside or self._rows is None or len(self._rows) > 0

    def restrict(self, runs: Runs, begin: int, end: int) -> Runs:
        """`runs` (see runtime.bundle.block_groups) without the rows whose step is left out."""
        if self._rows is None or len(self._rows) == self._count:
            return runs
        narrowed = dict(runs)
        for call in range(max(begin, self.head), min(end, self.tail)):
            chosen = runs.get(call)
            rows = self._rows
            narrowed[call] = rows if chosen is None else np.intersect1d(chosen, rows)
        return narrowed

    def due(self, end: int) -> bool:
        """Whether TENSOR must be shown (`reach`) now that a section has ended."""
        return bool(self._waiting) and end == self._waiting[0]

    def reach(self, value: np.ndarray) -> np.ndarray | None:
        """TENSOR as a section at whose end it is due has left it, [B, T, D], uint16 being
        bfloat16's bits; returns what it must be from then on, None where it stays."""
        end, wide = self._waiting.pop(0), to_float32(value)
        if end == self.head:
            self._entry = wide
            self._count = len(wide)
            self._rows = np.flatnonzero(self.decide(wide))
            return None
        if end != self.tail:
            self._before = wide
            return None
        return self.complete(value, wide)

    def decide(self, entry: np.ndarray) -> np.ndarray:
        """Which rows are computed in this step, [B]."""
        rows = range(len(entry))
        if not len(self.skipped):
            self.skipped = np.zeros(len(entry), np.int64)
        if self.method.threshold is None:
            due = self._step % self.method.interval == 0
            return np.array([due or row not in self._known for row in rows])
        residual = entry[:, : self.tokens] - self._before[:, : self.tokens]
        computed = np.array([self.changed(residual[row], row) for row in rows])
        for row in np.flatnonzero(computed).tolist():
            self._first[row] = residual[row]
        return computed

    def changed(self, residual: np.ndarray, row: int) -> bool:
        """Whether the first block's residual differs too much from the last computed step's."""
        last = self._first.get(row)
        if last is None or self.method.threshold is None:
            return True
        difference = float(np.abs(residual - last).mean(dtype=np.float64))
        size = float(np.abs(last).mean(dtype=np.float64))
        return not difference < self.method.threshold * size

    def complete(self, value: np.ndarray, wide: np.ndarray) -> np.ndarray | None:
        """After the last block: what computed rows have added is kept, others get an estimate."""
        assert self._rows is not None, "the section before the blocks was not reached"
        for row in self._rows.tolist():
            known = self._known.setdefault(row, [])
            known.append((self._level, wide[row] - self._entry[row]))
            del known[: -self.method.order - 1]
        left = np.setdiff1d(np.arange(self._count), self._rows)
        self.skipped[left] += 1
        if not len(left):
            return None
        wide = wide.copy()
        for row in left.tolist():
            wide[row] = self._entry[row] + extrapolate(self._known[row], self._level)
        dtype = "bfloat16" if value.dtype == np.uint16 else value.dtype.name
        return cast(wide, dtype)


def extrapolate(known: list[tuple[float, np.ndarray]], level: float) -> np.ndarray:
    """The polynomial through (level, values) of `known` at another level, in Lagrange's form."""
    total = np.zeros_like(known[0][1])
    for index, (own, values) in enumerate(known):
        weight = 1.0
        for other, (at, _) in enumerate(known):
            if other != index:
                weight *= (level - at) / (own - at)
        total += np.float32(weight) * values
    return total
