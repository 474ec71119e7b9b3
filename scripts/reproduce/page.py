"""The summary as a page that loads nothing, and as a plot: report.html and pareto.svg."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2m.report.charts import alone, heat_map
from d2m.report.page import page
from d2m.report.pareto import chart, pareto
from d2m.report.section import Chart, ColourScale, Section, Table
from d2m.report.training import RISING, rising
from d2m.units import count_text
from scripts.reproduce.tables import HEAD, cells, found, short

Summary = Mapping[str, Any]
WIDTH = 860  # of the plot, in pixels: a README's column


def pareto_svg(summary: Summary) -> str | None:
    """Score against both costs as the text of an .svg file; None where no row was judged."""
    svg = chart(summary["rows"], WIDTH)
    return alone(svg) if svg else None


def render(summary: Summary) -> str:
    """The page; parts without data are left out."""
    judged = [row for row in summary["rows"] if row["score"]]
    facts = {
        "judged": judged,
        "states": [check["state"] for check in summary["checks"]],
        "rows": Table(HEAD, [cells(row) for row in summary["rows"]], text_columns=3),
        "pareto": pareto({"pareto": summary["rows"]}),
        "kinds": {check["kind"]: check["test"] for check in summary["checks"]},
        "categories": categories(judged) if judged else None,
        "seeds": seeds(judged) if judged else None,
    }
    return page("page.html.j2", Path(__file__).parent, summary=summary, found=found, **facts)


def categories(judged: list[Mapping[str, Any]]) -> Section:
    """Scores by category, a row per model."""
    names = list(dict.fromkeys(name for row in judged for name in row["categories"]))
    words = [name.replace("_", " ") for name in names]
    scores = heat_map(
        [row["name"] for row in judged],
        words,
        [[row["categories"].get(name, {}).get("score", 0.0) for name in names] for row in judged],
        level=rising(0.0, 1.0),
        x_label="category",
        title="Score of every row by category",
        cell=(116, 18),
    )
    body = []
    for row in judged:
        rates = [row["categories"].get(name) for name in names]
        figures = [
            f"{short(r['score'])} ({short(r['low'])} – {short(r['high'])})" if r else ""
            for r in rates
        ]
        body.append([row["name"], *figures])
    charts = [Chart("Score by category", [scores], ColourScale(RISING, "0 %", "", "100 %"))]
    table = Table(("row", *words), body)
    return Section("Categories", "95 % Wilson intervals.", charts, table=table)


def seeds(judged: list[Mapping[str, Any]]) -> Section:
    """Every seed's own score: how much one training differs from the next."""
    every = sorted({seed for row in judged for seed in row["seeds"]})
    body = []
    for row in judged:
        scores = [short(row["per_seed"].get(str(seed))) for seed in every]
        body.append([row["name"], *scores, count_text(row["total_params"]), f"{row['steps']:,}"])
    head = ("row", *(f"seed {seed}" for seed in every), "all parameters", "steps")
    note = "Seeds differ in training and in captions. Steps: those of the row it starts from too."
    return Section("Seed by seed", note, table=Table(head, body))
