"""Dots over cost: to scale, labelled without overlap, the best ones joined."""

import itertools
import re

import pytest

from d2m.labels import along, place, spread
from d2m.scatter import Dot, Kind, file_of, frontier, key, scatter_chart

MODEL, KNOB = Kind("models", 0), Kind("knobs", 1, "triangle", hollow=True)
LABELS = {"x_label": "cost", "y_label": "score", "title": "t"}


def dot(name, x, y, kind=MODEL, of=None):
    return Dot(name, kind, x, y, y - 0.05, y + 0.05, of)


def test_dots_are_to_scale() -> None:
    chart = scatter_chart([dot("a", 0.0, 0.2), dot("b", 1.0, 0.4), dot("c", 4.0, 0.8)], **LABELS)
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)
    (ax, ay), (bx, by), (cx, cy) = [tuple(map(float, pair)) for pair in found]
    assert (cx - ax) == pytest.approx(4 * (bx - ax), abs=0.1) and ax < bx
    assert (ay - cy) == pytest.approx(3 * (ay - by), abs=0.1) and cy < by < ay  # up is more
    with pytest.raises(ValueError, match="no dots"):
        scatter_chart([], **LABELS)
    assert "nan" not in scatter_chart([Dot("one", MODEL, 0.0, 0.0, 0.0, 0.0)], **LABELS)


def test_the_best_are_those_that_nothing_cheaper_reaches() -> None:
    dots = [dot("dense", 1.0, 0.8), dot("a", 0.5, 0.7), dot("b", 0.5, 0.6), dot("c", 0.7, 0.7)]
    assert [each.name for each in frontier(dots)] == ["a", "dense"]


def test_knobs_are_joined_to_their_model_by_cost() -> None:
    dots = [dot("m", 0.5, 0.5), dot("k2", 0.8, 0.6, KNOB, "m"), dot("k1", 0.2, 0.3, KNOB, "m")]
    chart = scatter_chart([*dots, dot("stray", 0.4, 0.4, KNOB, "not there")], **LABELS)
    [line] = re.findall(r'<path d="M([^"]*)" class="line c0"', chart)
    xs = [float(point.split()[0]) for point in line.split("L")]
    assert len(xs) == 3 and xs == sorted(xs)


def test_equal_costs_stand_side_by_side() -> None:
    assert spread([10.0, 50.0, 90.0], 4, 12) == [10.0, 50.0, 90.0]
    assert spread([52.0, 10.0, 50.0], 4, 12) == [57.0, 10.0, 45.0]  # in their order
    assert spread([50.0, 50.0, 50.0], 4, 12) == [38.0, 50.0, 62.0]
    many = spread([50.0] * 9, 4, 12)  # none farther than one and a half steps
    assert (many[0], many[-1]) == (32.0, 68.0) and many == sorted(set(many))


def test_labels_hide_nothing() -> None:
    points = [(100.0 + 3 * i, 100.0 + 5 * (i % 4)) for i in range(12)]
    names = [f"name {i}" for i in range(12)]
    dots = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    bounds = (0.0, 0.0, 300.0, 300.0)
    boxes = []
    for label, name in zip(place(points, names, dots, bounds), names):
        wide = 5 * len(name)  # a narrow estimate: real letters overlap no sooner
        left = label.x if label.anchor == "start" else label.x - wide
        boxes.append((left, label.y - 9, left + wide, label.y + 2))
        assert bounds[0] <= left and left + wide <= bounds[2] and label.y < bounds[3]
    for a, b in itertools.combinations(boxes, 2):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    for a, b in itertools.product(boxes, dots):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_a_free_label_stands_right_of_its_dot_and_moves_off_lines() -> None:
    bounds = (0.0, 0.0, 300.0, 300.0)
    [label] = place([(100.0, 100.0)], ["free"], [], bounds)
    assert (label.x, label.y, label.anchor, label.far) == (109.0, 104.0, "start", False)
    [label] = place([(100.0, 100.0)], ["free"], along([(100.0, 100.0), (200.0, 100.0)]), bounds)
    assert label.anchor == "end"
    [label] = place([(290.0, 100.0)], ["at the edge"], [], bounds)
    assert label.anchor == "end"


def test_kinds_differ_in_shape_as_well_as_colour() -> None:
    legend = key([dot("a", 0, 0.5), dot("b", 1, 0.5, KNOB), dot("c", 2, 0.5)])
    assert legend.count("models") == legend.count("knobs") == 1
    assert '<circle cx="7" cy="7"' in legend and 'class="dot hollow c1"' in legend
    chart = scatter_chart([dot("a", 0.0, 0.5)], **LABELS)
    text = file_of({"A < B": chart}, [dot("a", 0.0, 0.5)], 960, 430)
    assert "A &lt; B" in text and text.startswith("<svg ")
    assert "xmlns" in text and "var(" not in text
