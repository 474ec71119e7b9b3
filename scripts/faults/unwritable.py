"""Places that cannot be written to: full disks, read-only directories, clocks that jump."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.faults.forked_commands import Tools, emptied, leftovers, state_of
from scripts.faults.kills import NAMES, RESUMED, Reference
from scripts.faults.tries import attempt, clock_shifted, random_interruption

YEARS = 10 * 365 * 86_400.0


def can_mount(place: Path) -> bool:
    """Whether this user may mount a tmpfs."""
    try:
        with small_disk(emptied(place), 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A tmpfs of `size` bytes at a directory."""
    mount("-t", "tmpfs", "-o", f"size={size}", "none", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, capture_output=True)


def mount(*arguments: str) -> None:
    """The command; CalledProcessError where it is not allowed."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def full(
    tools: Tools, tool: str, undisturbed: Reference, tries: int, seed: int, tmpfs: bool
) -> dict[str, Any]:
    """A disk with less room than is needed: one sentence, the old result, nothing left; then room.

    Where nothing may be mounted, no file may grow beyond a limit, which is another error (EFBIG)
    at the same calls.
    """
    draw = random.Random(f"{tool} {seed}")
    place, resumed, whole = (
        emptied(tools.root / f"full-{tool}"),
        tool in RESUMED,
        undisturbed.states,
    )
    out, ready = place / NAMES[tool], getattr(tools, tool)
    row: dict[str, Any] = {"tries": tries, "how": "tmpfs" if tmpfs else "RLIMIT_FSIZE"}
    row |= {"full": 0, "room_enough": 0, "failures": []}
    need = undisturbed.bytes
    for turn in range(tries):
        emptied(place)
        first = not resumed and turn % 2 == 1  # an old result is there
        # Every third for sure too small; a conversion needs more than its result.
        size = int(need * (draw.uniform(0.05, 2.2 if turn % 3 else 0.8) + first))
        size = -(-size // 4096) * 4096
        limit = draw.randrange(100, undisturbed.largest)

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        label = f"try {turn} ({size if tmpfs else limit} bytes): "
        with small_disk(place, 8 * need + (1 << 22)) if tmpfs else contextlib.nullcontext():
            if first:
                attempt(ready(out, "a"), place)
            before = state_of(out)
            if tmpfs:
                mount("-o", f"remount,size={size}", str(place))
            outcome = attempt(ready(out, "b" if first else "a"), place, None,
                              None if tmpfs else limited)  # fmt: skip
            if outcome.code == 0:
                row["room_enough"] += 1
                wanted = whole["b" if first else "a"]
            else:
                row["full"] += 1
                wanted = before
                sentence = str(outcome.answer)
                known = any(word in sentence for word in ("space", "full", "too large"))
                if outcome.code != 2 or not known:
                    row["failures"].append(f"{label}code {outcome.code}, {outcome.answer}")
            if state_of(out) != wanted:
                row["failures"].append(label + "another result lies there than ought to")
            if left := leftovers(place):
                row["failures"].append(f"{label}{left} are left")
            if tmpfs:
                mount("-o", f"remount,size={8 * need + (1 << 22)}", str(place))
            again = attempt(ready(out, "a"), place)
            if again.code or state_of(out) != whole["a"]:
                row["failures"].append(f"{label}with room: code {again.code}, {again.answer}")
            if resumed and [path.name for path in place.iterdir()] != [out.name]:
                row["failures"].append(label + "the conversion left more than its result")
    return row


def read_only(tools: Tools, tool: str, root: bool) -> dict[str, Any]:
    """A directory without write permission, empty and with a result: one sentence, no change.

    root may write anywhere, so for root the directory is mounted read-only.
    """
    place = emptied(tools.root / f"readonly-{tool}")
    out, ready = place / NAMES[tool], getattr(tools, tool)
    row: dict[str, Any] = {"how": "mount -o ro" if root else "chmod 555", "tries": 0}
    row |= {"failures": []}
    for old in (False, True) if tool in ("export", "run") else (False,):
        if old:
            attempt(ready(out, "a"), place)
        before = state_of(place)
        if root:
            mount("--bind", str(place), str(place))
            mount("-o", "remount,bind,ro", str(place))
        else:
            place.chmod(0o555)
        try:
            outcome = attempt(ready(out, "b" if old else "a"), place)
        finally:
            if root:
                subprocess.run(["umount", "-l", str(place)], check=True)
            else:
                place.chmod(0o755)
        row["tries"] += 1
        if outcome.code != 2 or "\n" in str(outcome.answer):
            row["failures"].append(f"old {old}: code {outcome.code}, {outcome.answer}")
        if state_of(place) != before:
            row["failures"].append(f"old {old}: the directory changed")
    return row


# ---------------------------------------------------------------- clocks


def jumping(tools: Tools, undisturbed: Reference, tries: int, seed: int) -> dict[str, Any]:
    """Killed conversions go on, and exports come out the same, while clocks and mtimes jump."""
    draw = random.Random(seed)
    place = emptied(tools.root / "clock")
    out = place / "out"
    row: dict[str, Any] = {"tries": tries, "killed": 0, "failures": []}

    def shifted(work: Callable[[], Any], by: float) -> Callable[[], Any]:
        def inside() -> Any:
            with clock_shifted(by):
                return work()

        return inside

    whole = undisturbed.states["a"]
    for turn in range(tries):
        by = draw.choice((-YEARS, -3600.0, 0.0, 3600.0, YEARS))
        interruption = random_interruption(draw, undisturbed.done) if turn % 3 else None
        outcome = attempt(shifted(tools.convert(out), by), place, interruption)
        row["killed"] += outcome.code == -signal.SIGKILL
        scramble(draw, place)
        if out.exists():
            if state_of(out) != whole:
                row["failures"].append(f"try {turn}: another conversion than with a right clock")
            emptied(place)
        elif outcome.code != -signal.SIGKILL:
            row["failures"].append(f"try {turn}: code {outcome.code}, {outcome.answer}")
        if turn % 3 == 0:
            exported = place / "bundle"
            done = attempt(shifted(tools.export(exported), by), place)
            if done.code or state_of(exported) != state_of(tools.bundles["a"]):
                row["failures"].append(f"try {turn}: another bundle than with a right clock")
    attempt(tools.convert(out), place)
    if state_of(out) != whole or leftovers(place):
        row["failures"].append("in the end the conversion is another, or something is left")
    return row


def remembered(tools: Tools, tries: int, seed: int) -> dict[str, Any]:
    """Hashes that are remembered by time: a damaged file is refused whatever times say.

    One byte is changed, the file's times are set back, the clock shifted; then the bundle is opened
    in a process of its own. Whole bundles with odd times are opened, twice.
    """
    import shutil

    from runtime.bundle.directory import open_bundle

    draw = random.Random(seed)
    place = emptied(tools.root / "times")
    row: dict[str, Any] = {"tries": tries, "refused": 0, "opened": 0, "failures": []}

    def opened(path: Path, by: float) -> Callable[[], Any]:
        def work() -> Any:
            with clock_shifted(by):
                return open_bundle(path).digest

        return work

    for turn in range(tries):
        path = place / f"bundle-{turn}"
        shutil.copytree(tools.bundles["a"], path)
        for by in (draw.choice((-YEARS, 0.0, YEARS)), 0.0):
            scramble(draw, path)
            outcome = attempt(opened(path, by), place)
            row["opened"] += outcome.code == 0
            if outcome.code:
                row["failures"].append(f"try {turn}: a whole bundle is refused: {outcome.answer}")
        files = [each for each in sorted(path.rglob("*")) if each.is_file()]
        victim = draw.choice([each for each in files if each.name != "manifest.json"])
        stat = victim.stat()
        with open(victim, "r+b") as file:
            at = draw.randrange(stat.st_size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))
        os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        outcome = attempt(opened(path, draw.choice((-YEARS, 0.0, YEARS))), place)
        row["refused"] += outcome.code == 2
        if outcome.code != 2:
            row["failures"].append(f"try {turn}: the damaged {victim.name} is accepted")
        shutil.rmtree(path)
    return row


def scramble(draw: random.Random, place: Path) -> None:
    """Set every file's times years back or ahead."""
    for path in sorted(place.rglob("*")):
        moment = 1_750_000_000 + draw.choice((-YEARS, 0.0, YEARS)) + draw.uniform(-1e6, 1e6)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (moment, moment))
