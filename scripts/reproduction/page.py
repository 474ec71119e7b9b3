"""The summary as a page that loads nothing, and as a drawing: report.html and pareto.svg."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2m.charts import heat_map, scale
from d2m.figures import RISING
from d2m.markup import Child, Html, document, el, figure, join, percent, section, table
from d2m.pareto import charts, dots_of, pareto
from d2m.scatter import file_of
from d2m.units import human
from reproduction.tables import HEAD, cells, found, short

Summary = Mapping[str, Any]
WIDTH, HEIGHT = 860, 430  # of one chart of the drawing, in pixels: a README's column


def drawing(summary: Summary) -> str | None:
    """Score against both costs as the text of an .svg file; None where no row was judged."""
    drawn = charts(summary["rows"], WIDTH, HEIGHT)
    if not drawn:
        return None
    return file_of(drawn, dots_of(summary["rows"], "flops_vs_dense"), WIDTH, HEIGHT)


def render(summary: Summary) -> str:
    """The page; parts without data are left out."""
    foot = "Written by scripts/reproduce.py. The numbers are in summary.json and table.md."
    parts = (rows, pareto({"pareto": summary["rows"]}), checks, categories, seeds)
    body = [part(summary) if callable(part) else part for part in parts]
    return document("The paper's comparisons", header(summary), *body, el("footer", foot))


def header(summary: Summary) -> Html:
    """Title, how far the runs are, and which expectations are met."""
    judged = [row for row in summary["rows"] if row["score"]]
    states = [check["state"] for check in summary["checks"]]
    pictures = sum(row["score"]["n"] for row in judged)
    tiles = [
        (f"{len(judged)} of {len(summary['rows'])}", "rows run", f"{pictures:,} pictures judged"),
        (str(states.count("met")), "expectations met", f"of {len(states)}"),
        (str(states.count("not met")), "not met", ""),
        (str(states.count("not yet measured")), "not yet measured", ""),
    ]
    boxes = [
        el("div", el("b", value), el("span", name), el("small", note), class_="tile")
        for value, name, note in tiles
    ]
    what = (
        "Models made from the dense shapes teacher by the recipes of the Dense2MoE paper and of "
        "what it compares itself with, trained alike and judged on held-out captions."
    )
    where = f"{', '.join(summary['dates'])}: {'; '.join(summary['machines'])}" if judged else ""
    title = el("h1", "The paper's comparisons on the shapes teacher")
    return el("header", title, el("p", what), el("div", *boxes, class_="tiles"), el("p", where))


def rows(summary: Summary) -> Html:
    """The table."""
    note = (
        "Pictures of all seeds pooled, 95 % Wilson intervals; of dense: the score over the dense "
        "one's of the same seeds."
    )
    body: list[list[Child]] = [list(cells(row)) for row in summary["rows"]]
    return section("Rows", note, table(list(HEAD), body, words=3))


def checks(summary: Summary) -> Html:
    """The expectations, what they were tested by, and what came out."""
    head = ["expected", "", "found", "seeds"]
    body: list[list[Child]] = [
        [check["expected"], el("b", check["state"]), found(check), _list(check)]
        for check in summary["checks"]
    ]
    note = "Over the seeds that both rows have. Within chance: the interval holds the bound."
    kinds = {check["kind"]: check["test"] for check in summary["checks"]}
    tests = [join(el("dt", kind), el("dd", test)) for kind, test in kinds.items()]
    return section("Expectations", note, el("dl", *tests), table(head, body, words=4))


def categories(summary: Summary) -> Html | None:
    """Scores by category, a row per model."""
    judged = [row for row in summary["rows"] if row["score"]]
    names = list(dict.fromkeys(name for row in judged for name in row["categories"]))
    if not judged:
        return None
    values = [
        [row["categories"].get(name, {}).get("score", 0.0) for name in names] for row in judged
    ]
    drawn = heat_map(
        [row["name"] for row in judged],
        [name.replace("_", " ") for name in names],
        values,
        level=lambda share: RISING[round(share * (len(RISING) - 1))],
        show=lambda share: f"{percent(share, 1)} judged right",
        x_label="category",
        title="Score of every row by category",
        cell=(116, 18),
    )
    head: list[Child] = ["row", *(name.replace("_", " ") for name in names)]
    body: list[list[Child]] = []
    for row in judged:
        rates = [row["categories"].get(name) for name in names]
        words = [
            f"{short(r['score'])} ({short(r['low'])} – {short(r['high'])})" if r else ""
            for r in rates
        ]
        body.append([row["name"], *words])
    legend = scale(RISING, "0 %", "", "100 %", "Key: share of pictures judged right")
    picture = figure("Score by category", legend, el("div", drawn, class_="scroll"))
    return section("Categories", "95 % Wilson intervals.", picture, table(head, body))


def seeds(summary: Summary) -> Html | None:
    """Every seed's own score: how much one training differs from the next."""
    judged = [row for row in summary["rows"] if row["score"]]
    if not judged:
        return None
    every = sorted({seed for row in judged for seed in row["seeds"]})
    head: list[Child] = ["row", *(f"seed {seed}" for seed in every), "all parameters", "steps"]
    body: list[list[Child]] = []
    for row in judged:
        scores = [short(row["per_seed"].get(str(seed))) for seed in every]
        body.append([row["name"], *scores, human(row["total_params"]), f"{row['steps']:,}"])
    note = "Seeds differ in training and in captions. Steps: those of the row it starts from too."
    return section("Seed by seed", note, table(head, body))


def _list(check: Mapping[str, Any]) -> str:
    return ", ".join(map(str, check["seeds"]))
