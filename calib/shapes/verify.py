"""Whether an image shows exactly what a caption says: written from the scenes' definition alone.

The only thing shared with render.py is the palette in world.py: background, sizes and the shapes'
exact proportions are measured in the image. An image passes if it holds exactly the caption's
things (no more, no fewer), each a clear instance of its shape in its colour, and if the relation
holds. Steps: foreground = nearer to a palette colour than to the background; 4-connected
components; a component's colour from its strongest pixels; its coverage (0..1 per pixel, as
anti-aliasing makes it) compared with ideal shapes of the same area and centroid, which blur
leaves alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from calib.shapes.world import COLOURS, SHAPES, Scene, World

# Limits of what still counts as a thing, as shares of the image's side or of its area.
MIN_AREA = 0.008  # smaller components are specks: 8 pixels of a 32 px image
MIN_SIDE, MAX_SIDE = 0.16, 0.60
# RGB distance from the background at which a patch cannot be overlooked (VAE errors at 32 dB: 11).
VISIBLE = 45.0
# RGB distance to the nearest palette colour: a thin arm blurred by the VAE loses up to a third.
MAX_COLOUR_DISTANCE = 80.0
# Share of a component's pixels off the line from background to its colour: two colours in one blob.
MAX_IMPURE = 0.2
MIN_IOU = 0.80  # with the best ideal shape; ground truth has .86 and more, a 3:2 ellipse .75
MIN_ALONG = 0.12  # relation: distance of centroids along its axis, as a share of the image's side
FINE = 4  # points per pixel side when an ideal shape is turned into coverage


@dataclass(frozen=True)
class DetectedObject:
    """An object seen in an image; shape or colour is "?" if unclear.

    x, y (centroid, 0 = middle of the first pixel) and size (root of the area) in pixels.
    """

    shape: str
    colour: str
    x: float
    y: float
    size: float
    iou: float


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows a scene; if not, `reason` says in words what is wrong."""

    ok: bool
    reason: str
    found: tuple[DetectedObject, ...]


def verify(image: np.ndarray, scene: Scene, world: World) -> Verdict:
    """Judge an image, uint8 [S, S, 3] with S = world.size, against a scene.

    Raises ValueError for another shape or dtype.
    """
    found = find_objects(image, world)
    reason = _difference(found, scene, world)
    return Verdict(reason is None, reason or "ok", found)


def find_objects(image: np.ndarray, world: World) -> tuple[DetectedObject, ...]:
    """All objects in an image, uint8 [S, S, 3], those that fit no shape or colour included.

    Raises ValueError for another shape or dtype.
    """
    side = world.size
    if image.shape != (side, side, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image is {image.dtype} {list(image.shape)}, expected uint8 [{side}, {side}, 3] "
            f"(World.size = {side})"
        )
    pixels = image.astype(np.float32)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    offset = pixels - _median(frame)  # from the background
    palette = _palette(world)
    contrast = (offset**2).sum(-1)
    # |p - c|^2 = |p|^2 - 2 p.c + |c|^2 for all palette colours at once
    to_palette = (palette**2).sum(-1) - 2 * pixels @ palette.T
    foreground = to_palette.min(-1) + (pixels**2).sum(-1) < contrast
    labels, areas = components(foreground)
    smallest = MIN_AREA * side * side
    things = [k for k, area in enumerate(areas, start=1) if area >= smallest]
    found = [_describe(labels, k, pixels, offset, world) for k in things]
    # What is visible, no palette colour and no thing's edge: a ghost that nobody asked for.
    known = np.zeros(len(areas) + 1, bool)
    known[things] = True
    ghosts, areas = components((contrast > VISIBLE**2) & ~_grow(_grow(known[labels])))
    for k, area in enumerate(areas, start=1):
        if area >= smallest:
            rows, columns = np.nonzero(ghosts == k)
            x, y = round(float(columns.mean()), 2), round(float(rows.mean()), 2)
            found.append(DetectedObject("?", "?", x, y, round(area**0.5, 2), 0.0))
    return tuple(found)


