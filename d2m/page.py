"""`report.html`: a report's dict as one page without scripts and without anything from outside."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from d2m.charts import Line, interval_chart, legend
from d2m.figures import experts, importance, training
from d2m.markup import Child, Html, document, el, figure, join, percent, section, table
from d2m.pareto import pareto
from d2m.routemaps import block_choices, dead, positions
from d2m.units import human

Report = Mapping[str, Any]

_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


def render(report: Report) -> str:
    """The page of a report as made by `d2m.report.build_report`; parts without data are left out.

    ValueError if a picture is no PNG data URI (nothing else may reach an image's source).
    """
    charts = (pareto, training, experts, positions, block_choices, dead, importance)
    sections = (pictures, scores, *charts, recipe, parameters, timings)
    foot = el("footer", f"Written by d2m {report['d2m']}. The numbers are in report.json.")
    title = f"{report['name']}: conversion report"
    return document(title, header(report), *(section(report) for section in sections), foot)


def header(report: Report) -> Html:
    """Title and the figures that matter most."""
    dense, sparse = report["parameters"]["dense"], report["parameters"]["sparse"]
    less, share = 1 - sparse["activated"] / dense["total"], f"{100 * sparse['ffn_share']:g} %"
    tiles = [
        (human(sparse["activated"]), "activated parameters", f"{percent(less)} fewer than dense"),
        (share, "of the FFN weights work", f"shared + {sparse['top_k']} experts a token"),
    ]
    for side in ("sparse", "dense"):
        if side in report["scores"]:
            rate = report["scores"][side]["overall"]
            tiles.append((f"{rate['score']:.3f}", f"{side} score", _between(rate)))
    outputs = [line["output"] for line in report["history"]]
    if len(outputs) > 1:
        less = 1 - outputs[-1] / outputs[0]
        tiles.append((percent(less), "less output error", "end of training against its start"))
    if report["identity_error"] is not None:
        error = power(report["identity_error"])
        tiles.append((error, "identity error", "all experts on, before training"))
    cells = [
        el("div", el("b", value), el("span", name), el("small", note), class_="tile")
        for value, name, note in tiles
    ]
    plan = report["recipe"]
    what = (
        f"{report['base_model']} with every FFN split into one shared expert and "
        f"{plan['num_experts']} routed ones, of which a token uses {plan['top_k']} "
        f"(recipe {plan['name']})."
    )
    return el("header", el("h1", report["name"]), el("p", what), el("div", *cells, class_="tiles"))


def pictures(report: Report) -> Html | None:
    """Dense beside sparse, drawn from the same prompts and the same noise."""
    if not report["images"]:
        return None
    cards = []
    for row in report["images"]:
        pair = []
        for side in ("dense", "sparse"):
            if not _PNG.fullmatch(row[side]):
                raise ValueError(
                    f"the {side} picture of {row['prompt']!r} is {row[side][:30]!r}..., expected a "
                    "PNG data URI; make it with d2m.report.data_uri."
                )
            image = el("img", src=row[side], alt=f"{row['prompt']} ({side})")
            pair.append(el("div", image, el("small", side)))
        words = el("figcaption", row["prompt"], el("small", f" seed {row['seed']}"))
        cards.append(el("figure", el("div", *pair, class_="pair"), words))
    note = "Dense and sparse model, the same prompts and the same noise."
    return section("Pictures", note, el("div", *cards, class_="cards"))


def scores(report: Report) -> Html | None:
    """Scores with their intervals, as a chart and as a table."""
    sides = [side for side in ("dense", "sparse") if side in report["scores"]]
    if not sides:
        return None
    results = [report["scores"][side] for side in sides]
    categories = dict.fromkeys(name for result in results for name in result["categories"])
    rows = [(c.replace("_", " "), [r["categories"].get(c) for r in results]) for c in categories]
    rows.append(("overall", [result["overall"] for result in results]))
    dots = [(c, [r and (r["score"], r["low"], r["high"]) for r in rates]) for c, rates in rows]
    chart = interval_chart(
        dots,
        sides,
        x_label="share of pictures judged right",
        title="Scores by category, with 95 % intervals",
    )
    names = [Line(side, [], colour) for colour, side in enumerate(sides)]
    head: list[Child] = ["category", "n"]
    for side in sides:
        head += [side, "95 % interval"]
    body = []
    for category, rates in rows:
        cells: list[Child] = [category, next(rate["n"] for rate in rates if rate)]
        for rate in rates:
            cells += [f"{rate['score']:.3f}", _between(rate)] if rate else ["", ""]
        body.append(cells)
    first = results[0]
    note = (
        f"Suite {first['suite']}: {first['n']} pictures of held-out captions, seed "
        f"{first['seed']}, judged by an exact verifier. Wilson intervals."
    )
    drawn = figure("", legend(names), chart)
    return section("Scores", note, el("div", drawn, table(head, body), class_="halves"))


def recipe(report: Report) -> Html:
    """How the model was made."""
    plan = report["recipe"]
    about = {
        "Split of the neurons": plan["split"],
        "Structure": f"{plan['num_experts']} experts of {plan['expert_ratio']:g} x the width, "
        f"shared expert of {plan['shared_ratio']:g} x, top {plan['top_k']}",
        "Calibration": f"{plan['calibration']['batches']} batches of "
        f"{plan['calibration']['batch_size']}",
        "Noise levels": f"t = sigmoid(N({plan['t_mean']:g}, {plan['t_std']:g}))",
        "Precision": plan["precision"],
        "Seed": plan["seed"],
    }
    if shares := [each for row in plan.get("shares", {}).values() for each in row]:
        about["Shared experts"] = f"{min(shares):g} to {max(shares):g} x the width, by block"
    blocks, modulation = plan.get("blocks", {}), plan.get("adaln", {})
    if groups := [group for each in blocks.get("groups", {}).values() for group in each]:
        about["Groups of blocks"] = f"{len(groups)}, each keeps {blocks['kappa']} of its blocks"
    if modulation.get("mode", "full") != "full":
        about["Modulation"] = modulation["mode"]
    facts = [join(el("dt", name), el("dd", value)) for name, value in about.items()]
    head = ["stage", "trains", "top k", "steps", "batch", "learning rate", "losses", "average"]
    rows = [
        [
            stage["name"] + (" (left out)" if stage.get("skip") else ""),
            ", ".join(stage["train"]),
            stage["top_k"],
            f"{stage['steps']:,}",
            stage["batch_size"],
            f"{stage['lr']:g}",
            ", ".join(f"{name} {weight:g}" for name, weight in stage["losses"].items()),
            f"{stage['ema']:g}" if stage["ema"] else "none",
        ]
        for stage in plan["stages"]
    ]
    stages = table(head, rows) if rows else el("p", "No training: the FFNs were only split.")
    return section("Recipe", f"{plan['name']}, in recipe.json.", el("dl", *facts), stages)


def parameters(report: Report) -> Html:
    """Total and activated parameters, dense and sparse."""
    dense, sparse = report["parameters"]["dense"], report["parameters"]["sparse"]
    every = dense["total"]
    rows = [
        ("dense model", dense["total"]),
        ("sparse model, total", sparse["total"]),
        ("sparse model, activated", sparse["activated"]),
        ("its FFNs, total", sparse["ffn"]),
        ("its FFNs, activated", sparse["ffn_activated"]),
        ("its routed experts", sparse["experts"]),
        ("its gates", sparse["gates"]),
    ]
    body = [[name, f"{n:,}", human(n), percent(n / every, 1)] for name, n in rows]
    note = (
        f"Of the transformer alone. A token uses the shared expert and {sparse['top_k']} of "
        f"{sparse['num_experts']} experts: {100 * sparse['ffn_share']:g} % of the FFNs' matrices, "
        f"{100 * sparse['ffn_share_with_biases']:.2f} % with biases and gates counted."
    )
    return section("Parameters", note, table(["", "count", "", "of the dense model"], body))


def timings(report: Report) -> Html | None:
    """Seconds of every part of the conversion, with bars."""
    if not report["timings"]:
        return None
    longest = max(seconds for _, seconds in report["timings"]) or 1.0
    total = sum(seconds for _, seconds in report["timings"])
    rows = []
    for name, seconds in report["timings"]:
        bar = el("span", class_="bar", style=f"width:{100 * seconds / longest:.1f}%")
        rows.append([name, duration(seconds), el("div", bar, class_="track")])
    rows.append(["together", duration(total), None])
    return section("Time", "On the machine that converted.", table(["part", "time", ""], rows))


def duration(seconds: float) -> str:
    """2.4 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def power(value: float) -> str:
    """1.6e-07 as 2 x 10 to the -7, in superscript digits."""
    if value <= 0:
        return "0"
    exponent = math.floor(math.log10(value))
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 10.0**exponent:.1f}·10{digits}"


def _between(rate: Mapping[str, float]) -> str:
    return f"{rate['low']:.3f} – {rate['high']:.3f}"
