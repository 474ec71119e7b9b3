"""A latency budget: how many steps, experts and blocks fit into some seconds, from measurements.

`measure` generates the same images with fewer steps, experts and blocks than the bundle's own, and
notes for each setting how long it took and how far its images are from those of the bundle's own
setting. runtime.latency_budget picks from the table that is written.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.images.given import example_images
from runtime.latency_budget import KNOBS, table_key, write_table
from runtime.request import check_request, whole_number

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

PROMPTS = ("a photo of a red circle", "a photo of two blue squares above a green triangle")
STEPS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 50)
Setting = tuple[int, int | None, int | None]  # steps, top_k, kappa


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
    """Generate with every combination of the knobs; write the table for a budget and return it.

    `images` at a time of every prompt, `repeats` times; the combinations take turns, so that a busy
    moment slows all of them. Lists left out: up to the bundle's own value. A row holds steps,
    top_k, kappa, seconds (median), slowest, and deviation: the root mean square difference of
    colour values (0 to 1) from images of the bundle's own setting, same noise, which is always
    among the rows with 0. Raises ValueError, or OSError where the table cannot be written.
    """
    manifest = pipeline.manifest
    repeats = whole_number(repeats, "repeats", 1, 1000)
    given = example_images(manifest)
    own = check_request(manifest, list(prompts), height=height, width=width, n=images, **given)
    first: Setting = (len(own.top_k), own.top_k[0], own.kappa[0])
    lists: tuple[Sequence[Any], ...] = (
        steps or [count for count in STEPS if count < first[0]],
        top_k or below(manifest.get("top_k_choices") or [], first[1]),
        kappa or below(range(1, (first[2] or 0) + 1), first[2]),
    )
    # Without duplicates, and each list with the bundle's own value.
    choices = [sorted({*given, value} - {None}) or [None] for given, value in zip(lists, first)]
    settings = list(dict.fromkeys([first, *itertools.product(*choices)]))
    for each in settings:  # all are checked before the first is generated
        check_request(manifest, prompts[0], **named(each), **given)
    size: dict[str, Any] = {"height": own.height, "width": own.width, "n": images, **given}
    for count in dict.fromkeys(setting[1] for setting in settings):  # sessions open here
        pipeline(prompts[0], **named((1, count, first[2])), **size)
    # Settings take turns inside every prompt, and the first of them is the reference of the others.
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
            values = pixels(answer)
            reference = values if reference is None else reference
            errors[each].append(float(np.mean((values - reference) ** 2)))
            done += 1
    if progress:
        progress("measure", done, total)
    table: dict[str, Any] = {
        "for": table_key(pipeline.setting(), own.height, own.width, images),
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
    write_table(table)
    return table


def below(values: Sequence[int], own: int | None) -> list[int | None]:
    """The values up to the bundle's own; [None] where it has no such knob."""
    return [None] if own is None else [value for value in values if value <= own]


def named(setting: Setting) -> dict[str, Any]:
    """A setting as a call's arguments."""
    return dict(zip(KNOBS, setting, strict=True))


def pixels(images: Any) -> np.ndarray:
    """Colour values from 0 to 1, float64."""
    listed = images if isinstance(images, list) else [images]
    return np.stack([np.asarray(image, np.float64) / 255 for image in listed])


def columns(table: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """A table for people, fastest first, and which rows a budget would never pick."""
    rows = sorted(table["rows"], key=lambda row: (row["slowest"], row["deviation"]))
    lines, best = [], float("inf")
    for row in rows:
        picked = row["deviation"] < best
        best = min(best, row["deviation"])
        knobs = ["" if row[name] is None else str(row[name]) for name in KNOBS]
        times = [f"{row['seconds']:.3g}", f"{row['slowest']:.3g}", f"{row['deviation']:.4f}"]
        lines.append([*knobs, *times, "yes" if picked else ""])
    return [*KNOBS, "seconds", "slowest", "deviation", "picked"], lines
