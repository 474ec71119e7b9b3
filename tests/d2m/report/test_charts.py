"""Charts: to scale, the same bytes every time, in the page's colours, labels that hide nothing."""

import itertools
import re
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import pytest

from d2m.report.charts import (
    NAMES,
    Dot,
    Kind,
    Line,
    Panel,
    alone,
    frontier,
    heat_map,
    interval_chart,
    line_chart,
    place,
    scatter_chart,
    spread,
)

SVG = "{http://www.w3.org/2000/svg}"
MODEL, KNOB = Kind("models", 0), Kind("knobs", 1, "triangle", hollow=True)
LABELS = {"x_label": "x", "y_label": "y", "title": "t"}


def dot(name, x, y, kind=MODEL, of=None):
    return Dot(name, kind, x, y, y - 0.05, y + 0.05, of)


def scatter(*dots):
    return scatter_chart({"h": Panel(dots, "cost", str)}, y_label="score", title="t")


def inside(chart, name, kind="stroke"):
    """Points of lines of a colour and where its marks stand, in the axes (the legend is not)."""
    root, lines, marks = ET.fromstring(chart), [], []
    for node in root.iter(f"{SVG}path"):
        if "clip-path" in node.attrib and f"{kind}: var(--{name})" in node.get("style", ""):
            pairs = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", node.attrib["d"])
            lines.append([tuple(map(float, pair)) for pair in pairs])
    for group in root.iter(f"{SVG}g"):
        for node in group.findall(f"{SVG}use") if "clip-path" in group.attrib else ():
            if f"var(--{name})" in node.get("style", ""):
                marks.append((float(node.attrib["x"]), float(node.attrib["y"])))
    return lines, marks


def texts(chart):
    return [node.text for node in ET.fromstring(chart).iter(f"{SVG}text")]


# ---------------------------------------------------------------- every chart


def test_the_same_numbers_are_the_same_bytes_whatever_the_users_settings() -> None:
    lines = [Line("a", [(0.0, 1.0), (1.0, 2.0)]), Line("b", [(0.0, 2.0)], 1, faint=True)]
    once = line_chart(lines, **LABELS)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert line_chart(lines, **LABELS) == once
        assert matplotlib.rcParams["font.size"] == 30  # and theirs stay as they were
    assert "date" not in once and "Matplotlib" not in once


def test_colours_are_the_pages_and_a_file_has_its_own() -> None:
    style = (Path(__file__).parents[3] / "d2m/report/report.css").read_text("utf-8")
    light, dark = style.split("prefers-color-scheme: dark", 1)
    for name in NAMES:
        assert f"--{name}: #" in light and f"--{name}: #" in dark
    chart = scatter(dot("a", 0.0, 0.5), dot("b", 1.0, 0.6, KNOB))
    assert not re.search(r"#[0-9a-f]{6}", chart)
    # Ink needs no words: text has it from the <svg>, in the page's style and in a file's.
    assert {"soft", "rule", "c0", "c1", "c3"} == set(re.findall(r"var\(--(\w+)\)", chart))
    file = alone(chart)
    assert "var(" not in file and file.startswith("<svg ") and 'xmlns="' in file
    assert set(re.findall(r"url\((.)", file)) == {"#"}  # clips by shapes of the same file
    assert ET.fromstring(file).tag == f"{SVG}svg"


@pytest.mark.parametrize(
    "evil", ["<b>&amp;", "$x^2$ and $", "_hidden", "q\"'>", "圆 形", "#000005"]
)
def test_names_from_outside_are_text(evil) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = line_chart([Line(f"stage {evil}", [(0.0, 1.0)])], **LABELS | {"title": evil})
        dots = scatter(dot(evil, 0.0, 0.5), dot("b", 1.0, 0.6))
        cells = heat_map(
            [evil], [evil], [[1]], level=lambda _: "s0", x_label=evil, title=evil, row_groups=[evil]
        )
    assert f"stage {evil}" in texts(line) and evil in texts(dots) and texts(cells).count(evil) == 4
    assert ET.fromstring(line).find(f"{SVG}title").text == evil


# ---------------------------------------------------------------- lines, cells, intervals


