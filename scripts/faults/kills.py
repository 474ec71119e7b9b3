"""kill -9 and SIGTERM at random moments: what lies there is whole, and going on gives the same."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.faults.forked_commands import Tools, Work, emptied, leftovers, state_of
from scripts.faults.tries import Interruption, Outcome, attempt, random_interruption

Ready = Callable[[Path, str], Work]
LEFT = 3  # temporary names of one killed try: a directory, and files under way in it
RESUMED = ("convert", "stream")
NAMES = {"convert": "out", "stream": "out", "export": "out", "export_traced": "out",
         "run": "out.png"}  # fmt: skip


@dataclass
class Reference:
    """What a tool makes where nothing interrupts it, and how long that takes."""

    states: dict[str, str | None]
    done: Outcome
    bytes: int  # of all files
    largest: int  # of one file


def reference(tools: Tools, tool: str) -> Reference:
    """Undisturbed tries; the first child warms caches, the last one does as most tries do."""
    place = emptied(tools.root / f"{tool}-undisturbed")
    out, ready = place / NAMES[tool], getattr(tools, tool)
    states = {}
    for which in ("a",) if tool in RESUMED else ("a", "b", "a"):
        done = attempt(ready(out, which), place)
        assert done.code == 0, done.answer
        states[which] = state_of(out)
    sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
    return Reference(states, done, sum(sizes), max(sizes))


def interrupted(
    tools: Tools, tool: str, undisturbed: Reference, tries: int, number: int, seed: int
) -> dict[str, Any]:
    """Interrupt one tool `tries` times in the same directory, then let it end.

    Export and run overwrite the other result ("a", then "b"); a conversion goes on with --resume
    and begins anew once it has ended.
    """
    draw = random.Random(f"{tool} {number} {seed}")
    place = emptied(tools.root / f"{tool}-{signal.Signals(number).name}")
    out, ready = place / NAMES[tool], getattr(tools, tool)
    resumed, whole, done = tool in RESUMED, undisturbed.states, undisturbed.done
    row: dict[str, Any] = {"tries": tries, "seconds_undisturbed": round(done.seconds, 2)}
    row |= {"operations_undisturbed": done.operations, "struck": 0, "ended_before": 0}
    row |= {"by_time": 0, "by_operation": 0, "most_leftovers": 0, "failures": []}

    def fail(text: str) -> None:
        row["failures"].append(text)

    before: str | None = None
    for turn in range(tries):
        which = "a" if resumed else "ab"[turn % 2]
        interruption = random_interruption(draw, done, number)
        outcome = attempt(ready(out, which), place, interruption)
        row["by_operation" if interruption.operation else "by_time"] += 1
        label = f"try {turn} ({interruption}): "
        after = state_of(out)
        if outcome.code == 0:
            row["ended_before"] += 1
            if after != whole[which]:
                fail(label + "it ended well, and what lies there is not what ought to")
        else:
            row["struck"] += 1
            if outcome.code not in expected(number):
                fail(label + f"code {outcome.code}, {outcome.answer}")
        if after is None and before is not None and not resumed:
            fail(label + "what was there before is gone")
        if after is not None and after not in whole.values():
            fail(label + "half of a result lies there")
        left = leftovers(place)
        row["most_leftovers"] = max(row["most_leftovers"], len(left))
        if len(left) > LEFT:
            fail(f"{label}they pile up: {left}")
        before = after
        if resumed and after is not None:
            # Between the result and the clean-up: a resume says so, and clears the rest away.
            again = attempt(ready(out, which), place)
            if again.code or [path.name for path in place.iterdir()] != [out.name]:
                fail(label + f"a resume of what is done leaves {sorted(place.iterdir())}")
            emptied(place)
            before = None
    last = attempt(ready(out, "a"), place)
    if last.code or state_of(out) != whole["a"]:
        fail(f"the last, undisturbed one: code {last.code}, {last.answer}")
    if (left := sorted(path.name for path in place.rglob(".*"))) or not out.exists():
        fail(f"in the end there are {left}")
    if resumed and [path.name for path in place.iterdir()] != [out.name]:
        fail(f"in the end there are {sorted(path.name for path in place.iterdir())}")
    return row


def expected(number: int) -> tuple[int, ...]:
    """Exit codes of an interrupted child: by the signal, or with a sentence after SIGTERM."""
    return (-signal.SIGKILL,) if number == signal.SIGKILL else (130, 143)


def two_at_once(tools: Tools, rounds: int, seed: int) -> dict[str, Any]:
    """Two exports into one directory at once, in every third round one of them killed; a reader.

    The reader opens the bundle again and again with every hash computed: it gets one or the other
    whole, or a refusal where they change places while it reads, and never nothing.
    """
    from scripts.faults.tries import begin, finish

    draw = random.Random(seed)
    place = emptied(tools.root / "two")
    out = place / "out"
    whole = {which: state_of(path) for which, path in tools.bundles.items()}
    row: dict[str, Any] = {"rounds": rounds, "killed": 0, "opened": 0, "refused": 0, "failures": []}
    took = attempt(tools.export(out, "a"), place)
    for turn in range(rounds):
        reader = begin(lambda: read_often(out, 2.5 * took.seconds), place)
        one = begin(tools.export(out, "a"), place)
        kill = turn % 3 == 2
        interruption = Interruption(seconds=draw.uniform(0, 2 * took.seconds)) if kill else None
        other = begin(tools.export(out, "b"), place)
        ended = [finish(one, interruption), finish(other)]
        read = finish(reader)
        label = f"round {turn}: "
        if kill:
            row["killed"] += ended[0].code != 0
            ended = ended[1:]
        row["failures"] += [f"{label}{each.answer}" for each in ended if each.code]
        if state_of(out) not in whole.values():
            row["failures"].append(label + "the bundle is neither the one nor the other")
        if read.code:
            row["failures"].append(f"{label}the reader: {read.answer}")
        else:
            row["opened"] += read.answer["opened"]
            row["refused"] += read.answer["refused"]
    attempt(tools.export(out, "a"), place)
    if left := [path.name for path in place.iterdir() if path != out]:
        row["failures"].append(f"in the end there are {left}")
    return row


def read_often(out: Path, seconds: float) -> dict[str, int]:
    """Open a bundle for so long; AssertionError where nothing is there, or what is no bundle."""
    import time

    from runtime.bundle.directory import open_bundle

    found = {"opened": 0, "refused": 0}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert out.is_dir(), "the bundle was gone for a moment"
        try:
            bundle = open_bundle(out, check="full")
            assert bundle.manifest["storage_dtype"] in ("float32", "bfloat16")
            found["opened"] += 1
        except (ValueError, OSError):
            found["refused"] += 1
    return found
