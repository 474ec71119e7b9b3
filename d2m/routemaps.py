"""The sections of a report on what is chosen where: experts by place, blocks, dead experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2m.canvas import svg, text_at
from d2m.charts import heat_map, scale
from d2m.figures import DIVERGING, KINDS, RISING, diverging
from d2m.markup import Child, Html, el, figure, percent, section, table

Report = Mapping[str, Any]

SHOWN = 6  # layers whose maps are drawn: those where the position tells most


def words_of(site: str) -> str:
    """`single_transformer_blocks.3.proj_mlp` as `single 3`, a double block's with its stream."""
    kind, index, part = site.rsplit(".", 2)
    block = f"{'single' if kind.startswith('single') else 'double'} {index}"
    return block if part == "proj_mlp" else f"{block} {'text' if part == 'ff_context' else 'image'}"


def _level(most: float) -> Any:
    return lambda share: RISING[round(min(share / most, 1.0) * (len(RISING) - 1))]


# ---------------------------------------------------------------- experts by position


def positions(report: Report) -> Html | None:
    """How much the place in the picture decides the expert, and the maps where it does most."""
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
        charts.append(
            heat_map(
                [KINDS[kind]],
                [name.split(".")[-2] for name in names],
                [[tells[name] for name in names]],
                level=_level(most),
                show=lambda share: f"{percent(share, 1)} of the choice told by the position",
                x_label="block",
                title=f"What the position tells of the expert, {KINDS[kind]}",
                cell=(24, 18),
            )
        )
    key = scale(RISING, "0", "", percent(most), "Key: share of the choice told by the position")
    shown = sorted(tells, key=lambda name: (-tells[name], name))[:SHOWN]
    shape = found["rows"], found["columns"]
    maps = _maps({name: layers[name]["share"] for name in shown}, tells, shape)
    legend = scale(DIVERGING, "¼", "its mean", "4 x", "Key: an expert's share in a place")
    top = max(tells, key=lambda name: (tells[name], name))
    note = (
        f"The picture in {shape[0]} x {shape[1]} parts. The position tells at most "
        f"{percent(tells[top], 1)} of which expert is chosen ({words_of(top)}), "
        f"{percent(sum(tells.values()) / len(tells), 1)} on the mean: mutual information over "
        "log E, less what chance alone would show. Blank: never chosen for a part of the picture."
    )
    first = figure("How much the position tells", key, el("div", *charts, class_="scroll"))
    second = figure(
        f"Experts over the picture, the {len(shown)} layers where it tells most",
        legend,
        el("div", maps, class_="scroll"),
    )
    return section("Experts by image position", note, el("div", first, second, class_="maps"))


def _maps(
    layers: Mapping[str, Sequence[Sequence[float]]],
    tells: Mapping[str, float],
    shape: tuple[int, int],
) -> Html:
    """A row of small pictures per layer, one per expert: its share here over its mean share."""
    rows, columns = shape
    cell = max(4.0, min(14.0, 56 / max(shape)))
    wide, high, left, top = columns * cell, rows * cell, 132, 22
    parts: list[Html] = []
    count = max(len(shares) for shares in layers.values())
    for expert in range(count):
        x = left + expert * (wide + 10)
        parts.append(text_at(x + wide / 2, 13, str(expert), "tick", "middle"))
    y = float(top)
    for name, shares in layers.items():
        words = words_of(name)
        parts.append(text_at(left - 10, y + high / 2, words, "tick", "end"))
        parts.append(text_at(left - 10, y + high / 2 + 14, percent(tells[name], 1), "tick", "end"))
        for expert, places in enumerate(shares):
            mean = sum(places) / len(places)
            if not mean:  # an expert that is never chosen has no place: nothing is drawn
                continue
            for place, share in enumerate(places):
                ratio = share / mean
                row, column = divmod(place, columns)
                says = (
                    f"{words}, expert {expert}, row {row}, column {column}: "
                    f"{percent(share, 1)} of the choices, {ratio:.2f} x its mean"
                )
                box = {"x": left + expert * (wide + 10) + column * cell, "y": y + row * cell}
                kind = diverging(ratio)
                parts.append(
                    el("rect", el("title", says), **box, width=cell, height=cell, class_=kind)
                )
        y += high + 12
    width = left + count * (wide + 10)
    parts.append(text_at((left + width) / 2, y + 8, "expert", "title", "middle"))
    return svg(width, y + 16, "Share of every expert by place in the picture", parts)