def test_line_chart_is_to_scale() -> None:
    points = [(0.0, 0.0), (50.0, 5.0), (100.0, 10.0)]
    options = LABELS | {"width": 460, "height": 270}
    [line], _ = inside(line_chart([Line("a", points)], **options), "c0")
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert 0 < x0 < x2 <= 460 and 0 <= y2 < y0 <= 270  # up is more
    powers = [(0.0, 0.01), (1.0, 0.1), (2.0, 1.0), (3.0, 0.0)]
    [line], _ = inside(line_chart([Line("a", powers)], log_y=True, **options), "c0")
    assert len(line) == 3  # zero has no logarithm
    assert line[1][1] == pytest.approx((line[0][1] + line[2][1]) / 2, abs=0.1)


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(0.0, 3.0), (1.0, 3.0)], [(0.0, 0.0)]])
@pytest.mark.parametrize("log_y", [False, True])
def test_line_chart_of_next_to_nothing(points, log_y) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chart = line_chart([Line("a", points)], log_y=log_y, x_range=(0.0, 1.0), **LABELS)
    ET.fromstring(chart)
    assert "nan" not in chart and "inf" not in chart
    assert len(inside(chart, "c0")[1]) == (len(points) == 1 and (not log_y or points[0][1] > 0))


def test_axes_are_labelled_in_round_numbers() -> None:
    chart = line_chart([Line("a", [(0.0, 0.013), (15000.0, 0.094)])], **LABELS)
    found = set(texts(chart))
    assert {"0", "0.02", "0.1", "5,000", "15,000", "x", "y", "a"} <= found
    shares = line_chart([Line("a", [(0.0, 0.0), (1.0, 1.0)])], percent=True, **LABELS)
    assert texts(shares).count("20 %") == 2
    wide = line_chart([Line("a", [(0.0, 1e-4), (1.0, 0.06)])], log_y=True, **LABELS)
    assert {"0.001", "0.002", "0.05"} <= set(texts(wide))
    narrow = line_chart([Line("a", [(0.0, 0.8), (1.0, 1.4)])], log_y=True, **LABELS)
    assert {"0.8", "1", "1.2"} <= set(texts(narrow))


def test_heat_map() -> None:
    chart = heat_map(
        ["0", "1"],
        ["a", "b", "c"],
        [[1, 2, None], [4, 5, 6]],
        level=lambda value: f"s{value}",
        x_label="columns",
        title="map",
        row_groups=["one", "two"],
    )
    cells = re.findall(r'<path d="M ([\d.]+) ([\d.]+) [^>]*fill: var\(--(s\d)\)', chart)
    assert [cell[2] for cell in cells] == ["s1", "s2", "s4", "s5", "s6"]  # None is left blank
    xs, ys = ([float(cell[axis]) for cell in cells] for axis in (0, 1))
    assert xs[0] == xs[2] < xs[1] == xs[3] < xs[4] and xs[1] - xs[0] == pytest.approx(26, abs=0.02)
    assert ys[0] == ys[1] < ys[2] and ys[2] - ys[0] == pytest.approx(15 + 20, abs=0.02)  # a heading
    assert {"one", "two", "a", "b", "c", "0", "1", "columns"} == set(texts(chart))


def test_intervals() -> None:
    rows = [("row", [(0.5, 0.4, 0.6), None]), ("other", [(0.25, 0.2, 0.4), (0.3, 0.3, 0.3)])]
    chart = interval_chart(rows, ["x", "y"], x_label="l", title="t")
    assert {"row", "other", "x", "y", "l"} <= set(texts(chart))
    words = {node.text: float(node.attrib["x"]) for node in ET.fromstring(chart).iter(f"{SVG}text")}
    lines = re.findall(r'<path d="M ([\d.]+) ([\d.]+) L ([\d.]+) \2 "[^>]*var\(--c0\)', chart)
    (y, low, high), (later, *_) = [
        (float(y), float(a), float(b)) for a, y, b in lines if float(b) - float(a) > 30
    ]
    scale = words["100 %"] - words["0 %"]
    assert (high - low) == pytest.approx(0.2 * scale, abs=0.1) and y < later  # from the top down
    assert low == pytest.approx(words["0 %"] + 0.4 * scale, abs=0.1)


# ---------------------------------------------------------------- dots over cost


