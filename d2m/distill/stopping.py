"""Ctrl-C and SIGTERM in a long run: the first stops at the next checkpoint, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Terminated(KeyboardInterrupt):
    """SIGTERM where nothing waits for it: what is half made is cleared away as after Ctrl-C."""


@contextmanager
def terminated_on_signal() -> Iterator[None]:
    """Within: SIGTERM raises Terminated; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    try:
        signal.signal(signal.SIGTERM, end)
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C or SIGTERM came; a second one interrupts at once."""
    requested = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set  # Python lets only the main thread set handlers
        return
    before = {number: signal.getsignal(number) for number in numbers}

    def request(number: int, frame: object) -> None:
        requested.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in numbers:
            signal.signal(number, request)
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(done: int, total: int, workdir: Path) -> None:
    """Stop, with the sentence that says how to go on."""
    raise KeyboardInterrupt(
        f"stopped after {done} of {total} steps; the state is in {workdir}, continue with --resume."
    )