# ---------------------------------------------------------------- blocks of groups


def block_choices(report: Report) -> Html | None:
    """Which of its blocks every group runs, by noise level and by kind of prompt."""
    groups: Mapping[str, Any] = (report["routing"] or {}).get("groups") or {}
    if not groups:
        return None
    edges = report["routing"]["edges"]
    times = ["all", *(f"< {edge:g}" for edge in edges[1:])]
    by_time = _blocks(groups, times, lambda g: [g["all"], *g["buckets"]], 46, "noise level t")
    key = scale(RISING, "0 %", "", "100 %", "Key: share of samples that ran the block")
    title = "By noise level (1 is pure noise)"
    charts = [figure(title, key, el("div", by_time, class_="scroll"))]
    one = next(iter(groups.values()))
    if kinds := one["categories"]:
        heads = [f"{name.replace('_', ' ')} ({kinds[name]['samples']})" for name in kinds]
        wide = 12 + 6.2 * max(map(len, heads))
        drawn = _blocks(groups, heads, lambda g: g["categories"].values(), wide, "kind of prompt")
        title = "By kind of prompt (samples seen)"
        charts.append(figure(title, key, el("div", drawn, class_="scroll")))
    fixed = sum(max(group["all"]["share"]) > 0.99 for group in groups.values())
    note = (
        f"Share of {one['all']['samples']} samples that ran each block; the others skip it. "
        f"{fixed} of {len(groups)} groups run the same blocks for nearly every sample."
    )
    return section("Choice of blocks", note, el("div", *charts, class_="maps"))


def _blocks(
    groups: Mapping[str, Any], heads: Sequence[str], take: Any, wide: float, x_label: str
) -> Html:
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
        level=_level(1.0),
        show=lambda share: f"{percent(share, 1)} of the samples",
        x_label=x_label,
        title=f"Blocks that groups run, by {x_label}",
        row_groups=headings,
        cell=(wide, 14),
    )


# ---------------------------------------------------------------- dead experts


def dead(report: Report) -> Html | None:
    """Experts with under 1 % of their fair share of the choices, layer by layer."""
    routing = report["routing"]
    if not routing or "dead_experts" not in next(iter(routing["layers"].values()))["all"]:
        return None
    edges = routing["edges"]
    times = [f"t {low:g} – {high:g}" for low, high in zip(edges, edges[1:])]
    body: list[list[Child]] = []
    total = 0
    for name, layer in routing["layers"].items():
        everywhere = layer["all"]["dead_experts"]
        if not layer["all"]["tokens"]:
            body.append([words_of(name), "no token came here: its group ran other blocks", ""])
            continue
        total += len(everywhere)
        at_times = []
        for when, bucket in zip(times, layer["buckets"]):
            more = [str(i) for i in bucket["dead_experts"] if i not in everywhere]
            if more and bucket["tokens"]:
                at_times.append(f"{when}: {', '.join(more)}")
        if everywhere or at_times:
            body.append([words_of(name), ", ".join(map(str, everywhere)), "; ".join(at_times)])
    reached = [layer["all"] for layer in routing["layers"].values() if layer["all"]["tokens"]]
    note = (
        f"{total} of {sum(len(layer['load']) for layer in reached)} experts in layers that ran are "
        "dead: on these data they take under 1 % of their fair share of the choices, at all noise "
        "levels together."
    )
    head: list[Child] = ["layer", "dead at all noise levels", "and at some"]
    return section("Dead experts", note, table(head, body, words=3) if body else None)
