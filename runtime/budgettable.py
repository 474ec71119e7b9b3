"""A budget's measurements in a file, bound to bundle, machine, backend and size of picture."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.files.checked_json import parse_json
from runtime.files.hashes import cache_dir, write_cached
from runtime.threads import physical_cores, thread_count

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

KNOBS = ("steps", "top_k", "kappa")
MAX_TABLE = 4 << 20  # bytes


class Unmeasured(ValueError):
    """There is no table for such a call; the sentence names paths of this machine."""


def write_table(table: Mapping[str, Any]) -> None:
    """Keep a table in the user's cache; ValueError where there is none, OSError."""
    write_cached(place_of(table["for"]), json.dumps(table, indent=1))


def read_table(pipeline: Pipeline, height: int, width: int, images: int) -> dict[str, Any]:
    """What was measured for this bundle, machine, backend and size; ValueError for nothing."""
    key = key_of(pipeline, height, width, images)
    place = place_of(key)
    size = f"--height {height} --width {width}" + (f" -n {images}" if images > 1 else "")
    cure = f"measure it with: d2m measure {pipeline.bundle.path} --backend {key['backend']} {size}"
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


def key_of(pipeline: Pipeline, height: int, width: int, images: int) -> dict[str, Any]:
    """What a table is bound to."""
    row = pipeline.bundle.component("transformer")
    size = pipeline.manifest["files"][row["weights"]]["size"]
    return {
        "bundle": pipeline.bundle.digest,
        "backend": pipeline.backend,
        "machine": machine(),
        "threads": thread_count(pipeline.threads, size),
        "offload": pipeline.offload,
        "experts": pipeline.experts,
        "mode": pipeline.mode,
        "max_batch": pipeline.max_batch,
        "min_batch": pipeline.min_batch,
        "height": height,
        "width": width,
        "images": images,
    }


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