def test_dots_are_to_scale() -> None:
    chart = scatter(dot("a", 0.0, 0.2), dot("b", 1.0, 0.4), dot("c", 4.0, 0.8))
    _, [(ax, ay), (bx, by), (cx, cy)] = inside(chart, "c0")
    assert (cx - ax) == pytest.approx(4 * (bx - ax), abs=0.1) and ax < bx
    assert (ay - cy) == pytest.approx(3 * (ay - by), abs=0.1) and cy < by < ay  # up is more
    with pytest.raises(ValueError, match="no dots"):
        scatter()
    assert "nan" not in scatter(Dot("one", MODEL, 0.0, 0.0, 0.0, 0.0))


def test_the_best_are_those_that_nothing_cheaper_reaches() -> None:
    dots = [dot("dense", 1.0, 0.8), dot("a", 0.5, 0.7), dot("b", 0.5, 0.6), dot("c", 0.7, 0.7)]
    assert [each.name for each in frontier(dots)] == ["a", "dense"]


def test_knobs_are_joined_to_their_model_by_cost() -> None:
    dots = [dot("m", 0.5, 0.5), dot("k2", 0.8, 0.6, KNOB, "m"), dot("k1", 0.2, 0.3, KNOB, "m")]
    chart = scatter(*dots, dot("stray", 0.4, 0.4, KNOB, "not there"))
    lines, _ = inside(chart, "c0")
    [joined] = [line for line in lines if len(line) == 3]
    assert joined == sorted(joined)


def test_equal_costs_stand_side_by_side() -> None:
    assert spread([10.0, 50.0, 90.0], 4, 12) == [10.0, 50.0, 90.0]
    assert spread([52.0, 10.0, 50.0], 4, 12) == [57.0, 10.0, 45.0]  # in their order
    assert spread([50.0, 50.0, 50.0], 4, 12) == [38.0, 50.0, 62.0]
    many = spread([50.0] * 9, 4, 12)  # none farther than one and a half steps
    assert (many[0], many[-1]) == (32.0, 68.0) and many == sorted(set(many))


def test_labels_hide_nothing() -> None:
    points = [(100.0 + 3 * i, 100.0 + 5 * (i % 4)) for i in range(12)]
    dots = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    boxes = []
    for (x, y), (dx, dy) in zip(points, place(points, [(40.0, 13.0)] * 12, dots, [], FRAME)):
        left = x + dx - (0 if dx > 0 else 40)
        boxes.append((left, y + dy - 6.5, left + 40, y + dy + 6.5))
        assert left >= 0 and left + 40 <= 300 and 6.5 <= y + dy <= 293.5
    for a, b in [*itertools.combinations(boxes, 2), *itertools.product(boxes, dots)]:
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


FRAME = (0.0, 0.0, 300.0, 300.0)


def test_a_free_label_stands_right_of_its_dot_and_moves_off_lines() -> None:
    from matplotlib.path import Path as Way

    point, size = (100.0, 100.0), (30.0, 13.0)
    assert place([point], [size], [], [], FRAME) == [(9.0, 0.0)]
    assert place([point], [size], [], [Way([point, (200.0, 100.0)])], FRAME) == [(-9.0, 0.0)]
    assert place([(290.0, 100.0)], [size], [], [], FRAME) == [(-9.0, 0.0)]  # at the edge
    taken = [(40.0, 80.0, 160.0, 120.0)]
    [(dx, dy)] = place([point], [size], taken, [], FRAME)
    assert dx == 14.0 and dy >= 20 + 6.5  # above what is taken, with a leader


def test_labels_of_a_chart_do_not_overlap() -> None:
    dots = [dot(f"a longer name {i}", 0.5 + i / 100, 0.5 + i / 90) for i in range(12)]
    chart = scatter(*dots)
    boxes = []
    for node in ET.fromstring(chart).iter(f"{SVG}text"):
        if "longer" in node.text:
            x, y = float(node.attrib["x"]), float(node.attrib["y"])
            left = x - 80 * ("end" in node.attrib["style"])  # narrower than it is
            boxes.append((left, y - 9, left + 80, y + 2))
    assert len(boxes) == 12
    for a, b in itertools.combinations(boxes, 2):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_kinds_differ_in_shape_as_well_as_colour() -> None:
    chart = scatter(dot("a", 0, 0.5), dot("b", 1, 0.5, KNOB), dot("c", 2, 0.5))
    assert texts(chart).count("models") == texts(chart).count("knobs") == 1
    shapes = dict(re.findall(r'<use xlink:href="(#\w+)"[^>]*style="fill([^;"]*)', chart))
    assert list(shapes.values()) == [": var(--c0)", "-opacity: 0"]  # one of them hollow
