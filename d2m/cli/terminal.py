"""What a person at the terminal reads: tables, answers, errors as one sentence.

Progress and errors go to stderr, so that stdout holds the answer alone and `--json` is pure JSON.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from d2m.distill.processes import ProcessLost
from d2m.distill.stopping import Terminated

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, the largest file allowed


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


def print_answer(answer: Mapping[str, Any], as_json: bool) -> None:
    """The answer of a command, as JSON or as indented lines."""
    print_json(answer) if as_json else print_tree(answer)


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


def explain(error: BaseException, resumes: bool = False) -> tuple[str, int]:
    """(one sentence, exit code) for an error: 2 the user's, 130 Ctrl-C, 143 SIGTERM, 1 ours.

    resumes: whether the command that failed continues with --resume.
    """
    if isinstance(error, KeyboardInterrupt):
        ended = isinstance(error, Terminated)
        sentence = "stopped by SIGTERM" if ended else "interrupted"
        sentence += "; continue with --resume" if resumes else ""
        return one_line(str(error)) or sentence, 143 if ended else 130
    if isinstance(error, ProcessLost):
        return one_line(str(error)), 1
    if hasattr(error, "format_message"):  # a click usage error, click's own or the one in typer
        return f"{one_line(error.format_message())}; see d2m COMMAND --help", 2
    if isinstance(error, ModuleNotFoundError) and error.name and "pip install" not in str(error):
        from runtime.files.extras import EXTRAS, need

        module = error.name.split(".")[0]
        if module not in EXTRAS:
            return _fault(error), 1
        missing = f"this command needs the Python package {module}, which is not installed"
        return need(EXTRAS[module], missing), 2
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f" {str(error.filename)!r}" if error.filename is not None else ""
        if error.errno in FULL:
            if "disk" in error.strerror:  # one of our own sentences
                return one_line(error.strerror), 2
            again = "continue with --resume" if resumes else "run again"
            return f"cannot write{where}: {error.strerror.lower()}; free some space and {again}", 2
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
