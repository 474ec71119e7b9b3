"""A latency budget: the measured setting that fits into some seconds and is nearest to the best.

The table of measurements is a file, bound to bundle, machine, backend and size of image;
runtime.measure.latency writes it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.files.checked_json import parse_json
from runtime.files.hashes import cache_dir, write_cached
from runtime.program.threads import physical_cores
from runtime.request import Request, show

KNOBS = ("steps", "top_k", "kappa")
MAX_TABLE = 4 << 20  # bytes


class Unmeasured(ValueError):
    """There is no table for such a call; the sentence names paths of this machine."""


def within(
    key: Mapping[str, Any],
    bundle: Path,
    request: Request,
    budget: float,
    knobs: Mapping[str, Any],
) -> dict[str, Any]:
    """steps, top_k and kappa for a request of which `knobs` were given; None: to be picked.

    `key`: what the call is measured by (`key_of`); bundle: its path, which errors name. Raises
    ValueError where nothing was measured for such a request, or nothing fits.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise ValueError(f"budget is {show(budget)}, expected seconds above 0.")
    given = {name: value for name, value in knobs.items() if value is not None}
    if request.sigmas is not None:
        given["steps"] = len(request.sigmas)
    for name, value in given.items():
        if isinstance(value, list | tuple | np.ndarray):
            raise ValueError(
                f"{name} is {show(value)} with a budget, expected one number or none: lists were"
                " not measured."
            )
    row = pick(read_table(key, bundle), budget, given)
    return {name: row[name] for name in KNOBS}


def pick(
    table: Mapping[str, Any], budget: float, given: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The row nearest to the bundle's own setting whose slowest drawing took `budget` at most.

    `given`: knobs that are settled. Raises ValueError where no row is left.
    """
    given = given or {}
    rows = [r for r in table["rows"] if all(r[name] == value for name, value in given.items())]
    key = table["for"]
    what = (
        f"{key['images']} image{'s' if key['images'] > 1 else ''} of {key['width']} x"
        f" {key['height']} on {key['backend']}"
    )
    if not rows:
        asked = ", ".join(f"{name} {value}" for name, value in given.items())
        raise ValueError(
            f"the budget's table has no {asked} among what was measured for {what}; measure it"
            f" with: d2m measure --{next(iter(given)).replace('_', '-')} ..."
        )
    fitting = [row for row in rows if row["slowest"] <= budget]
    if not fitting:
        quick = min(rows, key=lambda row: row["slowest"])
        took = ", ".join(f"{name} {quick[name]}" for name in KNOBS if quick[name] is not None)
        raise ValueError(
            f"budget is {budget:g} s, but the fastest of {len(rows)} measured settings took"
            f" {quick['slowest']:.3g} s for {what} ({took}), expected that much at least; give it"
            " more time or draw a smaller picture."
        )
    best: dict[str, Any] = min(fitting, key=lambda row: (row["deviation"], row["slowest"]))
    return best


def write_table(table: Mapping[str, Any]) -> None:
    """Keep a table in the user's cache; ValueError where there is none, OSError."""
    write_cached(place_of(table["for"]), json.dumps(table, indent=1))


def read_table(key: Mapping[str, Any], bundle: Path) -> dict[str, Any]:
    """What was measured for this bundle, machine, backend and size; ValueError for nothing."""
    place = place_of(key)
    height, width, images = key["height"], key["width"], key["images"]
    size = f"--height {height} --width {width}" + (f" -n {images}" if images > 1 else "")
    cure = f"measure it with: d2m measure {bundle} --backend {key['backend']} {size}"
    try:
        with open(place, "rb") as file:
            table = parse_json(file.read(MAX_TABLE))
    except FileNotFoundError:
        raise Unmeasured(
            f"no budget was measured for {images} image{'s' if images > 1 else ''} of {width} x"
            f" {height} from this bundle on this machine; {cure}"
        ) from None
    except ValueError as error:
        raise Unmeasured(f"the budget's table {place} is no JSON ({error}); {cure}") from None
    if not isinstance(table, dict) or table.get("for") != key or not sound(table.get("rows")):
        raise Unmeasured(f"the budget's table {place} is not what was written there; {cure}")
    return table


def sound(rows: Any) -> bool:
    """Whether rows have their numbers."""
    fields = ("steps", "slowest", "deviation")
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and row.keys() >= {*KNOBS, "slowest", "deviation"}
        and all(type(row[name]) in (int, float) for name in fields)
        for row in rows
    )


def key_of(setting: Mapping[str, Any], height: int, width: int, images: int) -> dict[str, Any]:
    """What a table is bound to; `setting` is that of an opened bundle."""
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
    found: dict[str, Any] = {"processor": (rows or [platform.processor()])[0], "gpus": gpus}
    found |= {"machine": platform.machine(), "cores": physical_cores(), "onnxruntime": None}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found["onnxruntime"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def lines_of(path: Path, field: str) -> list[str]:
    """The values of `field: value` in a file of /proc; [] where there is none."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    pairs = (line.partition(":") for line in text.splitlines())
    return [value.strip() for name, _, value in pairs if name.strip() == field]


def place_of(key: Mapping[str, Any]) -> Path:
    """The file of the user's cache that holds a key's table; ValueError where there is no cache."""
    base = cache_dir()
    if base is None:
        raise ValueError(
            "D2M_CACHE is empty, expected a directory where the budget's table is kept; set it."
        )
    text = json.dumps(key, sort_keys=True)
    return base / "budgets" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
