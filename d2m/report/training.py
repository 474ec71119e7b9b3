"""The report's sections of charts: training, experts, importance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from d2m.report.charts import DIVERGING, RISING, Line, heat_map, line_chart
from d2m.report.section import Chart, ColourScale, Section
from d2m.units import percent

Report = Mapping[str, Any]
Lines = Sequence[Mapping[str, Any]]

# The kinds of FFN site of a FLUX, by the last part of a site's name.
KINDS = {
    "ff": "double blocks, image",
    "ff_context": "double blocks, text",
    "proj_mlp": "single blocks",
}


# ---------------------------------------------------------------- training


def training(report: Report) -> Section | None:
    """Loss terms and routing over the steps, feature errors over the depth."""
    history: Lines = report["history"]
    if not history:
        return None
    charts = [
        _curve(history, "output", "Output error", "mean squared error", log_y=True),
        _curve(history, "feature_error", "Feature error", "relative to the teacher", log_y=True),
        _depth(history),
        _curve(history, "balance", "Load balance", "loss (1 = even)"),
        _curve(history, "group_balance", "Balance of the groups of blocks", "loss (1 = even)"),
        _routing(history),
        _curve(history, "lr", "Learning rate", "rate"),
    ]
    last = history[-1]
    note = f"{last['done']:,} steps in {len({line['stage'] for line in history})} stages"
    note += ", averages of the steps between two points."
    if "dead" in last:
        note += f" Experts that hardly any token chose at the end: {last['dead']}."
    return Section("Training", note, [chart for chart in charts if chart], "charts")


def _stages(history: Lines) -> dict[str, Lines]:
    return {
        name: [line for line in history if line["stage"] == name]
        for name in dict.fromkeys(line["stage"] for line in history)
    }


def _curve(history: Lines, key: str, title: str, y_label: str, log_y: bool = False) -> Chart | None:
    """One figure of the log over the steps, a line per stage."""
    lines = []
    for colour, (name, part) in enumerate(_stages(history).items()):
        points = [(float(line["done"]), float(line[key])) for line in part if key in line]
        if points:
            lines.append(Line(f"stage {name}", points, colour))
    if not lines:
        return None
    return Chart(title, [_over_steps(history, lines, y_label=y_label, title=title, log_y=log_y)])


def _over_steps(history: Lines, lines: Sequence[Line], **options: Any) -> Markup:
    """Lines over the training steps, marked where the stages after the first begin."""
    starts = [(part[0]["done"], name) for name, part in _stages(history).items()]
    return line_chart(
        lines,
        x_label="training step",
        x_range=(0.0, float(history[-1]["done"])),
        marks=[(float(start), f"stage {name}") for start, name in starts[1:]],
        **options,
    )


def _routing(history: Lines) -> Chart | None:
    """Entropy of the experts' load over the steps: the mean layer and the least even one."""
    part = [line for line in history if "entropy" in line]
    if not part:
        return None
    lines = [
        Line(words, [(float(line["done"]), line["entropy"][key]) for line in part], colour)
        for colour, (key, words) in enumerate(
            (("mean", "mean of the layers"), ("least", "least even layer"))
        )
    ]
    low = min(y for line in lines for _, y in line.points)
    y_range = (min(0.8, math.floor(low * 10) / 10), 1.0)
    labels = {"y_label": "entropy / log E", "title": "Entropy of expert load"}
    chart = _over_steps(history, lines, y_range=y_range, **labels)
    return Chart("Entropy of the experts' load (1 = even)", [chart])


def _depth(history: Lines) -> Chart | None:
    """Relative feature error block by block, at the beginning and at the end of training."""
    ends = [line["features"] for line in history if "features" in line]
    if not ends:
        return None
    # Where groups skip blocks, the features after their last blocks are all there is.
    every = max(ends, key=len)
    blocks = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in every))
    lines = []
    for colour, stream in enumerate(("image", "text")):
        for when, errors, faint in (("start", ends[0], True), ("end", ends[-1], False)):
            points = [
                (float(number), errors[f"{block}.{stream}"])
                for number, block in enumerate(blocks)
                if f"{block}.{stream}" in errors
            ]
            lines.append(Line(f"{stream}, {when}", points, colour, faint))
    doubles = sum(block.startswith("transformer_blocks") for block in blocks)
    chart = line_chart(
        lines,
        x_label="block",
        y_label="relative error",
        title="Feature error by depth",
        log_y=True,
        marks=[(float(doubles), "single blocks")] if doubles < len(blocks) else (),
    )
    return Chart("Feature error by depth", [chart])


# ---------------------------------------------------------------- experts