def components(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """4-connected components of a bool [h, w] mask: labels int32 [h, w] and pixel counts.

    Labels are 0 outside and 1.. in reading order; counts[k - 1] belongs to label k. 4- and not
    8-connected: things one blurred pixel apart must not join at a corner.
    """
    height, width = mask.shape
    stride = width + 2
    padded = np.zeros((height + 2, stride), np.uint8)
    padded[1:-1, 1:-1] = mask
    todo = bytearray(padded.tobytes())
    labels = np.zeros((height + 2) * stride, np.int32)
    areas: list[int] = []
    start = todo.find(1)
    while start >= 0:
        todo[start] = 0
        members = [start]
        for p in members:  # grows while we walk it
            for q in (p - 1, p + 1, p - stride, p + stride):
                if todo[q]:
                    todo[q] = 0
                    members.append(q)
        areas.append(len(members))
        labels[members] = len(areas)
        start = todo.find(1, start)
    return labels.reshape(height + 2, stride)[1:-1, 1:-1], areas


def _describe(
    labels: np.ndarray, k: int, pixels: np.ndarray, offset: np.ndarray, world: World
) -> DetectedObject:
    """Component k of labels [S, S]; pixels, and offsets from the background: float32 [S, S, 3]."""
    inside = labels == k
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    top, left = max(rows[0] - 2, 0), max(columns[0] - 2, 0)
    window = np.s_[top : rows[-1] + 3, left : columns[-1] + 3]
    inside, others = inside[window], (labels[window] != k) & (labels[window] > 0)
    offset, pixels = offset[window], pixels[window]
    contrast = (offset**2).sum(-1)

    # The strongest half: edge pixels are mixtures with the background.
    strong = inside & (contrast >= _median(contrast[inside]))
    colour_offset = _median(offset[strong])
    distances = np.linalg.norm(_palette(world) - _median(pixels[strong]), axis=1)
    nearest = int(distances.argmin())
    colour = world.colour_names[nearest] if distances[nearest] <= MAX_COLOUR_DISTANCE else "?"

    # Coverage: the share of the object's colour in a pixel. The rim of two pixels holds the faint
    # half of the edge.
    norm = max(float((colour_offset**2).sum()), 1.0)  # 0 is possible in pure noise
    coverage = offset @ colour_offset / norm
    impure = ((offset - coverage[..., None] * colour_offset) ** 2).sum(-1) > 0.15 * norm
    if impure[inside].mean() > MAX_IMPURE:
        colour = "?"
    reach = _grow(_grow(inside)) & ~_grow(others)
    # Noise of 4/255 on a contrast of 130 is a coverage of .03.
    solid = (reach | inside) & (coverage >= 0.08)
    coverage = np.where(solid, coverage.clip(0, 1), 0).astype(np.float32)

    area = max(float(coverage.sum()), 1e-3)
    y = float(coverage.sum(1) @ np.arange(coverage.shape[0])) / area
    x = float(coverage.sum(0) @ np.arange(coverage.shape[1])) / area
    shape, iou = _shape(coverage, x, y, area)
    sides = (rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    if iou < MIN_IOU or min(sides) < MIN_SIDE * world.size or max(sides) > MAX_SIDE * world.size:
        shape = "?"
    x, y = round(x + float(left), 2), round(y + float(top), 2)
    return DetectedObject(shape, colour, x, y, round(area**0.5, 2), round(iou, 3))


@cache
def _palette(world: World) -> np.ndarray:
    return np.array([COLOURS[name] for name in world.colour_names], np.float32)


def _median(values: np.ndarray) -> np.ndarray:
    """The (upper) median along the first axis; on short arrays ten times faster than np.median."""
    return np.sort(values, axis=0)[len(values) // 2]


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its 4-neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


# Ideal shapes around the origin, u right and v down, of any size: the proportions that a person
# would call by the name.
Region = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _triangle(height: float) -> Region:
    """Apex up, base 2 wide, `height` high (1.73: equilateral)."""
    return lambda u, v: (abs(v) <= height / 2) & (abs(u) <= v / height + 0.5)


def _cross(arm: float) -> Region:
    return lambda u, v: (np.minimum(abs(u), abs(v)) <= arm) & (np.maximum(abs(u), abs(v)) <= 1)


def _ring(hole: float) -> Region:
    return lambda u, v: (u * u + v * v <= 1) & (u * u + v * v >= hole * hole)


IDEALS: dict[str, tuple[Region, ...]] = {
    "circle": (lambda u, v: u * u + v * v <= 1,),
    "square": (lambda u, v: np.maximum(abs(u), abs(v)) <= 1,),
    "triangle": (_triangle(1.7), _triangle(2.0)),
    "cross": (_cross(0.28), _cross(0.34), _cross(0.40)),
    "diamond": (lambda u, v: abs(u) + abs(v) <= 1,),
    "ring": (_ring(0.40), _ring(0.48), _ring(0.56)),
}


@cache
def _moments(shape: str, variant: int) -> tuple[float, float]:
    """Area and vertical centroid of an ideal shape, by counting points."""
    grid = (np.arange(600) + 0.5) / 200 - 1.5
    u, v = grid[None, :], grid[:, None]
    inside = IDEALS[shape][variant](u, v)
    return float(inside.mean() * 9), float((inside * v).sum() / inside.sum())


def _shape(coverage: np.ndarray, x: float, y: float, area: float) -> tuple[str, float]:
    """Name and soft IoU of the ideal shape nearest to the coverage, float32 [h, w].

    x, y, area: the coverage's centroid and sum in pixels, which every ideal shape is given first.
    All shapes compete, also those outside the world: a diamond is no circle where nobody draws
    diamonds either. Each is tried sharp and softened: on things ten pixels wide the edges are a
    third of the area, and comparing a blurred thing with sharp shapes alone costs .1 of the IoU,
    as much as the difference between a good and a bad shape.
    """
    height, width = coverage.shape
    v = ((np.arange(height * FINE) + 0.5) / FINE - 0.5 - y)[:, None]
    u = ((np.arange(width * FINE) + 0.5) / FINE - 0.5 - x)[None, :]
    variants = [(name, i) for name, regions in IDEALS.items() for i in range(len(regions))]
    inside = np.empty((len(variants), height * FINE, width * FINE), np.float32)
    for points, (name, i) in zip(inside, variants, strict=True):
        unit_area, unit_v = _moments(name, i)
        scale = (area / unit_area) ** 0.5
        points[...] = IDEALS[name][i](u / scale, v / scale + unit_v)
    (down, soft_down), (right, soft_right) = _pooling(height), _pooling(width)
    ideals = np.concatenate([down @ inside @ right.T, soft_down @ inside @ soft_right.T])
    common = np.minimum(ideals, coverage).sum((1, 2))
    ious = common / (ideals.sum((1, 2)) + area - common)
    best = int(ious.argmax())
    return variants[best % len(variants)][0], float(ious[best])


@cache
def _pooling(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 [n, n * FINE]: the mean of each pixel's points, and the same softened.

    Softened by the 1-2-1 kernel, a Gaussian of 0.7 px: about what a VAE at 32 dB does to an edge.
    """
    mean = np.repeat(np.eye(n, dtype=np.float32), FINE, axis=1) / FINE
    kernel = (2 * np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1)) / 4
    return mean, (kernel @ mean).astype(np.float32)


def _difference(found: tuple[DetectedObject, ...], scene: Scene, world: World) -> str | None:
    """What is wrong with the found objects as an instance of the scene; None if nothing is."""
    unclear = [f for f in found if "?" in (f.shape, f.colour)]
    if unclear:
        return f"an unclear object at ({unclear[0].x:.0f}, {unclear[0].y:.0f})"
    if len(found) != len(scene.things):
        seen = f"{len(found)} object{'' if len(found) == 1 else 's'}"
        return f"{seen}, expected {len(scene.things)}"
    shapes, wanted = Counter(f.shape for f in found), Counter(t.shape for t in scene.things)
    if shapes != wanted:
        return f"{_listed(shapes)}, expected {_listed(wanted)}"
    pairs = Counter((f.colour, f.shape) for f in found)
    wanted_pairs = Counter((t.colour, t.shape) for t in scene.things if t.colour)
    if wanted_pairs - pairs:
        missing = next(iter(wanted_pairs - pairs))
        return f"no {missing[0]} {missing[1]}"
    if scene.relation:
        first, second = (next(f for f in found if f.shape == t.shape) for t in scene.things)
        if not relation_holds(first, second, scene.relation, world):
            return f"the {first.shape} is not {scene.relation} the {second.shape}"
    return None


def relation_holds(
    first: DetectedObject, second: DetectedObject, relation: str, world: World
) -> bool:
    """Whether the first is clearly left of, right of, above or below the second."""
    right, down = second.x - first.x, second.y - first.y
    along, across = {
        "left of": (right, down),
        "right of": (-right, down),
        "above": (down, right),
        "below": (-down, right),
    }[relation]
    return along >= MIN_ALONG * world.size and along > abs(across)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(
        f"{n} {name if n == 1 else SHAPES[name]}" for name, n in sorted(counts.items())
    )
