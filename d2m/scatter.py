"""A chart of dots with intervals over what they cost, as inline SVG or as an SVG file of its own.

Kinds of dots differ in shape and in colour, so that neither has to be seen alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from d2m.axes import number, ticks
from d2m.canvas import LEFT, axis_titles, grid, svg, text_at
from d2m.labels import Box, along, place, spread
from d2m.markup import Html, el

TOP, RIGHT, BOTTOM = 14, 18, 42
SIZE = 5.0  # half a dot's width, in pixels
# For a file of its own: readable on white and on black, at least 3 : 1 on both.
INKS = ("#3a86c8", "#d0612a", "#2f9468", "#85827d", "#9568c9")
FILE_STYLE = (
    "text{font:12px Inter,system-ui,sans-serif;fill:#808080}"
    ".tick{font-size:11.5px}.name{font-size:11.5px}.title{font-size:12.5px}"
    ".grid{stroke:#808080;stroke-opacity:.25}.leader{stroke:#808080;stroke-opacity:.6}"
    ".line{fill:none;stroke-width:1.6}.faint{stroke-dasharray:4 4;opacity:.75}"
    ".whisker{stroke-width:1.8;stroke-linecap:round}.hollow{fill:none;stroke-width:2}"
)


@dataclass(frozen=True)
class Kind:
    """What dots have in common. shape: circle, square, diamond or triangle; colour: `c0` ..."""

    words: str
    colour: int
    shape: str = "circle"
    hollow: bool = False


@dataclass(frozen=True)
class Dot:
    """x: cost; y: score with its interval low..high. of: the dot that a line joins it to."""

    name: str
    kind: Kind
    x: float
    y: float
    low: float
    high: float
    of: str | None = None
    words: str = ""


def scatter_chart(
    dots: Sequence[Dot],
    *,
    x_label: str,
    y_label: str,
    title: str,
    x_show: Callable[[float], str] = number,
    y_show: Callable[[float], str] = number,
    width: int = 960,
    height: int = 430,
) -> Html:
    """Dots over cost, labelled, with whiskers, and a dashed line through the best.

    Dots of nearly equal cost stand side by side, so a place may be off by some pixels; hovering
    tells the figures (`words`). ValueError without dots.
    """
    if not dots:
        raise ValueError("no dots to draw; expected one at least")
    x_ticks = ticks(min(dot.x for dot in dots), max(dot.x for dot in dots), 8)
    y_ticks = ticks(min(dot.low for dot in dots), max(dot.high for dot in dots))
    x_low, x_high, y_low, y_high = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]
    left, right = LEFT + 4 * SIZE, width - RIGHT - 4 * SIZE  # dots moved aside stay inside

    def x_at(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def y_at(y: float) -> float:
        return height - BOTTOM - (y - y_low) / (y_high - y_low) * (height - TOP - BOTTOM)

    xs = spread([x_at(dot.x) for dot in dots], near=4.0, step=2 * SIZE + 2)
    spots = {dot.name: (x, y_at(dot.y)) for dot, x in zip(dots, xs)}
    parts = [grid(y_ticks, y_at, width, y_show)]
    for tick in x_ticks:
        parts.append(text_at(x_at(tick), height - BOTTOM + 16, x_show(tick), "tick", "middle"))
    best = [spots[dot.name] for dot in frontier(dots)]
    parts.append(el("path", d=_through(best), class_="line c3 faint"))
    joined = _joined(dots, spots)
    parts += [el("path", d=_through(path), class_=f"line c{colour}") for colour, path in joined]
    for dot in dots:
        parts.append(_dot(dot, spots[dot.name], y_at(dot.low), y_at(dot.high)))
    obstacles = [box for path in (best, *(path for _, path in joined)) for box in along(path)]
    for dot in dots:
        x, y = spots[dot.name]
        obstacles.append((x - SIZE - 1, y - SIZE - 1, x + SIZE + 1, y + SIZE + 1))
        obstacles.append((x - 1, y_at(dot.high), x + 1, y_at(dot.low)))
    parts += _names(dots, spots, obstacles, (LEFT, 2, width - 8, height - BOTTOM))
    return svg(width, height, title, [*parts, *axis_titles(x_label, y_label, width, height)])


def frontier(dots: Sequence[Dot]) -> list[Dot]:
    """The dots that none beats, cheapest first: every other costs more or scores less (Pareto)."""
    found: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.x, -dot.y, dot.name)):
        if not found or dot.y > found[-1].y:
            found.append(dot)
    return found


def key(dots: Sequence[Dot]) -> Html:
    """The kinds that occur among the dots, each beside its mark."""
    entries = []
    for kind in dict.fromkeys(dot.kind for dot in dots):
        swatch = el("svg", _mark(kind, 7, 7), width=14, height=14, aria_hidden="true")
        entries.append(el("span", swatch, kind.words))
    stroke = el("line", x1=0, x2=22, y1=7, y2=7, class_="line c3 faint")
    entries.append(el("span", el("svg", stroke, width=22, height=14, aria_hidden="true"), "best"))
    return el("p", *entries, class_="legend")


def file_of(charts: Mapping[str, Html], dots: Sequence[Dot], width: int, height: int) -> str:
    """Charts by heading, one below the other, and their key, as the text of an .svg file.

    Every colour is in the file and is readable on white and on black paper.
    """
    style = FILE_STYLE + "".join(
        f".dot.c{i}{{fill:{ink}}}.line.c{i},.whisker.c{i},.hollow.c{i}{{stroke:{ink}}}"
        for i, ink in enumerate(INKS)
    )
    # A dot's fill would win over `hollow`, being the narrower selector.
    style += ".dot.hollow{fill:none}" + "".join(f".dot.hollow.c{i}{{fill:none}}" for i in range(5))
    parts: list[Html] = []
    at = float(LEFT)
    for kind in dict.fromkeys(dot.kind for dot in dots):
        parts += [_mark(kind, at, 12), text_at(at + 11, 16, kind.words, "tick", "start")]
        at += 30 + 7 * len(kind.words)
    top = 30
    for heading, chart in charts.items():
        parts.append(text_at(LEFT, top + 12, heading, "name", "start"))
        parts.append(el("g", chart, transform=f"translate(0 {top + 18})"))
        top += height + 34
    body = el(
        "svg",
        el("style", Html(style)),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {top}",
        width=width,
        height=top,
    )
    return f"{body}\n"


# ---------------------------------------------------------------- parts


def _joined(
    dots: Sequence[Dot], spots: Mapping[str, tuple[float, float]]
) -> list[tuple[int, list[tuple[float, float]]]]:
    """(colour, path) through every dot that others belong to and those others, by cost."""
    paths = []
    for owner in dict.fromkeys(dot.of for dot in dots if dot.of in spots):
        members = [dot for dot in dots if dot.name == owner or dot.of == owner]
        places = sorted(spots[dot.name] for dot in members)
        paths.append((members[0].kind.colour, places))
    return paths


def _dot(dot: Dot, spot: tuple[float, float], low: float, high: float) -> Html:
    """The mark and its interval; nothing is drawn through a hollow mark."""
    x, y = spot
    colour = f"c{dot.kind.colour}"
    whiskers = [
        el("line", x1=x, x2=x, y1=start, y2=end, class_=f"whisker {colour}")
        for start, end in ((low, y + SIZE), (y - SIZE, high))
        if start > end
    ]
    words = dot.words or f"{dot.name}: {dot.y:.3f} ({dot.low:.3f} to {dot.high:.3f})"
    return el("g", el("title", words), *whiskers, _mark(dot.kind, x, y))


def _mark(kind: Kind, x: float, y: float) -> Html:
    classes = f"dot {'hollow ' if kind.hollow else ''}c{kind.colour}"
    r = SIZE
    if kind.shape == "circle":
        return el("circle", cx=x, cy=y, r=r, class_=classes)
    shapes = {
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r:g}v{2 * r:g}h{-2 * r:g}Z",
        "diamond": f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:g} {1.3 * r:g}l{-1.3 * r:g} {1.3 * r:g}"
        f"l{-1.3 * r:g} {-1.3 * r:g}Z",
        "triangle": f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:g} {2.1 * r:g}h{-2.4 * r:g}Z",
    }
    return el("path", d=shapes[kind.shape], class_=classes)


def _names(
    dots: Sequence[Dot],
    spots: Mapping[str, tuple[float, float]],
    obstacles: Sequence[Box],
    bounds: Box,
) -> list[Html]:
    """Labels that stay clear of what is drawn and of one another, the far ones with a leader."""
    points, parts = [spots[dot.name] for dot in dots], []
    labels = place(points, [dot.name for dot in dots], obstacles, bounds)
    for (x, y), dot, label in zip(points, dots, labels):
        if label.far:
            end = label.x - (3 if label.anchor == "start" else -3)
            parts.append(el("line", x1=x, y1=y, x2=end, y2=label.y - 4, class_="leader"))
        parts.append(text_at(label.x, label.y, dot.name, "name", label.anchor))
    return parts


def _through(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""
