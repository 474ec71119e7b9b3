"""The parts of a chart: the grid and its labels, titles of axes, paths, and the SVG around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from d2m.markup import Html, el, join

Point = tuple[float, float]
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 22, 42  # room for tick labels and axis titles, in pixels


def grid(
    y_ticks: Sequence[float], y_at: Callable[[float], float], width: int, show: Callable
) -> Html:
    """Horizontal lines at the ticks, each with its label left of the axis."""
    parts = []
    for tick in y_ticks:
        at = y_at(tick)
        parts.append(el("line", x1=LEFT, x2=width - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(text_at(LEFT - 8, at + 4, show(tick), "tick", "end"))
    return join(*parts)


def axis_titles(x_label: str, y_label: str, width: int, height: int) -> list[Html]:
    """The names of both axes: below, and turned along the left edge."""
    middle = (TOP + height - BOTTOM) / 2
    turned = f"rotate(-90 12 {middle:g})"
    return [
        text_at((LEFT + width - RIGHT) / 2, height - 6, x_label, "title", "middle"),
        el("text", y_label, x=12, y=middle, class_="title", text_anchor="middle", transform=turned),
    ]


def path(
    points: Sequence[Point], x_at: Callable[[float], float], y_at: Callable[[float], float]
) -> str:
    """SVG path data through points given in the axes' units; empty without points."""
    return "M" + "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in points) if points else ""


def text_at(x: float, y: float, words: str, kind: str, anchor: str) -> Html:
    """Words at a place, of a class of the page's style."""
    return el("text", words, x=x, y=y, class_=kind, text_anchor=anchor)


def svg(width: float, height: float, title: str, parts: Sequence[Html], kind: str = "") -> Html:
    """The drawing; screen readers read out its title."""
    return el(
        "svg",
        el("title", title),
        *parts,
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        class_=kind or None,
    )
