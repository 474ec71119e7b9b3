"""The sections of a report on what is chosen where: experts by place, blocks, dead experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from d2m.report.charts import DIVERGING, RISING, heat_map
from d2m.report.section import Chart, ColourScale, Section, Table
from d2m.report.training import KINDS, diverging, rising
from d2m.units import percent

Report = Mapping[str, Any]

SHOWN = 6  # layers whose maps are drawn: those where the position tells most


def layer_title(site: str) -> str:
    """`single_transformer_blocks.3.proj_mlp` as `single 3`, a double block's with its stream."""
    kind, index, part = site.rsplit(".", 2)
    block = f"{'single' if kind.startswith('single') else 'double'} {index}"
    return block if part == "proj_mlp" else f"{block} {'text' if part == 'ff_context' else 'image'}"


# ---------------------------------------------------------------- experts by position


def positions(report: Report) -> Section | None:
    """How much the place in the image decides the expert, and the maps where it does most."""
    found = (report["routing"] or {}).get("positions")
    if not found or not found["layers"]:
        return None
    layers: Mapping[str, Any] = found["layers"]
    tells = {name: layer["information"] for name, layer in layers.items()}
    most = max(0.05, *tells.values())
    kinds = [kind for kind in KINDS if any(name.endswith(f".{kind}") for name in layers)]
    charts = []
    for kind in kinds:
        names = [name for name in layers if name.endswith(f".{kind}")]
        names.sort(key=lambda name: int(name.split(".")[-2]))
        charts.append(
            heat_map(
                [KINDS[kind]],
                [name.split(".")[-2] for name in names],
                [[tells[name] for name in names]],
                level=rising(0.0, most),
                x_label="block",
                title=f"What the position says about the expert, {KINDS[kind]}",
                cell=(24, 18),
            )
        )
    shown = sorted(tells, key=lambda name: (-tells[name], name))[:SHOWN]
    shape = found["rows"], found["columns"]
    maps = _maps({name: layers[name]["share"] for name in shown}, tells, shape)
    top = max(tells, key=lambda name: (tells[name], name))
    note = (
        f"The image in {shape[0]} x {shape[1]} parts. The position says at most "
        f"{percent(tells[top], 1)} about which expert is chosen ({layer_title(top)}), "
        f"{percent(sum(tells.values()) / len(tells), 1)} on the mean: mutual information over "
        "log E, less what chance alone would show. Blank: never chosen for a part of the image."
    )
    caption = f"Experts over the image, the {len(shown)} layers where it tells most"
    return Section(
        "Experts by image position",
        note,
        [
            Chart(
                "How much the position says", charts, ColourScale(RISING, "0", "", percent(most))
            ),
            Chart(caption, [maps], ColourScale(DIVERGING, "¼", "its mean", "4 x")),
        ],
    )


def _maps(
    layers: Mapping[str, Sequence[Sequence[float]]],
    tells: Mapping[str, float],
    shape: tuple[int, int],
) -> Markup:
    """A row of small maps per layer, one per expert: its share here over its mean share.

    An expert that is never chosen has no place: its map is blank.
    """
    rows, columns = shape
    size = max(4.0, min(14.0, 56 / max(shape)))
    count = max(len(shares) for shares in layers.values())
    values, headings = [], []
    for name, shares in layers.items():
        blank: list[float | None] = [None for _ in range(rows * columns)]
        ratios = [
            [share * len(places) / sum(places) for share in places] if any(places) else blank
            for places in shares
        ]
        ratios += [blank] * (count - len(shares))
        for row in range(rows):
            part = slice(row * columns, (row + 1) * columns)
            values.append([ratio for each in ratios for ratio in each[part]])
            headings.append(f"{layer_title(name)}: {percent(tells[name], 1)}")
    return heat_map(
        [""] * len(values),
        [""] * count * columns,
        values,
        level=diverging,
        x_label="expert",
        title="Share of every expert by place in the image",
        row_groups=headings,
        column_groups=[str(expert) for expert in range(count) for _ in range(columns)],
        cell=(size, size),
        apart=-0.4,  # no seams
    )


