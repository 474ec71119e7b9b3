"""Charts as inline SVG, drawn from plain numbers; colours and fonts come from the page's style.

Classes instead of colours, so that one drawing is right on light and on dark paper: `c0`, `c1` ...
are categories, `d0`-`d10` a diverging scale with its middle at `d5`, `s0`-`s8` a rising one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d2m.axes import log_range, log_ticks, number, percent_tick, ticks
from d2m.canvas import BOTTOM, LEFT, RIGHT, TOP, Point, axis_titles, grid, path, svg, text_at
from d2m.markup import Html, el


@dataclass(frozen=True)
class Line:
    """A line of a chart. `band` is the area (x, low, high) around it; `faint` draws it dashed."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    faint: bool = False
    band: Sequence[tuple[float, float, float]] = ()


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_y: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    percent_x: bool = False,
    percent_y: bool = False,
    width: int = 460,
    height: int = 270,
) -> Html:
    """Lines over a shared x axis, with ticks, axis titles, and vertical `marks` (x, label).

    `title` is read out by screen readers. A logarithmic y axis leaves out what is not positive.
    """
    if log_y:
        lines = [
            Line(line.name, [p for p in line.points if p[1] > 0], line.colour, line.faint)
            for line in lines
        ]
    xs = [x for line in lines for x, _ in line.points] or [0.0, 1.0]
    ys = [y for line in lines for _, y in line.points]
    ys += [y for line in lines for _, *pair in line.band for y in pair]
    low, high = y_range or (min(ys, default=0.0), max(ys, default=1.0))
    if log_y:
        low, high = log_range(low, high)
        y_ticks = log_ticks(low, high)
    elif y_range:
        y_ticks = [tick for tick in ticks(low, high) if low <= tick <= high]
    else:
        low = min(low, 0.0) if low > -1e-12 and low < 0.5 * high else low
        y_ticks = ticks(low, high)
        low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    x_low, x_high = x_range or (min(xs), max(max(xs), min(xs) + 1e-9))

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)

    def y_at(y: float) -> float:
        if log_y:
            share = math.log(y / low) / math.log(high / low)
        else:
            share = (y - low) / ((high - low) or 1.0)
        return height - BOTTOM - min(max(share, 0.0), 1.0) * (height - TOP - BOTTOM)

    parts = [grid(y_ticks, y_at, width, percent_tick if percent_y else number)]
    x_ticks = [tick for tick in ticks(x_low, x_high) if x_low <= tick <= x_high * (1 + 1e-9)]
    for x in x_ticks:
        name = percent_tick(x) if percent_x else number(x)
        parts.append(text_at(x_at(x), height - BOTTOM + 16, name, "tick", "middle"))
    for x, name in marks:
        at, right = x_at(x), x_at(x) > width - 120
        parts.append(el("line", x1=at, x2=at, y1=TOP, y2=height - BOTTOM, class_="mark"))
        parts.append(text_at(at, TOP - 7, name, "marked", "end" if right else "start"))
    for line in lines:
        colour = f"c{line.colour}"
        if line.band:
            edge = [(x, h) for x, _, h in line.band] + [(x, lo) for x, lo, _ in line.band[::-1]]
            parts.append(el("path", d=path(edge, x_at, y_at) + "Z", class_=f"band {colour}"))
        kind = f"line {colour}" + (" faint" if line.faint else "")
        parts.append(el("path", d=path(line.points, x_at, y_at), class_=kind))
        if len(line.points) == 1:
            (x, y) = line.points[0]
            parts.append(el("circle", cx=x_at(x), cy=y_at(y), r=3, class_=f"dot {colour}"))
    parts += axis_titles(x_label, y_label, width, height)
    return svg(width, height, title, parts)


