"""The report of a conversion.

A dict of everything that was measured enters, report.json and report.html leave.

    build     The report of a conversion: `report.json` holds every number of it, `report.html`
              shows them
    page      `report.html`: a report's dict as one page without scripts and without anything from
              outside
    training  The report's sections of charts: training, experts, importance
    routing   The sections of a report on what is chosen where: experts by place, blocks, dead
              experts
    pareto    Score against cost: models and their knobs as dots over FLOPs and over activated
              parameters
    charts    Charts as SVG, drawn by matplotlib from plain numbers; colours and fonts come from
              the page
    section   A headed part of a page: charts, their keys and a table, as base.html.j2 writes them
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from d2m.report.build import build_report

__all__ = ["build_report"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "build_report": "d2m.report.build",
    },
)
