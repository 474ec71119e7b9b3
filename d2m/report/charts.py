"""Charts as SVG, drawn by matplotlib from plain numbers; colours and fonts come from the page.

A chart names its colours, so that one drawing is right on light and on dark paper: `ink`, `soft`
and `rule` are text and lines, `c0`, `c1` ... categories, `d0`-`d10` a diverging scale with its
middle at `d5`, `s0`-`s8` a rising one. matplotlib knows fixed colours only: a name travels through
it as #0000NN and leaves as `var(--name)`, which report.css defines. `alone` puts fixed colours in
their place, for a file that no page surrounds. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox, IdentityTransform

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, low, right, high

DIVERGING = tuple(f"d{i}" for i in range(11))
RISING = tuple(f"s{i}" for i in range(9))
NAMES = ("ink", "soft", "rule", *(f"c{i}" for i in range(5)), *DIVERGING, *RISING)
# For a file of its own: readable on white and on black, at least 3 : 1 on both.
ALONE = {"ink": "#808080", "soft": "#808080", "rule": "#80808040"} | dict(
    zip(NAMES[3:8], ("#3a86c8", "#d0612a", "#2f9468", "#85827d", "#9568c9"))
)
PERCENT = PercentFormatter(1.0, symbol=" %")
STEPS = (1, 2, 5, 10)  # between ticks, times a power of ten
SIZE = 5.0  # half a dot's width, in pixels
GAP = 9.0  # from a dot's middle to its label
CLOSE = 8.0  # a label higher or lower than this has a leader
MARKS = {"circle": ("o", 10.0), "square": ("s", 9.5), "diamond": ("D", 9.5), "triangle": ("^", 11)}


def colour(name: str) -> str:
    """What stands for one of NAMES until the drawing is text; black, matplotlib's own, is ink."""
    return f"#0000{NAMES.index(name):02x}"


@contextmanager
def themed() -> Iterator[None]:
    """Within: figures look like the report, whatever the user's own matplotlib settings are."""
    text = ("xtick.labelcolor", "ytick.labelcolor", "axes.labelcolor", "legend.labelcolor")
    inks = dict.fromkeys(text, colour("soft")) | {"grid.color": colour("rule")}
    ours = [FilePath(__file__).with_name("report.mplstyle"), inks]
    with style.context(ours, after_reset=True), warnings.catch_warnings():
        # Only the width of a letter is unknown then; the browser has a font for it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg(figure: Figure, title: str, tight: bool = False) -> Markup:
    """The figure as SVG for a page; `title` is read out by screen readers.

    tight: the paper is cut to what is drawn on it.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    bounds = "tight" if tight else None
    figure.savefig(buffer, format="svg", metadata=nothing, bbox_inches=bounds, pad_inches=0.03)
    text = buffer.getvalue()
    start, rest = text[text.index("<svg") :].split(">", 1)
    rest = re.sub(r"\s*<defs>\s*<style.*?</defs>", "", rest, count=1, flags=re.S)
    named = f'{start} role="img"><title>{escape(title)}</title>{rest}'
    tidy = re.sub(r"<[^>]*>", _tag, named)  # in text and attributes `>` is escaped
    return Markup(re.sub(r">\s+<", "><", tidy).replace("<g/>", ""))


def _tag(found: re.Match[str]) -> str:
    """A tag with the page's colours and font, without the numbers matplotlib gives to groups."""
    tag = re.sub(r'(?<=<g) id="[^"]*"| transform="rotate\(-0 [^"]*"', "", found[0])
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r'="([\d.]+)pt"', r'="\1"', tag)
    tag = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(tag.split()))  # a hundredth of a pixel is enough
    return re.sub(r"#0000([0-9a-f]{2})", lambda n: f"var(--{NAMES[int(n[1], 16)]})", tag)


