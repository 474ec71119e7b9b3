"""How far a long phase is: bars on a terminal, now and then a plain line where stderr is a file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from d2m.units import clock

Progress = Callable[[str, int, int], None]
LINE_EVERY = 10.0  # seconds between two lines of a phase


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A function (phase, done, total); total may change, and a phase that steps back begins again.

    Both forms show the phase, done of total, the time elapsed and the time left.
    """
    with _bars() if sys.stderr.isatty() else _ticking(_Lines(time.monotonic)) as progress:
        yield progress


@contextmanager
def _bars() -> Iterator[Progress]:
    """rich's bars: their clock runs while an item takes minutes, and other lines go above them."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            elif done < bars.tasks[tasks[phase]].completed:
                bars.reset(tasks[phase])
            bars.update(tasks[phase], completed=done, total=total)

        yield progress


class _Lines:
    """Plain lines: a phase's beginning, one each LINE_EVERY seconds, and its end.

    A phase that is over within a second has no line for its end. `tick`, called from time to time,
    speaks for a phase that is silent. `now`: seconds of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.began: dict[str, tuple[float, int]] = {}
        self.last: dict[str, tuple[float, int]] = {}
        self.current: tuple[str, int, int] | None = None
        self.lock = threading.Lock()

    def __call__(self, phase: str, done: int, total: int) -> None:
        with self.lock:
            moment = self.now()
            if phase not in self.began or done < self.last[phase][1]:
                self.began[phase] = self.last[phase] = (moment, done)
                print(f"{phase}: {done}/{total}", file=sys.stderr, flush=True)
            else:
                self.speak(phase, done, total, moment)
            self.current = (phase, done, total) if done < total else None

    def tick(self) -> None:
        """Say where a phase is that has not said so for LINE_EVERY seconds."""
        with self.lock:
            if self.current is not None:
                self.speak(*self.current, self.now())

    def speak(self, phase: str, done: int, total: int, moment: float) -> None:
        """The line of a phase under way, where it is time for one."""
        start, done_at_start = self.began[phase]
        elapsed, made = moment - start, done - done_at_start
        over = done >= total and elapsed >= 1 and self.last[phase][1] < total
        if not over and moment - self.last[phase][0] < LINE_EVERY:
            return
        self.last[phase] = (moment, done)
        left = f", {clock(elapsed / made * (total - done))} left" if made and done < total else ""
        print(f"{phase}: {done}/{total}, {clock(elapsed)}{left}", file=sys.stderr, flush=True)


@contextmanager
def _ticking(lines: _Lines) -> Iterator[Progress]:
    """Lines with a clock of their own, for phases that are silent."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(LINE_EVERY):
            lines.tick()

    clockwork = threading.Thread(target=tick, daemon=True)
    clockwork.start()
    try:
        yield lines
    finally:
        over.set()
        clockwork.join()
