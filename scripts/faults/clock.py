"""The system's clock a year back, a year ahead, and jumping in the middle, by Debian's libfaketime.

The whole script runs anew with the library before it (LD_PRELOAD), and a file says how wrong the
clock is, read anew at every question, so that it jumps in all processes at once. The monotonic
clock and files' times stay the kernel's own, as they do when a clock is set: to a process whose
clock is a year back every file is from the future.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from scripts.faults.forked_commands import Tools, emptied, leftovers, state_of
from scripts.faults.kills import NAMES, Reference
from scripts.faults.tries import Interruption, Outcome, begin, finish, random_interruption, rest

YEAR = 365 * 86_400
# The clock at the beginning, and after a moment drawn at random; both in seconds of error.
COURSES = ((-YEAR, -YEAR), (YEAR, YEAR), (0, YEAR), (0, -YEAR))
TOOLS, SHORT = ("convert", "stream", "export", "run"), ("stream", "run")
PLACES = ("/usr/lib/*/faketime", "/usr/lib/faketime", "/usr/local/lib/faketime")


def library() -> Path | None:
    """libfaketime for programs with threads; None where it is not installed (apt: faketime)."""
    found = (Path("/").glob(f"{place[1:]}/libfaketimeMT.so.1") for place in PLACES)
    return next((path for paths in found for path in sorted(paths)), None)


def environment(preloaded: Path, clock_file: Path) -> dict[str, str]:
    """What a process needs to have its clock from `clock_file`."""
    clock_file.write_text("+0\n")
    return {
        "LD_PRELOAD": str(preloaded),
        "FAKETIME_TIMESTAMP_FILE": str(clock_file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def wrong_by(seconds: int) -> None:
    """Set this process's clock, and that of all others with its file, at once."""
    clock_file = Path(os.environ["FAKETIME_TIMESTAMP_FILE"])
    new = clock_file.with_suffix(".new")
    new.write_text(f"{seconds:+d}\n")
    new.replace(clock_file)


def on_course(
    course: tuple[int, int],
    after: float,
    work: Callable[[], Any],
    place: Path,
    interruption: Interruption | None,
) -> Outcome:
    """A try whose clock is wrong by the first number and, `after` seconds, by the second.

    The jump comes from the parent, which has no other thread: a child that is forked while a
    thread asks for the time waits for ever for a lock of libfaketime's.
    """
    wrong_by(course[0])
    started = begin(work, place, interruption)
    if course[1] != course[0]:
        rest(after)
        wrong_by(course[1])
    outcome = finish(started, interruption)
    wrong_by(0)
    return outcome


def work_and_clock(work: Callable[[], Any]) -> Callable[[], Any]:
    """`work`, and what the clock said before and after: [[before, after], answer]."""

    def inside() -> Any:
        before = time.time()
        answer = work()
        return [[before, time.time()], answer]

    return inside


