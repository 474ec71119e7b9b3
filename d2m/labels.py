"""Labels beside the dots of a chart, placed so that they hide neither dots nor one another.

Pure arithmetic in pixels, the same for the same input. A box is (left, top, right, bottom).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]

LETTER = 6.5  # mean width of a letter at 11.5 px, rather too much than too little
HIGH = 13.0  # of a line of text
GAP = 9.0  # from a dot's middle to its label
FARTHEST = 14  # rows that a label may move up or down before it overlaps something


@dataclass(frozen=True)
class Label:
    """Where a label's baseline begins (anchor "start") or ends ("end"); `far`: a leader is due."""

    x: float
    y: float
    anchor: str
    far: bool


def place(
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    obstacles: Sequence[Box],
    bounds: Box,
) -> list[Label]:
    """One label per point, in their order: earlier ones get the better places.

    Right of the dot, then left, then ever farther up and down. Where nothing is free, the place
    with the least overlap is taken.
    """
    taken = [*obstacles]
    labels = []
    for (x, y), name in zip(points, names, strict=True):
        best: tuple[float, Label, Box] | None = None
        for label, box in _candidates(x, y, len(name) * LETTER):
            cost = sum(_overlap(box, other) for other in taken) + _outside(box, bounds)
            if best is None or cost < best[0]:
                best = cost, label, box
            if cost == 0:
                break
        assert best is not None
        labels.append(best[1])
        taken.append(best[2])
    return labels


def along(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes on a line through the points: a label should not lie on it."""
    boxes = []
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        count = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) / 6))
        for i in range(count + 1):
            x, y = x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count
            boxes.append((x - 1, y - 1, x + 1, y + 1))
    return boxes


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
            if len(cluster) > 1:
                moved[index] = middle + (place_ - (len(cluster) - 1) / 2) * apart
    return moved


def _candidates(x: float, y: float, width: float) -> Iterator[tuple[Label, Box]]:
    shifts = [0.0] + [side * 7.0 * i for i in range(1, 2 * FARTHEST) for side in (-1, 1)]
    for shift in shifts:
        for anchor, away in (("start", 1), ("end", -1)):
            gap = GAP if abs(shift) < 8 else GAP + 5
            at, base = x + away * gap, y + 4 + shift
            left = at if anchor == "start" else at - width
            box = (left, base - HIGH + 3, left + width, base + 3)
            yield Label(at, base, anchor, abs(shift) >= 8), box


def _overlap(a: Box, b: Box) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: Box, bounds: Box) -> float:
    """Much worse than an overlap: what is cut off cannot be read."""
    over = max(0.0, bounds[0] - box[0]) + max(0.0, box[2] - bounds[2])
    return 1000 * (over + max(0.0, bounds[1] - box[1]) + max(0.0, box[3] - bounds[3]))
