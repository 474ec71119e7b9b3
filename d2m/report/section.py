"""A headed part of a page: charts, their keys and a table, as base.html.j2 writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class ColourScale:
    """The colours of a heat map in a row, named at both ends and in the middle."""

    colours: Sequence[str]
    low: str
    middle: str
    high: str


@dataclass(frozen=True)
class Chart:
    """Drawings under one caption, with the key of their colours."""

    caption: str
    svgs: Sequence[Markup]
    scale: ColourScale | None = None


@dataclass(frozen=True)
class Table:
    """The first `text_columns` columns are text, the others figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text_columns: int = 1


@dataclass(frozen=True)
class Section:
    """`layout`: a class of report.css that says how charts share a row: charts, maps or stack."""

    title: str
    note: str
    charts: Sequence[Chart] = ()
    layout: str = "maps"
    table: Table | None = None
