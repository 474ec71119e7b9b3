"""The summary as Markdown: table.md, and the section of docs/results.md between two comments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2m.units import count_text
from runtime.files.atomic import write_text
from scripts.figures import fill

BEGIN, END = "<!-- by python -m scripts.reproduce --table -->", "<!-- /reproduce -->"
SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.S)
HEAD = ("row", "what", "seeds", "score (95 %)", "of dense", "activated", "FLOPs of dense")
NOT_RUN = "not run yet"

Summary = Mapping[str, Any]


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table, as words under HEAD."""
    words = [row["name"], row["says"], ", ".join(map(str, row["seeds"]))]
    if row["score"] is None:
        return [*words, NOT_RUN, "", "", ""]
    share = row["of_dense"]
    of_dense = "1" if row["kind"] == "dense" else short(share["value"]) if share else "no dense"
    cost = [count_text(row["activated_params"]), short(row["flops_vs_dense"])]
    return [*words, interval(row["score"]), of_dense, *cost]


def short(share: float | None) -> str:
    """.827; 1 where nothing is missing from it."""
    return "" if share is None else "1" if share == 1 else f"{share:.3f}".removeprefix("0")


def interval(rate: Mapping[str, float], middle: str = "score") -> str:
    """`.827 (.794 to .855)`, the brackets where there is an interval."""
    words = _signed(rate[middle])
    if rate["low"] is None:
        return words
    return f"{words} ({_signed(rate['low'])} to {_signed(rate['high'])})"


def found(check: Mapping[str, Any]) -> str:
    """What an expectation was read from, in words."""
    if not check["seeds"]:
        return ""
    # In the order of the sentence: the JSON's keys are sorted.
    names = sorted(check["scores"], key=check["expected"].split().index)
    words = " against ".join(f"{name} {short(check['scores'][name]['score'])}" for name in names)
    doubt = "" if check["certain"] else "; within chance"
    figure = check["figure"]
    if names[-1] != "dense":
        return f"{words}; difference {interval(figure, 'value')}{doubt}"
    share = "none" if figure["value"] is None else f"{figure['value']:.4f}"  # .9496 is not .95
    bounds = (
        "" if figure["low"] is None else f" ({short(figure['low'])} to {short(figure['high'])})"
    )
    return f"{words}; ratio {share.removeprefix('0')}{bounds}{doubt}"


def table(summary: Summary, marks: tuple[str, str] | None = None, plot: str | None = None) -> str:
    """table.md: every row, every expectation, every seed; with `marks` the section between them."""
    seeds = {
        row["name"]: [f"{seed}: {short(score)}" for seed, score in row["per_seed"].items()]
        for row in summary["rows"]
        if row["score"]
    }
    facts = {"cells": cells, "found": found, "head": HEAD, "made": _made(summary), "seeds": seeds}
    facts |= {"wide": max(map(len, seeds.values()), default=0), "marks": marks, "plot": plot}
    return fill(Path(__file__).with_name("table.md.j2"), summary=summary, **facts)


def section(summary: Summary, plot: str | None) -> str:
    """What docs/results.md holds between BEGIN and END. plot: path of the plot, if there is."""
    return table(summary, (BEGIN, END), plot)


def write_section(document: Path, summary: Summary, plot: str | None) -> None:
    """Put the section between its comments; ValueError where the file has no such comments."""
    text = document.read_text("utf-8")
    if not SECTION.search(text):
        raise ValueError(f"{document} has no {BEGIN!r} ... {END!r}; put both where the table goes.")
    write_text(document, SECTION.sub(lambda match: section(summary, plot), text))


# ---------------------------------------------------------------- words


def _signed(value: float) -> str:
    return f"-{short(-value)}" if value < 0 else short(value)


def _made(summary: Summary) -> str:
    rows = [row for row in summary["rows"] if row["score"]]
    if not rows:
        return "No row has been run yet."
    days = summary["dates"]
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    steps = sorted({row["steps"] for row in rows if row["steps"]})
    images = sorted({row["score"]["n"] // len(row["seeds"]) for row in rows})
    budget = f"{_range(steps)} training steps, " if steps else ""
    return (
        f"{budget[:1].upper()}{budget[1:]}{_range(images)} images a row and seed; {when}; "
        f"{'; '.join(summary['machines'])}."
    )


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"
