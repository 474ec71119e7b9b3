"""One try: a forked child does something, and is interrupted in the middle of it.

Forked from a parent that has imported torch already, a child starts within milliseconds. It is
interrupted after a time, or at its n-th operation on files below a directory, seen by an audit hook
just before it happens: moments between two renames, which are too short for a clock to hit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2m.cli.terminal import explain
from d2m.distill.stopping import terminated_on_signal

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.listdir",
              "os.scandir", "os.chmod", "os.utime", "os.truncate", "shutil.copyfile")  # fmt: skip


@dataclass
class Interruption:
    """A signal to a child, after so many seconds or at its n-th operation (from 1)."""

    number: int = signal.SIGKILL
    seconds: float | None = None
    operation: int | None = None


@dataclass
class Outcome:
    """How a child ended: its exit code, or minus the signal; its answer or its sentence."""

    code: int
    answer: Any
    operations: int
    seconds: float


def attempt(
    work: Callable[[], Any],
    place: Path,
    interruption: Interruption | None = None,
    prepare: Callable[[], None] | None = None,
) -> Outcome:
    """Do `work` in a child, which `prepare` may limit before, and interrupt it."""
    return finish(begin(work, place, interruption, prepare), interruption)


def begin(
    work: Callable[[], Any],
    place: Path,
    interruption: Interruption | None = None,
    prepare: Callable[[], None] | None = None,
) -> tuple[int, int, float]:
    """Start a child: its id, the end of a pipe for its answer, and when."""
    reading, writing = os.pipe()
    # SIGTERM waits until the child has its handler, as a process that has just begun has none.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.close(writing)
        return child, reading, time.monotonic()
    code = 70
    try:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        count = (
            interrupt_at(place, interruption)
            if interruption is None or interruption.operation
            else [0]
        )
        if prepare:
            prepare()
        answer: Any
        try:
            with terminated_on_signal():
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
                answer, code = work(), 0
        except BaseException as error:
            answer, code = explain(error)
        os.write(writing, json.dumps([answer, count[0]]).encode()[:60_000])
    finally:
        os._exit(code)


def finish(started: tuple[int, int, float], interruption: Interruption | None = None) -> Outcome:
    """Send the signal where time decides, and wait for the end."""
    child, reading, began = started
    if interruption is not None and interruption.seconds is not None:
        rest(began + interruption.seconds - time.monotonic())
        os.kill(child, interruption.number)
    with open(reading, "rb") as pipe:
        written = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    answer, operations = json.loads(written) if written else (None, 0)
    return Outcome(code, answer, operations, time.monotonic() - began)


def rest(seconds: float) -> None:
    """Sleep by select: libfaketime's clock_nanosleep, time.sleep's, fails where the clock jumps."""
    select.select([], [], [], max(0.0, seconds))


def interrupt_at(place: Path, interruption: Interruption | None) -> list[int]:
    """Count this process's operations on files below `place`, and interrupt it at the one named."""
    count = [0]
    root = os.fspath(place)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not arguments:
            return
        try:
            name = os.fsdecode(arguments[0])
        except TypeError:
            return  # a descriptor
        if name.startswith(root):
            count[0] += 1
            if interruption is not None and count[0] == interruption.operation:
                os.kill(os.getpid(), interruption.number)

    sys.addaudithook(hook)
    return count


def random_interruption(
    draw: random.Random, whole: Outcome, number: int = signal.SIGKILL
) -> Interruption:
    """One at random: half by time, half by operation, of what an undisturbed try took."""
    if draw.random() < 0.5:
        return Interruption(number, seconds=draw.uniform(0, whole.seconds * 1.05))
    return Interruption(number, operation=draw.randint(1, max(1, whole.operations)))


@contextlib.contextmanager
def clock_shifted(seconds: float) -> Any:
    """Within, Python's clock goes wrong; the kernel's belongs to the whole machine and stays."""
    real = time.time
    time.time = lambda: real() + seconds  # type: ignore[assignment]
    try:
        yield
    finally:
        time.time = real