def experts(report: Report) -> Section | None:
    """Load of every expert in every layer, over all times and by noise level."""
    routing = report["routing"]
    if not routing:
        return None
    edges = routing["edges"]  # blocks that a group never ran have no load to show
    layers = {n: each for n, each in routing["layers"].items() if each["all"].get("tokens", 1)}
    names = sorted(layers, key=lambda name: list(KINDS).index(name.rsplit(".", 1)[-1]))
    groups = [KINDS[name.rsplit(".", 1)[-1]] for name in names]
    rows = [name.split(".")[-2] for name in names]
    count = len(layers[names[0]]["all"]["load"])
    times = [f"t {low:g} – {high:g}" for low, high in zip(edges, edges[1:])]
    loads, evenness = [], []
    for name in names:
        figures = [layers[name]["all"], *layers[name]["buckets"]]
        loads.append([share * count for figure in figures for share in figure["load"]])
        evenness.append([count ** figure["entropy"] for figure in figures])
    by_expert = heat_map(
        rows,
        [f"expert {i}" for i in range(count)] * (1 + len(times)),
        loads,
        level=diverging,
        x_label=f"experts 0 to {count - 1}, at all times and by noise level t (1 is pure noise)",
        title="Load of every expert by layer and noise level",
        row_groups=groups,
        column_groups=[group for group in ("all times", *times) for _ in range(count)],
        cell=(max(7.0, 114 / count), 14),
    )
    by_time = heat_map(
        rows,
        ["all", *(f"< {edge:g}" for edge in edges[1:])],
        evenness,
        level=rising(1, count),
        x_label="noise level t (1 is pure noise)",
        title="Effective number of experts by layer and noise level",
        row_groups=groups,
        cell=(42, 14),
    )
    used = [figures["all"]["busiest"] for figures in layers.values()]
    note = (
        f"Top {routing['top_k']} of {count} experts. The busiest expert of a layer takes "
        f"{max(used):.1f} times its fair share at most, {sum(used) / len(used):.1f} times on the "
        "mean."
    )
    fair = ColourScale(DIVERGING, "¼", "fair share", "4 x")
    even = ColourScale(RISING, "1", "", f"{count} experts")
    return Section(
        "Experts",
        note,
        [
            Chart("Load of every expert", [by_expert], fair),
            Chart("Effective number of experts", [by_time], even),
        ],
    )


def diverging(ratio: float) -> str:
    """A fair share (1) is the middle; a quarter and four times are the ends."""
    place = (math.log2(max(ratio, 2**-9)) + 2) / 4
    return DIVERGING[round(min(max(place, 0.0), 1.0) * (len(DIVERGING) - 1))]


def rising(low: float, high: float) -> Callable[[float], str]:
    """Colours from `low` to `high`, the ends' own beyond them."""

    def level(value: float) -> str:
        place = (value - low) / ((high - low) or 1.0)
        return RISING[round(min(max(place, 0.0), 1.0) * (len(RISING) - 1))]

    return level


# ---------------------------------------------------------------- importance


def importance(report: Report) -> Section | None:
    """How much of the importance the first neurons hold, by kind of FFN."""
    curves: Mapping[str, Sequence[float]] = report["importance"]
    if not curves:
        return None
    plan = report["recipe"]
    whole = plan["shared_ratio"] + plan["num_experts"] * plan["expert_ratio"]
    shared = plan["shared_ratio"] / whole
    lines, shares = [], []
    for colour, (kind, words) in enumerate(KINDS.items()):
        group = [curve for site, curve in curves.items() if site.rsplit(".", 1)[-1] == kind]
        if not group:
            continue
        steps = len(group[0]) - 1
        columns = [[curve[i] for curve in group] for i in range(steps + 1)]
        mean = [(i / steps, sum(column) / len(column)) for i, column in enumerate(columns)]
        band = [(i / steps, min(column), max(column)) for i, column in enumerate(columns)]
        at = mean[round(shared * steps)][1]
        shares.append(f"{percent(at)} ({words})")
        lines.append(Line(words, mean, colour, band=band))
    even = Line("all neurons alike", [(0.0, 0.0), (1.0, 1.0)], 3, faint=True)
    chart = line_chart(
        [*lines, even],
        x_label="neurons, the most important first",
        y_label="share of importance",
        title="Cumulative importance of the neurons",
        y_range=(0.0, 1.0),
        marks=[(shared, f"shared expert: {percent(shared)}")],
        percent=True,
        width=960,
        height=340,
    )
    note = (
        f"Split: {plan['split']}. The shared expert takes the first {percent(shared)} of the "
        f"neurons, which hold {', '.join(shares)} of the importance; the others "
        "are distributed to the experts. Bands span the layers."
    )
    return Section("Importance of neurons", note, [Chart("", [chart])], "stack")
