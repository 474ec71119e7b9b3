"""Score against cost: models and their knobs as dots over FLOPs and over activated parameters.

A row is a dict of JSON values: name, kind (of KINDS), of (the row of whose model it is a setting,
or None), score (a rate of `calib.shapes.suite`: score, low, high, n; or None), flops_vs_dense and
activated_params. `scripts/reproduce/__main__.py` writes a list of them, `rows`, into summary.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from d2m.plan.count import plan
from d2m.recipe.records import check, number
from d2m.report.charts import PERCENT, Dot, Kind, Panel, scatter_chart
from d2m.report.section import Chart, Section
from d2m.units import count_text
from runtime.files.checked_json import read_json

Row = Mapping[str, Any]


KINDS = {
    "this": Kind("this model", 4, "diamond"),
    "dense": Kind("dense", 3, "square"),
    "sparse": Kind("Dense2MoE", 0),
    "pruned": Kind("pruned", 1, "square"),
    "variant": Kind("made another way", 2, "triangle"),
    "knob": Kind("setting of a knob, no training", 0, hollow=True),
}
# key of a row -> heading, title of the axis, a tick's words
COSTS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "flops_vs_dense": ("Score against FLOPs", "FLOPs of a step, share of dense", PERCENT),
    "activated_params": (
        "Score against activated parameters",
        "activated parameters",
        lambda x: count_text(int(x)),
    ),
}


def known_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The judged rows of a summary.json; FileNotFoundError or ValueError, in one sentence."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is no file; give the summary.json that scripts/reproduce/__main__.py writes."
        )
    rows: Any = read_json(path).get("rows")
    check(
        isinstance(rows, list),
        f"{path}: rows",
        rows,
        "a list, as scripts/reproduce/__main__.py writes",
    )
    return [_row(row, f"{path}: rows[{i}]") for i, row in enumerate(rows) if _judged(row)]


def own_rows(
    sparse: str | os.PathLike[str], name: str, scores: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of the model in directory `sparse` and of its dense one; scores as a report has them."""
    planned = plan(sparse)
    costs = {
        "dense": {"flops_vs_dense": 1.0, "activated_params": planned["dense"]["params"]},
        "sparse": {cost: planned[cost] for cost in COSTS},
    }
    names = {"dense": ("dense", "dense"), "sparse": (name, "this")}
    return [
        {"name": words, "kind": kind, "of": None, "score": scores[side]["overall"], **costs[side]}
        for side, (words, kind) in names.items()
        if side in scores
    ]


def merge_rows(own: Sequence[Row], known: Sequence[Row]) -> list[dict[str, Any]]:
    """Both lists as one; a known row whose name is taken is called `NAME (compared)`.

    The same model judged on other images has another score, so none takes another's place.
    """
    taken = {row["name"] for row in own}
    names = {row["name"]: row["name"] for row in known}
    names |= {name: f"{name} (compared)" for name in names if name in taken}
    renamed = [
        {**row, "name": names[row["name"]], "of": names.get(row["of"], row["of"])} for row in known
    ]
    return [*map(dict, own), *renamed]


def dots_of(rows: Sequence[Row], cost: str) -> list[Dot]:
    """A dot per judged row, at its `cost` (a key of COSTS)."""
    dots = []
    for row in filter(_judged, rows):
        score, low, high = (float(row["score"][figure]) for figure in ("score", "low", "high"))
        x, kind = float(row[cost]), KINDS[row["kind"]]
        dots.append(Dot(row["name"], kind, x, score, low, high, of=row["of"]))
    return dots


def chart(rows: Sequence[Row], width: int = 960) -> Markup | None:
    """Score against every cost, one below the other; None where no row was judged."""
    if not any(map(_judged, rows)):
        return None
    panels = {
        heading: Panel(dots_of(rows, cost), label, show)
        for cost, (heading, label, show) in COSTS.items()
    }
    return scatter_chart(panels, y_label="score", title="Score against cost", width=width)


def pareto(report: Mapping[str, Any]) -> Section | None:
    """The section of a report: its `pareto` rows against both costs."""
    rows = report.get("pareto") or ()
    svg = chart(rows)
    if not svg:
        return None
    sizes = sorted({row["score"]["n"] for row in rows if row["score"]})
    counts = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    note = (
        f"Share of images judged right, of {counts} a row, with 95 % Wilson intervals. The "
        "dashed line joins the models that no cheaper one beats; a solid one, a model and settings "
        "of its knobs. Rows of equal cost stand side by side."
    )
    return Section("Score against cost", note, [Chart("", [svg])], "stack")


# ---------------------------------------------------------------- what a file says


def _judged(row: Any) -> bool:
    return not isinstance(row, dict) or row.get("score") is not None


def _row(row: Any, place: str) -> dict[str, Any]:
    """The row with what a plot needs, its types checked."""
    check(isinstance(row, dict), place, row, "an object")
    check(isinstance(row.get("name"), str), f"{place}: name", row.get("name"), "a string")
    check(row.get("kind") in KINDS, f"{place}: kind", row.get("kind"), f"one of {', '.join(KINDS)}")
    of = row.get("of")
    check(of is None or isinstance(of, str), f"{place}: of", of, "a row's name or null")
    for name in COSTS:
        value = row.get(name)
        check(number(value) and value >= 0, f"{place}: {name}", value, "a number from 0 up")
    rate = row["score"]
    check(isinstance(rate, dict), f"{place}: score", rate, "an object")
    for name in ("score", "low", "high"):
        value = rate.get(name)
        check(number(value) and 0 <= value <= 1, f"{place}: score.{name}", value, "0 to 1")
    check(isinstance(rate.get("n"), int), f"{place}: score.n", rate.get("n"), "a whole number")
    kept = ("name", "kind", *COSTS)
    return {name: row[name] for name in kept} | {"of": of, "score": dict(rate)}