def alone(chart: str) -> str:
    """The chart as the text of an .svg file, readable on white and on black paper."""
    font = '<svg style="font-family:Inter,system-ui,sans-serif;fill:#808080"'
    fixed = re.sub(r"var\(--(\w+)\)", lambda name: ALONE[name[1]], chart)
    return fixed.replace("<svg", font, 1)


# ---------------------------------------------------------------- lines


@dataclass(frozen=True)
class Line:
    """A line of a chart. `band` is the area (x, low, high) around it; `faint` draws it dashed."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    faint: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@themed()
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
    percent: bool = False,
    width: int = 460,
    height: int = 290,
) -> Markup:
    """Lines over a shared x axis, a legend above, and vertical `marks` (x, label).

    Sizes are pixels. A logarithmic y axis leaves out what is not positive; percent: both axes are
    shares.
    """
    figure = Figure(figsize=(width / 72, height / 72), layout="none")
    axes = figure.add_axes((0, 0, 1, 1), yscale="log" if log_y else "linear")
    axes.set(xlabel=x_label, ylabel=y_label)
    ys: list[float] = []
    for line in lines:
        points = [point for point in line.points if point[1] > 0 or not log_y]
        look = {"linestyle": (0, (4, 4)), "linewidth": 1.6, "alpha": 0.75} if line.faint else {}
        look |= {"marker": "o", "markersize": 6} if len(points) == 1 else {}
        ink = colour(f"c{line.colour}")
        axes.plot(*(zip(*points) if points else ([], [])), color=ink, label=line.name, **look)
        if line.band:
            axes.fill_between(*zip(*line.band), color=ink, alpha=0.14, linewidth=0)
        ys += [y for _, y in points]
    # Over less than a decade a logarithmic axis takes even ticks, or it would have one or none.
    if y_range:
        axes.set_ylim(y_range)
    elif log_y:
        low, high = min(ys, default=0.1), max(ys, default=1.0)
        more = max((high / low) ** 0.05, 1.0 if high > 1.5 * low else 1.25)
        axes.set_ylim(low / more, high * more)
        even = MaxNLocator(6, steps=STEPS)
        logarithmic = LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,))
        axes.yaxis.set_major_locator(logarithmic if high > 8 * low else even)
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        if 0 <= min(ys, default=0.0) < 0.5 * max(ys, default=0.0):
            axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    if x_range and x_range[0] < x_range[1]:
        axes.set_xlim(x_range)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PERCENT if percent else "{x:,g}")
    for x, name in marks:
        axes.axvline(x, color=colour("soft"), linewidth=1, linestyle=(0, (3, 3)))
        late = x > sum(axes.get_xlim()) / 2
        place, side = axes.get_xaxis_transform(), "right" if late else "left"
        axes.text(x, 1.03, name, transform=place, ha=side, color=colour("soft"))
    # Fixed margins: charts side by side have their axes in one line.
    top = height - 30 - 16 * _legend(figure, "upper left")
    axes.set_position((58 / width, 44 / height, 1 - 80 / width, (top - 44) / height))
    axes.yaxis.set_label_coords(14 / width, (top + 44) / 2 / height, figure.transFigure)
    return svg(figure, title)


def _legend(figure: Figure, place: str = "outside upper left") -> int:
    """Above the axes, every name once, as many in a row as there is room for; how many rows."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        found |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels())}
    if found:
        widths, room = [38 + 6.5 * len(name) for name in found], 72 * figure.get_figwidth()
        columns = len(found) if sum(widths) <= room else max(1, int(room / max(widths)))
        figure.legend(found.values(), found, loc=place, ncols=columns)
    return -(-len(found) // columns) if found else 0


# ---------------------------------------------------------------- cells and intervals


@themed()
def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    level: Callable[[float], str],
    x_label: str,
    title: str,
    row_groups: Sequence[str] = (),
    column_groups: Sequence[str] = (),
    cell: tuple[float, float] = (26, 15),
    apart: float = 1.5,
) -> Markup:
    """Cells in rows and columns, `apart` pixels between them; `level` gives a value's colour.

    Groups are headings, one per row or column; a gap is left where they change. None is left blank.
    """
    xs, x_heads = _places(column_groups or [""] * len(columns), cell[0], 12)
    ys, y_heads = _places(row_groups or [""] * len(rows), cell[1], 20 if row_groups else 0)
    width, height = xs[-1] + cell[0] / 2, ys[-1] + cell[1] / 2
    figure = Figure(figsize=(width / 72, height / 72), layout="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), xlabel=x_label)
    axes.grid(False)
    spots = [
        (x, y, colour(level(value)))
        for y, row in zip(ys, values, strict=True)
        for x, value in zip(xs, row, strict=True)
        if value is not None
    ]
    wide, high = cell[0] - apart, cell[1] - apart
    corners = [(-wide, -high), (wide, -high), (wide, high), (-wide, high), (-wide, -high)]
    if spots:
        x, y, inks = zip(*spots)
        size = max(wide, high) ** 2
        axes.scatter(x, y, size, c=inks, marker=corners, linewidths=0, clip_on=False)
    axes.set_xticks(*((xs, columns) if cell[0] >= 20 else ([], [])))
    axes.set_yticks(*((ys, rows) if any(rows) else ([], [])))
    for at, name in x_heads:
        axes.annotate(name, (at, 0), (0, 5), textcoords="offset points", weight="bold")
    for at, name in y_heads:
        axes.annotate(name, (0, at), (0, 5), textcoords="offset points", weight="bold")
    return svg(figure, title, tight=True)


def _places(groups: Sequence[str], step: float, gap: float) -> tuple[list[float], list]:
    """Middles of rows or columns `step` wide, and (start, name) of every group of them."""
    middles: list[float] = []
    heads: list[tuple[float, str]] = []
    at = 0.0
    for index, group in enumerate(groups):
        if not index or group != groups[index - 1]:
            at += gap if index or gap > step else 0.0
            heads.append((at, group))
        middles.append(at + step / 2)
        at += step
    return middles, heads


@themed()
def interval_chart(
    rows: Sequence[tuple[str, Sequence[tuple[float, float, float] | None]]],
    names: Sequence[str],
    *,
    x_label: str,
    title: str,
    width: int = 500,
) -> Markup:
    """Per row a dot and its interval (value, low, high in 0..1) for each of `names`."""
    height = 90 + (12 + 12 * len(names)) * len(rows)
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.subplots()
    axes.set(xlabel=x_label, xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x")
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_yticks(range(len(rows)), labels=[row for row, _ in rows])
    for index, name in enumerate(names):
        shift = (index - (len(names) - 1) / 2) / (len(names) + 1)
        every = [(i + shift, values[index]) for i, (_, values) in enumerate(rows)]
        found = [(y, *value) for y, value in every if value is not None]
        ys, middles, lows, highs = map(np.array, zip(*found))
        spread = [middles - lows, highs - middles]
        ink = colour(f"c{index}")
        axes.errorbar(middles, ys, xerr=spread, fmt="o", ms=9, color=ink, label=name, clip_on=False)
    _legend(figure)
    return svg(figure, title)


# ---------------------------------------------------------------- dots over cost


@dataclass(frozen=True)
class Kind:
    """What dots have in common. shape: circle, square, diamond or triangle; colour: `c0` ..."""

    label: str
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


@dataclass(frozen=True)
class Panel:
    """Dots over one cost; x_show writes a tick."""

    dots: Sequence[Dot]
    x_label: str
    x_show: Callable[[float], str]


@themed()
def scatter_chart(
    panels: Mapping[str, Panel], *, y_label: str, title: str, width: int = 960, height: int = 440
) -> Markup:
    """Heading -> dots over cost, labelled, with whiskers, and a dashed line through the best.

    Kinds of dots differ in shape and in colour, so that neither has to be seen alone. Dots of
    nearly equal cost stand side by side, so a place may be off by some pixels. Scores are shares;
    height is a panel's. ValueError without dots.
    """
    if not panels or not all(panel.dots for panel in panels.values()):
        raise ValueError("no dots for the chart; expected at least one")
    figure = Figure(figsize=(width / 72, height * len(panels) / 72))
    every = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (heading, panel) in zip(every, panels.items()):
        axes.set_title(heading, pad=10)
        axes.set(xlabel=panel.x_label, ylabel=y_label)
        axes.set_xlim(_around([dot.x for dot in panel.dots]))
        axes.set_ylim(_around([y for dot in panel.dots for y in (dot.low, dot.high)]))
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        axes.xaxis.set_major_formatter(lambda x, _, show=panel.x_show: show(x))
        axes.yaxis.set_major_formatter(PERCENT)
        for kind in dict.fromkeys(dot.kind for dot in panel.dots):
            axes.plot([], [], label=kind.label, **_mark(kind))
        axes.plot([], [], label="best", **_best())
    _legend(figure)
    figure.draw_without_rendering()  # dots and labels are placed in pixels: the axes stay from here
    figure.set_layout_engine("none")
    for axes, panel in zip(every, panels.values()):
        _dots(axes, panel.dots)
    return svg(figure, title)


def _best() -> dict[str, Any]:
    return {"color": colour("c3"), "linewidth": 1.6, "linestyle": (0, (4, 4)), "alpha": 0.75}


def _mark(kind: Kind) -> dict[str, Any]:
    marker, size = MARKS[kind.shape]
    ink = colour(f"c{kind.colour}")
    fill = "none" if kind.hollow else ink
    width = 2 if kind.hollow else 0
    look = {"marker": marker, "markersize": size, "markeredgewidth": width, "linestyle": "none"}
    return look | {"markeredgecolor": ink, "markerfacecolor": fill}


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Bounds a little outside the values."""
    low, high = min(values), max(values)
    more = 0.04 * (high - low) or 0.5
    return low - more, high + more


def _dots(axes: Axes, dots: Sequence[Dot]) -> None:
    """Lines, whiskers, marks and labels, in pixels, on axes whose place on the paper is fixed."""
    fixed = {"transform": IdentityTransform()}
    middles = axes.transData.transform([(dot.x, dot.y) for dot in dots])
    lows, highs = (
        axes.transData.transform([(dot.x, getattr(dot, end)) for dot in dots])[:, 1]
        for end in ("low", "high")
    )
    middles[:, 0] = spread(list(middles[:, 0]), near=4.0, step=2 * SIZE + 2)
    spots = {dot.name: tuple(middle) for dot, middle in zip(dots, middles)}
    paths = [[spots[dot.name] for dot in frontier(dots)]]
    axes.plot(*zip(*paths[0]), **_best(), **fixed)
    for owner in dict.fromkeys(dot.of for dot in dots if dot.of in spots):
        members = [dot for dot in dots if dot.name == owner or dot.of == owner]
        paths.append(sorted(spots[dot.name] for dot in members))
        ink = colour(f"c{members[0].kind.colour}")
        axes.plot(*zip(*paths[-1]), color=ink, linewidth=1.6, **fixed)
    taken: list[Box] = []
    for dot, (x, y), low, high in zip(dots, middles, lows, highs):
        for ends in ((low, y - SIZE), (y + SIZE, high)):  # nothing shows through a hollow mark
            if ends[0] < ends[1]:
                axes.plot((x, x), ends, color=colour(f"c{dot.kind.colour}"), **fixed)
        axes.plot(x, y, **_mark(dot.kind), **fixed)
        taken.append((x - SIZE - 1, y - SIZE - 1, x + SIZE + 1, y + SIZE + 1))
        taken.append((x - 1, low, x + 1, high))
    probe, sizes = axes.text(0, 0, ""), []
    for dot in dots:
        probe.set_text(dot.name)
        sizes.append(probe.get_window_extent().size)
    probe.remove()
    lines = [Path(path) for path in paths]
    offsets = place(list(map(tuple, middles)), sizes, taken, lines, axes.bbox.extents)
    for dot, (dx, dy) in zip(dots, offsets):
        far = {"arrowstyle": "-", "color": colour("soft"), "lw": 1, "alpha": 0.6, "shrinkB": 0}
        axes.annotate(
            dot.name,
            spots[dot.name],
            (dx, dy),
            xycoords="figure pixels",
            textcoords="offset points",
            ha="left" if dx > 0 else "right",
            va="center",
            arrowprops=far | {"shrinkA": 0} if abs(dy) >= CLOSE else None,
        )


def frontier(dots: Sequence[Dot]) -> list[Dot]:
    """The dots that none beats, cheapest first: every other costs more or scores less (Pareto)."""
    found: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.x, -dot.y, dot.name)):
        if not found or dot.y > found[-1].y:
            found.append(dot)
    return found


def spread(xs: Sequence[float], near: float, step: float) -> list[float]:
    """Places `near` one another moved apart to `step`, around their middle, in rising order.

    Equal ones keep the order given. Dots of equal cost would hide one another's intervals. Many of
    them come closer together than `step`, so that none is far from its true place.
    """
    order = sorted(range(len(xs)), key=lambda i: (xs[i], i))
    clusters: list[list[int]] = []
    for index in order:
        if clusters and xs[index] - xs[clusters[-1][-1]] <= near:
            clusters[-1].append(index)
        else:
            clusters.append([index])
    moved = list(xs)
    for cluster in clusters:
        middle = sum(xs[i] for i in cluster) / len(cluster)
        apart = min(step, 3 * step / max(1, len(cluster) - 1))
        for place_, index in enumerate(cluster):
            moved[index] = middle + (place_ - (len(cluster) - 1) / 2) * apart
    return moved


def place(
    points: Sequence[Point],
    sizes: Sequence[Point],
    taken: Sequence[Box],
    lines: Sequence[Path],
    frame: Box,
) -> list[Point]:
    """Per point the offset of its label's near edge; earlier points get the better places.

    Right of the point, then left, then ever farther up and down: the first that is clear of what is
    `taken`, of lines, labels and their leaders and stays in `frame`, or else the one that hits
    least. All in pixels. matplotlib places no labels by itself.
    """
    shifts = [0.0, *(side * 7.0 * i for i in range(1, 28) for side in (1, -1))]
    gaps = [(GAP if abs(dy) < CLOSE else GAP + 5, dy) for dy in shifts]
    offsets = [(side * gap, dy) for gap, dy in gaps for side in (1, -1)]
    labels: list[Box] = []
    leaders: list[Path] = []
    found: list[Point] = []
    for (x, y), (wide, high) in zip(points, sizes, strict=True):
        boxes, least = np.array([*taken, *labels, (0.0,) * 4]), math.inf
        for dx, dy in offsets:
            left, low = x + dx - (0 if dx > 0 else wide), y + dy - high / 2
            box = (left, low, left + wide, low + high)
            hits = 5 * _hits(box, boxes)  # worse than a leader that crosses
            if box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]:
                hits += 1000  # cut off, it cannot be read
            if hits >= least:
                continue
            leader = Path([(x, y), (x + dx, y + dy)])
            area, crossed = Bbox.from_extents(box), labels if abs(dy) >= CLOSE else ()
            hits += sum(line.intersects_bbox(area, filled=False) for line in (*lines, *leaders))
            hits += sum(leader.intersects_bbox(Bbox.from_extents(each)) for each in crossed)
            if hits < least:
                least, best = hits, ((dx, dy), box, leader)
            if not hits:
                break
        found.append(best[0])
        labels.append(best[1])
        leaders += [best[2]] if abs(best[0][1]) >= CLOSE else []
    return found


def _hits(box: Box, boxes: np.ndarray) -> int:
    """How many of boxes [N, 4] the box overlaps."""
    apart = (boxes[:, :2] >= box[2:]) | (boxes[:, 2:] <= box[:2])
    return int((~apart.any(axis=1)).sum())
