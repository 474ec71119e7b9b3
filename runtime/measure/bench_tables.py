"""The answer of `d2m bench` as tables: one of all figures, one of each bundle's blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = tuple[str, list[str], list[list[Any]]]
BLOCKS = ("block", "body", "calls", "run", "ms a call", "ms a step", "share", "weights MiB")


def tables(answer: Mapping[str, Any]) -> list[Table]:
    """(title, header, rows) of what `runtime.measure.bench.bench` returned."""
    both = [answer[name] for name in ("bundle", "vs") if name in answer]
    ratios = answer.get("ratios", {"cold": {}, "images": {}, "blocks": {}})
    last = ["ratio"] if "vs" in answer else []
    rows: list[list[Any]] = []

    def add(label: str, values: list[Any], ratio: Mapping[str, Any] | None = None) -> None:
        rows.append([label, *map(cell, values)] + [with_range(ratio)] * len(last))

    def cold(label: str, figure: str, ratio: str) -> None:
        add(label, [one["cold"][figure] for one in both], ratios["cold"].get(ratio))

    add("backend", [one["backend"] for one in both])
    cold("cold start to first image, s", "first_image_s", "first_image")
    cold("  interpreter and import, s", "start_s", "start")
    cold("  opening the bundle, s", "open_s", "open")
    cold("  generating, s", "generate_s", "generate")
    for batch in answer["bundle"]["images"]:
        found = ratios["images"].get(batch, {})
        images = [one["images"][batch] for one in both]
        add(f"an image, batch {batch}, s", [row["image_s"] for row in images], found.get("image"))
        steps = [row["steps_per_s"] for row in images]
        add(f"steps a second, batch {batch}", steps, found.get("step"))
    cold("most memory of a new process, MiB", "peak_mib", "peak")
    add("weights, MiB", [one["memory"]["weights_mib"] for one in both])
    add("held on the device, MiB", [one["memory"]["device_mib"] for one in both])
    names = [f"{one['name']} ({one['kind']})" for one in both]
    result: list[Table] = [(" against ".join(names), ["", *names, *last], rows)]
    for one in both:
        lines = [
            [
                *(row["type"], row["body"] or "-", row["calls"], row["run"]),
                *(row["call_ms"], row["step_ms"], f"{row['share']:.1%}", row["weights_mib"]),
                *([with_range(ratios["blocks"].get(row["type"]))] * len(last)),
            ]
            for row in one["blocks"]
        ]
        result.append((f"blocks of {one['name']}, one by one", [*BLOCKS, *last], lines))
    return result


def ratio_sentence(answer: Mapping[str, Any]) -> str:
    """Which way the column of ratios goes."""
    ours, other = (answer[name]["name"] for name in ("bundle", "vs"))
    if ours == other:
        ours, other = "the bundle", "the baseline"
    return (
        f"ratio: time or memory of {other} divided by that of {ours}, median and range over the"
        f" turns; above 1, {ours} is faster or smaller"
    )


def cell(value: Any) -> str:
    """A figure to four significant digits."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def with_range(ratio: Mapping[str, Any] | None) -> str:
    """A median with its range."""
    if ratio is None:
        return "-"
    low, high = ratio["range"]
    return f"{ratio['median']} ({low} to {high})"
