"""`report.html`: a report's dict as one page without scripts and without anything from outside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from d2m.report.charts import interval_chart
from d2m.report.pareto import pareto
from d2m.report.routing import block_choices, dead, positions
from d2m.report.section import Chart
from d2m.report.training import experts, importance, training
from d2m.units import count_text, duration, percent, power

Report = Mapping[str, Any]

_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


def render(report: Report) -> str:
    """The page of a report as made by `d2m.report.build.build_report`; parts without data are left
    out.

    ValueError if an image is no PNG data URI (nothing else may reach an image's source).
    """
    for row in report["images"]:
        for side in ("dense", "sparse"):
            if not _PNG.fullmatch(row[side]):
                raise ValueError(
                    f"the {side} image of {row['prompt']!r} is {row[side][:30]!r}..., expected a "
                    "PNG data URI; make it with d2m.report.build.data_uri."
                )
    makers = (pareto, training, experts, positions, block_choices, dead, importance)
    sections = [part for make in makers if (part := make(report))]
    return page("report.html.j2", report=report, scores=scores(report), sections=sections)


def page(template: str, folder: Path | None = None, **facts: Any) -> str:
    """A template of `folder` (this file's by default) filled in: text is escaped, charts are not.

    Templates extend base.html.j2; what a template asks for and does not get is an error.
    """
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([folder or here, here]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (duration, count_text, percent, power)}
    return environment.get_template(template).render(**facts).strip() + "\n"


def scores(report: Report) -> dict[str, Any] | None:
    """Scores by category with their intervals: a chart, and rows (category, a rate per side)."""
    sides = [side for side in ("dense", "sparse") if side in report["scores"]]
    if not sides:
        return None
    results = [report["scores"][side] for side in sides]
    categories = dict.fromkeys(name for result in results for name in result["categories"])
    rows = [(c.replace("_", " "), [r["categories"].get(c) for r in results]) for c in categories]
    rows.append(("overall", [result["overall"] for result in results]))
    dots = [(c, [r and (r["score"], r["low"], r["high"]) for r in rates]) for c, rates in rows]
    chart = interval_chart(
        dots,
        sides,
        x_label="share of images judged right",
        title="Scores by category, with 95 % intervals",
    )
    return {"sides": sides, "results": results, "rows": rows, "chart": Chart("", [chart])}
