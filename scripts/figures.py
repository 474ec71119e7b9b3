"""What the scripts share: options, the machine, works that take turns, the file of figures."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from runtime.files.atomic import write_json

ROOT = Path(__file__).resolve().parents[1]
Name = TypeVar("Name")
Result = TypeVar("Result")


def options(document: str | None, json: str | None = None) -> argparse.ArgumentParser:
    """A parser with the first line of a module's docstring, and --json FILE (below results/)."""
    parser = argparse.ArgumentParser(description=(document or "").splitlines()[0])
    default = ROOT / "results" / json if json else None
    parser.add_argument("--json", type=Path, default=default, help="file to write the figures to")
    return parser


def machine(threads: int, *libraries: str) -> dict[str, Any]:
    """What figures were measured on: cores, load, releases of Python and of `libraries`."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpus": cpus,
        "threads": threads,
        "load": [round(value, 1) for value in os.getloadavg()],
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: importlib.import_module(name).__version__ for name in libraries},
    }


def write_figures(path: Path, module: str, answer: Mapping[str, Any]) -> None:
    """Write the answer of `python -m MODULE ...` with its command line and the date."""
    command = " ".join(["python", "-m", module, *sys.argv[1:]])
    write_json(path, {"command": command, "date": date.today().isoformat(), **answer})


def fill(template: Path, **facts: Any) -> str:
    """A Markdown template filled in; what it asks for and does not get is an error."""
    from jinja2 import Environment, StrictUndefined

    blocks: Any = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(undefined=StrictUndefined, **blocks)
    return environment.from_string(template.read_text("utf-8")).render(**facts)


def in_turns(
    works: Mapping[Name, Callable[[int], Result]], runs: int, warm_up: int = 1
) -> dict[Name, list[Result]]:
    """What every work returned in each of `runs` turns, so that a busy machine slows all of them.

    A work is called with the number of the turn; those of the `warm_up`, below 0, do not count.
    """
    found: dict[Name, list[Result]] = {name: [] for name in works}
    for turn in range(-warm_up, runs):
        for name, work in works.items():
            result = work(turn)
            if turn >= 0:
                found[name].append(result)
    return found


def ratios(slow: Sequence[float], fast: Sequence[float], name: str = "speedup") -> dict[str, Any]:
    """The median of slow over fast, turn by turn, and its range."""
    found = [one / other for one, other in zip(slow, fast, strict=True)]
    bounds = [round(min(found), 3), round(max(found), 3)]
    return {name: round(statistics.median(found), 3), f"{name}_range": bounds}


def cpu_session(model: bytes | str, threads: int) -> Any:
    """An ONNX Runtime session of a model (bytes or path) on the CPU."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
