"""The report of a conversion: `report.json` holds every number of it, `report.html` shows them."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.files.atomic import write_text

if TYPE_CHECKING:
    from PIL.Image import Image

CURVE_POINTS = 101  # of an importance curve: one per percent of the neurons
PER_LAYER = ("features", "experts")  # what only the first and last line of a stage keeps


def build_report(
    *,
    name: str,
    base_model: str,
    recipe: Mapping[str, Any],
    parameters: Mapping[str, Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]] = (),
    importance: Mapping[str, Any] | None = None,
    routing: Mapping[str, Any] | None = None,
    pareto: Sequence[Mapping[str, Any]] = (),
    images: Sequence[Mapping[str, Any]] = (),
    scores: Mapping[str, Any] | None = None,
    timings: Mapping[str, float] | None = None,
    identity_error: float | None = None,
) -> dict[str, Any]:
    """Gather what is known of a conversion in one dict of JSON types.

    Args:
        recipe: `recipe.to_dict`.
        parameters: {"dense", "sparse"} -> `parameters.count`.
        history: the lines of the training log (d2m.distill.log).
        importance: FFN site -> scores of its neurons [N] (tensor, array or list).
        routing: `calib.measure.routing.routing_table`.
        pareto: this model and others as rows of `d2m.report.pareto`.
        images: [{"prompt", "seed", "dense", "sparse"}] made from the same noise.
        scores: {"dense", "sparse"} -> result of `calib.shapes.suite.evaluate`; either may be
            missing.
        timings: seconds of the conversion's parts, in order.
        identity_error: relative error of the converted model with all experts on, before training.
    """
    from d2m import __version__

    return {
        "format": 1,
        "d2m": __version__,
        "name": name,
        "base_model": base_model,
        "recipe": dict(recipe),
        "parameters": {key: dict(counts) for key, counts in parameters.items()},
        "history": thin(history),
        "importance": {site: importance_curve(s) for site, s in (importance or {}).items()},
        "routing": dict(routing) if routing else None,
        "pareto": [dict(row) for row in pareto],
        "images": [
            {"prompt": str(row["prompt"]), "seed": int(row["seed"])}
            | {side: data_uri(row[side]) for side in ("dense", "sparse")}
            for row in images
        ],
        "scores": dict(scores or {}),
        "timings": [[part, float(seconds)] for part, seconds in (timings or {}).items()],
        "identity_error": identity_error,
    }


def write_report(folder: str | os.PathLike[str], report: Mapping[str, Any]) -> Path:
    """Write `report.json` and `report.html` into `folder`; returns the latter's path.

    Raises:
        ValueError: the report holds what JSON cannot, or images that are no PNG data URIs.
        OSError: the folder cannot be written.
    """
    from d2m.report.page import render

    # Not files.write_json: its sorted keys would put layer 10 before layer 2.
    text = json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    html = render(json.loads(text))
    write_text(Path(folder) / "report.json", text + "\n")
    return write_text(Path(folder) / "report.html", html)


def thin(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The log with figures per layer only in the first and the last line of every stage.

    Every line keeps their summary: `entropy`, mean and smallest over the FFNs, and `feature_error`,
    the mean relative error of the blocks' features (the loss term of that name cannot show it: its
    weights make it follow the output loss).
    """
    edges = set()
    for stage in {line["index"] for line in history}:
        inside = [i for i, line in enumerate(history) if line["index"] == stage]
        edges |= {inside[0], inside[-1]}
    lines = []
    for number, line in enumerate(history):
        kept = {k: v for k, v in line.items() if number in edges or k not in PER_LAYER}
        if layers := line.get("experts"):
            entropies = [figures["entropy"] for figures in layers.values()]
            kept["entropy"] = {"mean": sum(entropies) / len(entropies), "least": min(entropies)}
        if errors := line.get("features"):
            kept["feature_error"] = sum(errors.values()) / len(errors)
        lines.append(kept)
    return lines


def importance_curve(scores: Any) -> list[float]:
    """Scores [N] -> the share of their sum in the most important 0 %, 1 %, ... 100 % of neurons."""
    ranked = sorted((float(score) for score in scores), reverse=True)
    total = sum(ranked) or 1.0
    sums = [0.0]
    for score in ranked:
        sums.append(sums[-1] + score)
    last = CURVE_POINTS - 1
    curve = []
    for i in range(CURVE_POINTS):
        place = i * len(ranked) / last
        below = int(place)
        above = min(below + 1, len(ranked))
        share = sums[below] + (place - below) * (sums[above] - sums[below])
        curve.append(round(min(share / total, 1.0), 5))
    return curve


def data_uri(image: Image | str) -> str:
    """An image as a PNG data URI; a string is passed on."""
    if isinstance(image, str):
        return image
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
