"""A latency budget: the measured setting that fits into some seconds and is nearest to the best.

The table of measurements is a file for one bundle, machine, backend and size of image;
runtime.measure.latency writes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.files.checked_json import parse_json, show
from runtime.files.hashes import cache_dir, write_cached
from runtime.program.threads import physical_cores
from runtime.request import Request

KNOBS = ("steps", "top_k", "kappa")
MAX_TABLE = 4 << 20  # bytes


class NotMeasured(ValueError):
    """There is no table for such a call; the sentence names paths of this machine."""


def pick_knobs(
    key: Mapping[str, Any], bundle: Path, request: Request, budget: float, given: Mapping[str, Any]
) -> dict[str, Any]:
    """steps, top_k and kappa for a request, of which those not None in `given` are fixed.

    `key`: what the call is measured by (`table_key`); bundle: its path, which errors name. Raises
    ValueError where nothing was measured for such a request, or nothing fits.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise ValueError(f"budget is {show(budget)}, expected seconds above 0.")
    fixed = {name: value for name, value in given.items() if value is not None}
    if request.sigmas is not None:
        fixed["steps"] = len(request.sigmas)
    for name, value in fixed.items():
        if isinstance(value, list | tuple | np.ndarray):
            raise ValueError(
                f"{name} is {show(value)} with a budget, expected one number or none: lists were"
                " not measured."
            )
    row = pick_row(read_table(key, bundle), budget, fixed)
    return {name: row[name] for name in KNOBS}


def pick_row(
    table: Mapping[str, Any], budget: float, fixed: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The row nearest to the bundle's own setting whose slowest run took at most `budget` seconds.

    `fixed`: knobs that are given. Raises ValueError where no row is left.
    """
    fixed = fixed or {}
    rows = [r for r in table["rows"] if all(r[name] == value for name, value in fixed.items())]
    key = table["for"]
    what = f"{images_of(key)} on {key['backend']}"
    if not rows:
        missing = ", ".join(f"{name} {value}" for name, value in fixed.items())
        raise ValueError(
            f"the budget's table has no {missing} among what was measured for {what}; measure it"
            f" with: d2m measure --{next(iter(fixed)).replace('_', '-')} ..."
        )
    fitting = [row for row in rows if row["slowest"] <= budget]
    if not fitting:
        fastest = min(rows, key=lambda row: row["slowest"])
        knobs = ", ".join(f"{name} {fastest[name]}" for name in KNOBS if fastest[name] is not None)
        raise ValueError(
            f"budget is {budget:g} s, but the fastest of {len(rows)} measured settings took"
            f" {fastest['slowest']:.3g} s for {what} ({knobs}), expected that much at least; give"
            " it more time or generate a smaller image."
        )
    best: dict[str, Any] = min(fitting, key=lambda row: (row["deviation"], row["slowest"]))
    return best


def images_of(key: Mapping[str, Any]) -> str:
    """What a table is about, for messages: 2 images of 64 x 32."""
    return (
        f"{key['images']} image{'s' if key['images'] > 1 else ''} of {key['width']} x"
        f" {key['height']}"
    )


def write_table(table: Mapping[str, Any]) -> None:
    """Write a table to the user's cache; ValueError where there is none, OSError."""
    write_cached(table_path(table["for"]), json.dumps(table, indent=1))


def read_table(key: Mapping[str, Any], bundle: Path) -> dict[str, Any]:
    """What was measured for this bundle, machine, backend and size; ValueError for nothing."""
    path = table_path(key)
    size = f"--height {key['height']} --width {key['width']}"
    size += f" -n {key['images']}" if key["images"] > 1 else ""
    cure = f"measure it with: d2m measure {bundle} --backend {key['backend']} {size}"
    try:
        with open(path, "rb") as file:
            table = parse_json(file.read(MAX_TABLE))
    except FileNotFoundError:
        raise NotMeasured(
            f"no budget was measured for {images_of(key)} from this bundle on this machine; {cure}"
        ) from None
    except ValueError as error:
        raise NotMeasured(f"the budget's table {path} is no JSON ({error}); {cure}") from None
    if not isinstance(table, dict) or table.get("for") != key or not valid(table.get("rows")):
        raise NotMeasured(f"the budget's table {path} was changed after it was written; {cure}")
    return table


def valid(rows: Any) -> bool:
    """Whether all rows of a table have their numbers."""
    fields = ("steps", "slowest", "deviation")
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and row.keys() >= {*KNOBS, "slowest", "deviation"}
        and all(type(row[name]) in (int, float) for name in fields)
        for row in rows
    )


def table_key(setting: Mapping[str, Any], height: int, width: int, images: int) -> dict[str, Any]:
    """What a table holds for; `setting` is that of an opened bundle."""
    size = {"height": height, "width": width, "images": images}
    return {**setting, "machine": machine(), **size}


def machine() -> dict[str, Any]:
    """The processor, its cores, the GPUs and the release of ONNX Runtime."""
    rows = lines_of(Path("/proc/cpuinfo"), "model name")
    gpus = [
        name
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        for name in lines_of(path, "Model")
    ]
    return {
        "processor": (rows or [platform.processor()])[0],
        "gpus": gpus,
        "machine": platform.machine(),
        "cores": physical_cores(),
        "onnxruntime": next(iter(releases("onnxruntime-gpu", "onnxruntime").values()), None),
    }


def releases(*distributions: str) -> dict[str, str]:
    """Distribution -> its release, of those that are installed."""
    found = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def lines_of(path: Path, field: str) -> list[str]:
    """The values of `field: value` in a file of /proc; [] where there is none."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    pairs = (line.partition(":") for line in text.splitlines())
    return [value.strip() for name, _, value in pairs if name.strip() == field]


def table_path(key: Mapping[str, Any]) -> Path:
    """The file of the user's cache that holds a key's table; ValueError where there is no cache."""
    base = cache_dir()
    if base is None:
        raise ValueError("D2M_CACHE is empty, expected a directory for the budget's table; set it.")
    text = json.dumps(key, sort_keys=True)
    return base / "budgets" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
