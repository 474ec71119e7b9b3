"""What a person at the terminal sees: progress with time left, tables, errors as one sentence.

Progress and errors go to stderr, so that stdout holds the answer alone and `--json` is pure JSON.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from d2m.processes import Lost
from d2m.stopping import Terminated
from d2m.timings import expected, remember

Progress = Callable[[str, int, int], None]

# Top-level module -> the extra that installs it.
EXTRAS = {
    "torch": "convert",
    "diffusers": "convert",
    "transformers": "convert",
    "accelerate": "convert",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "polygraphy": "export",
    "tensorrt_rtx": "trt-rtx",
    "tensorrt": "trt",
    "cuda": "trt-rtx",
    "fastapi": "serve",
    "pydantic": "serve",
    "pydantic_core": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "datasets": "data",
}
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, the largest file allowed
# Seconds between two progress lines where stderr is a file or a pipe.
LINE_EVERY = 10.0


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A function (phase, done, total) that draws bars on a terminal and plain lines elsewhere."""
    if sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        with _ticking(_lines()) as progress:
            yield progress


@contextmanager
def _bars() -> Iterator[Progress]:
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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                before = expected(phase, total - done)
                about = f" (about {clock(before)})" if before else ""
                tasks[phase] = bars.add_task(phase + about, total=total)
            elif done < bars.tasks[tasks[phase]].completed:  # the phase begins again
                bars.reset(tasks[phase])
            bars.update(tasks[phase], completed=done, total=total)
            task = bars.tasks[tasks[phase]]
            if done >= total and task.elapsed is not None:
                remember(phase, task.elapsed, total)

        yield progress


class _Lines:
    """Plain lines: a phase's beginning, one each LINE_EVERY seconds, and its end.

    A phase that is over within a second has no line for its end; one that begins again has a clock
    that begins again. `tick`, called from time to time, speaks for a phase that is silent.
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
                before = expected(phase, total - done)
                about = f", about {clock(before)} by earlier builds" if before else ""
                print(f"{phase}: {done}/{total}{about}", file=sys.stderr, flush=True)
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
        if over:
            remember(phase, elapsed, made)
        if not over and moment - self.last[phase][0] < LINE_EVERY:
            return
        self.last[phase] = (moment, done)
        before = expected(phase, total - done_at_start)
        rest = before - elapsed if before else elapsed / made * (total - done) if made else None
        left = f", {clock(rest)} left" if rest is not None and rest > 0 and done < total else ""
        print(f"{phase}: {done}/{total}, {clock(elapsed)}{left}", file=sys.stderr, flush=True)


def _lines(now: Callable[[], float] = time.monotonic) -> _Lines:
    """Progress where stderr is no terminal."""
    return _Lines(now)


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


def quiet_libraries() -> None:
    """Keep diffusers and transformers from talking: their bars and hints are not ours.

    Through the environment, which they read when they are imported; what the user set stays.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def say(sentence: str) -> None:
    """A line for the person, on stderr."""
    print(sentence, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """The answer as JSON on stdout: sorted keys, indent 2."""
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A small table on stdout; the first column is text, the others are figures."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    print(title)
    print_rich([table])


def print_rich(items: Sequence[Any]) -> None:
    """Rich renderables on stdout, in plain characters where that is no terminal."""
    from rich.console import Console

    # A pipe has no width of its own: give it one that does not wrap figures.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    for item in items:
        console.print(item, highlight=False)


def print_tree(value: Mapping[str, Any], indent: int = 0) -> None:
    """A nested mapping as indented lines; lists of plain values stay on one line."""
    pad = "  " * indent
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            print(f"{pad}{key}")
            print_tree(item, indent + 1)
        elif isinstance(item, (list, tuple)) and any(isinstance(x, Mapping) for x in item):
            print(f"{pad}{key}")
            for entry in item:
                line = ", ".join(f"{k} {_plain(v)}" for k, v in entry.items())
                print(f"{pad}  {line}")
        else:
            print(f"{pad}{key}: {_plain(item)}")


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{k} {_plain(v)}" for k, v in value.items()) or "none"
    return str(value)


def explain(error: BaseException) -> tuple[str, int]:
    """(one sentence, exit code) for an error: 2 the user's, 130 Ctrl-C, 143 SIGTERM, 1 ours."""
    if isinstance(error, Terminated):
        return one_line(str(error)), 143
    if isinstance(error, KeyboardInterrupt):
        return one_line(str(error)) or "interrupted; a conversion goes on with --resume", 130
    if isinstance(error, Lost):
        return one_line(str(error)), 1
    if hasattr(error, "format_message"):  # a click usage error, click's own or the one in typer
        return f"{one_line(error.format_message())}; see d2m COMMAND --help", 2
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.split(".")[0]
        if module in EXTRAS and "pip install" not in str(error):
            extra = EXTRAS[module]
            return (
                f"this command needs the Python package {module}, which is not installed; "
                f"install it with: pip install 'd2m[{extra}]'"
            ), 2
        if "pip install" not in str(error):
            return _fault(error), 1
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f" {str(error.filename)!r}" if error.filename is not None else ""
        if error.errno in FULL:
            if "disk" in error.strerror:  # one of our own sentences
                return one_line(error.strerror), 2
            return (
                f"cannot write{where}: {error.strerror.lower()}; free some space and run again,"
                " a conversion with --resume"
            ), 2
        return f"cannot use{where}: {error.strerror.lower()}; check the path and its rights", 2
    if isinstance(error, (ValueError, FileNotFoundError, ImportError, OSError)) and str(error):
        return one_line(str(error)), 2
    return _fault(error), 1


def _fault(error: BaseException) -> str:
    return (
        f"unexpected {type(error).__name__}: {one_line(str(error))}; "
        "this is a fault in d2m: run again with --debug and report the traceback"
    )


def one_line(text: str) -> str:
    """The text with line breaks and runs of spaces folded, without a closing full stop."""
    return " ".join(text.split()).removesuffix(".")