# ---------------------------------------------------------------- blocks of groups


def block_choices(report: Report) -> Section | None:
    """Which of its blocks every group runs, by noise level and by kind of prompt."""
    groups: Mapping[str, Any] = (report["routing"] or {}).get("groups") or {}
    if not groups:
        return None
    edges = report["routing"]["edges"]
    times = ["all", *(f"< {edge:g}" for edge in edges[1:])]
    by_time = _blocks(groups, times, lambda g: [g["all"], *g["buckets"]], 46, "noise level t")
    key = ColourScale(RISING, "0 %", "", "100 %")
    charts = [Chart("By noise level (1 is pure noise)", [by_time], key)]
    one = next(iter(groups.values()))
    if kinds := one["categories"]:
        heads = [f"{name.replace('_', ' ')} ({kinds[name]['samples']})" for name in kinds]
        wide = 12 + 6.2 * max(map(len, heads))
        by_kind = _blocks(groups, heads, lambda g: g["categories"].values(), wide, "kind of prompt")
        charts.append(Chart("By kind of prompt (samples seen)", [by_kind], key))
    fixed = sum(max(group["all"]["share"]) > 0.99 for group in groups.values())
    note = (
        f"Share of {one['all']['samples']} samples that ran each block; the others skip it. "
        f"{fixed} of {len(groups)} groups run the same blocks for nearly every sample."
    )
    return Section("Choice of blocks", note, charts)


def _blocks(
    groups: Mapping[str, Any], heads: Sequence[str], take: Any, wide: float, x_label: str
) -> Markup:
    """Rows are blocks under their group's name, columns what `take` gives of the group."""
    rows, headings, values = [], [], []
    for name, group in groups.items():
        kind = "single" if name.startswith("single") else "double"
        blocks = group["blocks"]
        heading = f"{kind} {blocks[0]} – {blocks[-1]}, {group['kappa']} of {len(blocks)} run"
        for place, block in enumerate(blocks):
            rows.append(str(block))
            headings.append(heading)
            values.append([each["share"][place] for each in take(group)])
    return heat_map(
        rows,
        heads,
        values,
        level=rising(0.0, 1.0),
        x_label=x_label,
        title=f"Blocks that groups run, by {x_label}",
        row_groups=headings,
        cell=(wide, 14),
    )


# ---------------------------------------------------------------- dead experts


def dead(report: Report) -> Section | None:
    """Experts with under 1 % of their fair share of the choices, layer by layer."""
    routing = report["routing"]
    if not routing or "dead_experts" not in next(iter(routing["layers"].values()))["all"]:
        return None
    edges = routing["edges"]
    times = [f"t {low:g} – {high:g}" for low, high in zip(edges, edges[1:])]
    body: list[list[str]] = []
    total = 0
    for name, layer in routing["layers"].items():
        everywhere = layer["all"]["dead_experts"]
        if not layer["all"]["tokens"]:
            body.append([layer_title(name), "no token came here: its group ran other blocks", ""])
            continue
        total += len(everywhere)
        at_times = []
        for when, bucket in zip(times, layer["buckets"]):
            more = [str(i) for i in bucket["dead_experts"] if i not in everywhere]
            if more and bucket["tokens"]:
                at_times.append(f"{when}: {', '.join(more)}")
        if everywhere or at_times:
            body.append([layer_title(name), ", ".join(map(str, everywhere)), "; ".join(at_times)])
    reached = [layer["all"] for layer in routing["layers"].values() if layer["all"]["tokens"]]
    note = (
        f"{total} of {sum(len(layer['load']) for layer in reached)} experts in layers that ran are "
        "dead: on these data they take under 1 % of their fair share of the choices, at all noise "
        "levels together."
    )
    table = Table(("layer", "dead at all noise levels", "and at some"), body, text_columns=3)
    return Section("Dead experts", note, table=table if body else None)
