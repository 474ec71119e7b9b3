"""A latency budget: how many steps, experts and blocks fit into some seconds, from measurements.

`measure` draws the same pictures with fewer steps, experts and blocks than the bundle's own, and
notes for each setting how long it took and how far its pictures are from those of the bundle's own
setting. `within` picks the setting that is nearest to it among those that fit. A table counts only
for the bundle, machine, backend and size of picture that it was measured with.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.arguments import Request, check_request, show, whole
from runtime.fields import parse_json
from runtime.hashes import cache_dir, write_cached
from runtime.threads import physical_cores, thread_count

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

PROMPTS = ("a photo of a red circle", "a photo of two blue squares above a green triangle")
STEPS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 50)
KNOBS = ("steps", "top_k", "kappa")
MAX_TABLE = 4 << 20  # bytes
Setting = tuple[int, int | None, int | None]  # steps, top_k, kappa


def within(
    pipeline: Pipeline, request: Request, budget: float, knobs: Mapping[str, Any]
) -> dict[str, Any]:
    """steps, top_k and kappa for a request of which `knobs` were given; None: to be picked.

    Raises ValueError where nothing was measured for such a request, or nothing fits.
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
    images = len(request.prompts)
    row = pick(read_table(pipeline, request.height, request.width, images), budget, given)
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


def measure(
    pipeline: Pipeline,
    *,
    height: int | None = None,
    width: int | None = None,
    images: int = 1,
    steps: Sequence[int] | None = None,
    top_k: Sequence[int] | None = None,
    kappa: Sequence[int] | None = None,
    repeats: int = 3,
    prompts: Sequence[str] = PROMPTS,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw with every combination of the knobs, write the table for `within`, and return it.

    `images` at a time of every prompt, `repeats` times; the combinations take turns, so that a busy
    moment slows all of them. Lists left out: up to the bundle's own value. A row holds steps,
    top_k, kappa, seconds (median), slowest, and deviation: the root mean square difference of
    colour values (0 to 1) from pictures of the bundle's own setting, same noise, which is always
    among the rows with 0. Raises ValueError, or OSError where the table cannot be written.
    """
    manifest = pipeline.manifest
    repeats = whole(repeats, "repeats", 1, 1000)
    own = check_request(manifest, list(prompts), height=height, width=width, n=images)
    first: Setting = (len(own.top_k), own.top_k[0], own.kappa[0])
    lists = (
        steps or [count for count in STEPS if count < first[0]],
        top_k or below(manifest.get("top_k_choices") or [], first[1]),
        kappa or below(range(1, (first[2] or 0) + 1), first[2]),
    )
    settings = list(dict.fromkeys([first, *itertools.product(*settled(lists, first))]))
    for each in settings:  # all are checked before the first is drawn
        check_request(manifest, prompts[0], **named(each))
    size: dict[str, Any] = {"height": own.height, "width": own.width, "n": images}
    for count in dict.fromkeys(setting[1] for setting in settings):  # sessions open here
        pipeline(prompts[0], **named((1, count, first[2])), **size)
    seconds: dict[Setting, list[float]] = {each: [] for each in settings}
    errors: dict[Setting, list[float]] = {each: [] for each in settings}
    done, total = 0, repeats * len(prompts) * len(settings)
    for seed, prompt in itertools.product(range(repeats), prompts):
        reference: np.ndarray | None = None
        for each in settings:
            if progress:
                progress("measure", done, total)
            began = time.perf_counter()
            answer = pipeline(prompt, seed=1000 * seed, **named(each), **size)
            seconds[each].append(time.perf_counter() - began)
            drawn = pixels(answer)
            reference = drawn if reference is None else reference
            errors[each].append(float(np.mean((drawn - reference) ** 2)))
            done += 1
    if progress:
        progress("measure", done, total)
    table: dict[str, Any] = {
        "for": key_of(pipeline, own.height, own.width, images),
        "date": time.strftime("%Y-%m-%d"),
        "repeats": repeats,
        "prompts": list(prompts),
        "rows": [
            {
                **dict(zip(KNOBS, each, strict=True)),
                "seconds": round(statistics.median(seconds[each]), 5),
                "slowest": round(max(seconds[each]), 5),
                "deviation": round(statistics.fmean(errors[each]) ** 0.5, 6),
            }
            for each in settings
        ],
    }
    write_cached(place_of(table["for"]), json.dumps(table, indent=1))
    return table


def below(values: Sequence[int], own: int | None) -> list[int | None]:
    """The values up to the bundle's own; [None] where it has no such knob."""
    return [None] if own is None else [value for value in values if value <= own]


def settled(lists: Sequence[Sequence[Any]], first: Setting) -> list[list[Any]]:
    """The lists without duplicates, each with the bundle's own value."""
    return [sorted({*given, own} - {None}) or [None] for given, own in zip(lists, first)]


def named(setting: Setting) -> dict[str, Any]:
    """A setting as a call's arguments."""
    return dict(zip(KNOBS, setting, strict=True))


def pixels(images: Any) -> np.ndarray:
    """Colour values from 0 to 1, float64."""
    listed = images if isinstance(images, list) else [images]
    return np.stack([np.asarray(image, np.float64) / 255 for image in listed])


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
        raise ValueError(
            f"no budget was measured for {images} image{'s' if images > 1 else ''} of {width} x"
            f" {height} from this bundle on this machine; {cure}"
        ) from None
    except ValueError as error:
        raise ValueError(f"the budget's table {place} is no JSON ({error}); {cure}") from None
    if not isinstance(table, dict) or table.get("for") != key or not sound(table.get("rows")):
        raise ValueError(f"the budget's table {place} is not what was written there; {cure}")
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


def columns(table: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """A table for people, fastest first, and which rows a budget would never pick."""
    rows = sorted(table["rows"], key=lambda row: (row["slowest"], row["deviation"]))
    out, best = [], float("inf")
    for row in rows:
        picked = row["deviation"] < best
        best = min(best, row["deviation"])
        knobs = ["" if row[name] is None else str(row[name]) for name in KNOBS]
        times = [f"{row['seconds']:.3g}", f"{row['slowest']:.3g}", f"{row['deviation']:.4f}"]
        out.append([*knobs, *times, "yes" if picked else ""])
    return [*KNOBS, "seconds", "slowest", "deviation", "picked"], out