def legend(lines: Sequence[Line]) -> Html:
    """The lines' names beside a stroke of their colour."""
    entries = []
    for line in lines:
        kind = f"line c{line.colour}" + (" faint" if line.faint else "")
        stroke = el("line", x1=0, x2=22, y1=6, y2=6, class_=kind)
        swatch = el("svg", stroke, width=22, height=12, aria_hidden="true")
        entries.append(el("span", swatch, line.name))
    return el("p", *entries, class_="legend")


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    level: Callable[[float], str],
    show: Callable[[float], str],
    x_label: str,
    title: str,
    row_groups: Sequence[str] = (),
    column_groups: Sequence[str] = (),
    cell: tuple[float, float] = (26, 15),
) -> Html:
    """Cells in rows and columns. `level` gives a value's class, `show` its words on hovering.

    Groups are headings, one per row or column; a gap is left where they change.
    """
    wide, high = cell
    label, gap = 10 + max(len(row) for row in rows) * 7, 12
    top = 22 if column_groups else 6
    parts: list[Html] = []
    lefts: list[float] = []
    before = ""
    for index in range(len(columns)):
        group = column_groups[index] if column_groups else ""
        shift = gap if group != before and index else 0.0
        lefts.append(lefts[-1] + wide + shift if lefts else float(label))
        if group != before:
            parts.append(text_at(lefts[-1], 13, group, "group", "start"))
            before = group
    y, before = float(top), ""
    for index, (row, cells) in enumerate(zip(rows, values, strict=True)):
        group = row_groups[index] if row_groups else ""
        if group != before:
            y += 20
            parts.append(text_at(0, y - 6, group, "group", "start"))
            before = group
        parts.append(text_at(label - 7, y + high - 4, row, "tick", "end"))
        for column, (x, value) in enumerate(zip(lefts, cells, strict=True)):
            place = [group, row, column_groups[column] if column_groups else "", columns[column]]
            words = el("title", f"{', '.join(filter(None, place))}: {show(value)}")
            box = {"x": x, "y": y, "width": wide - 1.5, "height": high - 1.5, "rx": 2}
            parts.append(el("rect", words, **box, class_=level(value)))
        y += high
    if wide >= 20:
        for x, name in zip(lefts, columns):
            parts.append(text_at(x + wide / 2, y + 14, name, "tick", "middle"))
        y += 16
    width = lefts[-1] + wide + 4
    parts.append(text_at((label + width) / 2, y + 20, x_label, "title", "middle"))
    return svg(width, y + 28, title, parts)


def scale(levels: Sequence[str], low: str, middle: str, high: str, title: str) -> Html:
    """The key of a heat map: its classes in a row, named at both ends and in the middle."""
    cell, top = 20, 4
    parts = [
        el("rect", x=i * cell, y=top, width=cell, height=10, class_=name)
        for i, name in enumerate(levels)
    ]
    width = len(levels) * cell
    for x, name, anchor in ((0, low, "start"), (width / 2, middle, "middle"), (width, high, "end")):
        parts.append(text_at(x, top + 24, name, "tick", anchor))
    return svg(width, 34, title, parts, "scale")


def interval_chart(
    rows: Sequence[tuple[str, Sequence[tuple[float, float, float] | None]]],
    names: Sequence[str],
    *,
    x_label: str,
    title: str,
    width: int = 500,
) -> Html:
    """Per row a dot and its interval (value, low, high in 0..1) for each of `names`."""
    label_width = 16 + max((len(row) for row, _ in rows), default=0) * 7
    row_height, top = 12 + 12 * len(names), 6
    height = top + row_height * len(rows) + BOTTOM

    def x_at(share: float) -> float:
        return label_width + share * (width - label_width - 20)

    parts: list[Html] = []
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        at = x_at(tick)
        parts.append(el("line", x1=at, x2=at, y1=top, y2=height - BOTTOM, class_="grid"))
        parts.append(text_at(at, height - BOTTOM + 16, percent_tick(tick), "tick", "middle"))
    for index, (row, values) in enumerate(rows):
        y = top + index * row_height
        parts.append(text_at(label_width - 10, y + row_height / 2 + 4, row, "tick", "end"))
        for colour, (name, value) in enumerate(zip(names, values, strict=True)):
            if value is None:
                continue
            middle, low, high = value
            at = y + 12 + 12 * colour
            words = f"{row}, {name}: {middle:.1%}, 95 % interval {low:.1%} to {high:.1%}"
            whisker = el("line", x1=x_at(low), x2=x_at(high), y1=at, y2=at, class_="whisker")
            dot = el("circle", cx=x_at(middle), cy=at, r=4.5, class_="dot")
            parts.append(el("g", el("title", words), whisker, dot, class_=f"c{colour}"))
    parts.append(text_at((label_width + width) / 2, height - 6, x_label, "title", "middle"))
    return svg(width, height, title, parts)