def tool_on_courses(tools: Tools, tool: str, undisturbed: Reference, seed: int) -> dict[str, Any]:
    """One tool on every course, undisturbed and killed: the same bytes as by a right clock."""
    draw = random.Random(f"{tool} {seed}")
    place = emptied(tools.root / f"clock-{tool}")
    out, ready = place / NAMES[tool], getattr(tools, tool)
    row: dict[str, Any] = {"tries": 0, "jumped_within": 0, "killed": 0, "failures": []}
    real = time.time() - time.monotonic()  # wrong by 0 here
    for turn in range(2 * len(COURSES)):
        course, kill = COURSES[turn // 2 % len(COURSES)], turn % 2 == 1
        interruption = random_interruption(draw, undisturbed.done) if kill else None
        row["tries"] += 1
        label = f"try {turn} ({course}, {interruption}): "
        after, work = (
            draw.uniform(0.1, 0.8) * undisturbed.done.seconds,
            work_and_clock(ready(out, "a")),
        )
        outcome = on_course(course, after, work, place, interruption)
        row["killed"] += outcome.code == -signal.SIGKILL
        if outcome.code == -signal.SIGKILL:  # goes on by another clock than it began
            course = COURSES[(turn // 2 + 1) % len(COURSES)]
            outcome = on_course(course, after, work, place, None)
        if outcome.code:
            row["failures"].append(f"{label}code {outcome.code}, {outcome.answer}")
            continue
        errors = [moment - time.monotonic() - real for moment in outcome.answer[0]]
        row["jumped_within"] += abs(errors[1] - errors[0]) > YEAR / 2
        if course[0] and abs(errors[0] - course[0]) > 3600:
            row["failures"].append(f"{label}the clock was not wrong: {errors}")
        if state_of(out) != undisturbed.states["a"]:
            row["failures"].append(label + "another result than by a right clock")
        if left := leftovers(place):
            row["failures"].append(f"{label}{left} are left")
        emptied(place)
    return row


def hashes(tools: Tools, tries: int, seed: int) -> dict[str, Any]:
    """unwritable.remembered, with this clock in place of Python's."""
    from scripts.faults import unwritable

    @contextlib.contextmanager
    def clock_shifted(seconds: float) -> Iterator[None]:
        wrong_by(int(seconds))
        try:
            yield
        finally:
            wrong_by(0)

    before = unwritable.clock_shifted
    unwritable.clock_shifted = clock_shifted
    try:
        return unwritable.remembered(tools, tries, seed)
    finally:
        unwritable.clock_shifted = before


def time_left(tools: Tools) -> dict[str, Any]:
    """The time left that a person reads, while the clock jumps: never more than there is."""
    place = emptied(tools.root / "clock-progress")
    row: dict[str, Any] = {"tries": 0, "failures": []}

    def work() -> Any:
        from d2m.cli import progress

        progress.LINE_EVERY = 0.05  # type: ignore[misc]
        heard = io.StringIO()
        with contextlib.redirect_stderr(heard), progress.progress_bars() as report:
            for done in range(11):
                report("a phase", done, 10)
                rest(0.1)
        return heard.getvalue()

    for course in COURSES:
        outcome = on_course(course, 0.5, work, place, None)
        row["tries"] += 1
        lines = str(outcome.answer).splitlines()
        if outcome.code or len(lines) < 5 or any(w in str(lines) for w in (" h", "d left", "-")):
            row["failures"].append(f"{course}: {lines}")
    return row


def cases(
    tools: Tools,
    undisturbed: Callable[[str], Reference],
    short: bool,
    seed: int,
    case: Callable[[str, Callable[[], dict[str, Any]]], None],
) -> None:
    """All of this file and of clock_server.py, each given to `case`."""
    from scripts.faults.clock_server import served

    for tool in SHORT if short else TOOLS:
        name = f"system clock, {tool}"
        case(name, partial(tool_on_courses, tools, tool, undisturbed(tool), seed))
    case("system clock, hashes", lambda: hashes(tools, 4, seed))
    case("system clock, time left", lambda: time_left(tools))
    case("system clock, serve", lambda: served(tools, wrong_by, COURSES))


def again(arguments: list[str], preloaded: Path, folder: Path) -> int:
    """This script anew, with the library before it; its exit code."""
    env = os.environ | environment(preloaded, folder / "clock.txt")
    return subprocess.run([sys.executable, *arguments], env=env).returncode


def active() -> bool:
    """Whether a file decides what this process's clock says, and its monotonic one stays.

    Where it does, tqdm gets no thread of its own, for the reason that `on_course` gives.
    """
    if "FAKETIME_TIMESTAMP_FILE" not in os.environ:
        return False
    import tqdm

    tqdm.tqdm.monitor_interval = 0
    before, began = time.time(), time.monotonic()
    wrong_by(YEAR)
    after = time.time()
    wrong_by(0)
    return abs(after - before - YEAR) < 3600 and time.monotonic() - began < 3600
