"""The model card of a sparse pipeline: README.md with the front matter the hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from d2m.markup import percent
from d2m.units import human

TAGS = ("d2m", "dense2moe", "mixture-of-experts", "text-to-image")


def model_card(
    *,
    name: str,
    base_model: str,
    recipe: Mapping[str, Any],
    parameters: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    licence: str | None = None,
    family: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """README.md of a sparse pipeline directory.

    Args:
        base_model: what was converted, a hub id or a path.
        recipe: `recipe.to_dict`; parameters: {"dense", "sparse"} -> `parameters.count`.
        scores: {"dense", "sparse"} -> result of `calib.suite.evaluate`; either may be missing.
        defaults: keywords a pipeline call should get (`generation_defaults`).
        licence: the base model's, as the hub names it; None leaves it to the reader to look up.
        family: what the base model is, such as FLUX.1 [dev]; tags: the hub's words for it.
    """
    parts = [
        _front_matter(base_model, licence, tags),
        f"# {_plain(name)}",
        _about(base_model, family, recipe, parameters),
        "## Use",
        _use(name, recipe, defaults or {}),
        "## Parameters",
        _parameters(parameters),
    ]
    if table := _scores(scores or {}):
        parts += ["## Scores", table]
    parts += ["## How it was made", _recipe(recipe)]
    parts += ["## Licence", _licence(base_model, licence)]
    return "\n\n".join(parts) + "\n"


def _front_matter(base_model: str, licence: str | None, tags: Sequence[str]) -> str:
    """YAML between dashes; a JSON string is a YAML string."""
    lines = [f"base_model: {json.dumps(base_model)}", "base_model_relation: finetune"]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image"]
    lines += [f"license: {json.dumps(licence)}"] if licence else []
    lines += ["tags:", *(f"- {tag}" for tag in (*TAGS, *tags))]
    return "\n".join(["---", *lines, "---"])


def _about(
    base_model: str,
    family: str | None,
    recipe: Mapping[str, Any],
    parameters: Mapping[str, Mapping[str, Any]],
) -> str:
    sparse, dense = parameters["sparse"], parameters["dense"]
    blocks = recipe.get("blocks", {})
    groups = [group for each in blocks.get("groups", {}).values() for group in each]
    mixture = (
        f" In {len(groups)} groups of neighbouring blocks a router keeps {blocks['kappa']} for "
        "every sample and step (Mixture of Blocks)."
        if groups
        else ""
    )
    kind = f" ({_plain(family)})" if family else ""
    return (
        f"`{_plain(base_model)}`{kind} with every feed-forward network split into one shared "
        f"expert and {recipe['num_experts']} routed experts (Dense2MoE, arXiv 2510.09094). A token "
        "uses the "
        f"shared expert and {recipe['top_k']} others: {human(sparse['activated'])} of the dense "
        f"transformer's {human(dense['total'])} parameters work, {100 * sparse['ffn_share']:g} % "
        "of the feed-forward weights." + mixture
    )


def _use(name: str, recipe: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    arguments = "".join(f", {key}={value!r}" for key, value in defaults.items())
    return f"""\
```python
import d2m  # tells diffusers the transformer's class
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name!r})
image = pipe("a red circle left of a blue square"{arguments}).images[0]
```

The number of experts a token uses can be changed without training, 0 to {recipe["num_experts"]}:
`d2m.model.set_top_k(pipe.transformer, 4)`. To draw without torch, compile it:
`d2m export {name} -o bundle`, then `d2m run bundle "a prompt"`."""


def _parameters(parameters: Mapping[str, Mapping[str, Any]]) -> str:
    dense, sparse = parameters["dense"], parameters["sparse"]
    rows = [
        ("dense transformer", dense["total"]),
        ("sparse transformer, total", sparse["total"]),
        ("sparse transformer, activated", sparse["activated"]),
        ("its FFNs, total", sparse["ffn"]),
        ("its FFNs, activated", sparse["ffn_activated"]),
    ]
    body = [[what, f"{n:,}", percent(n / dense["total"], 1)] for what, n in rows]
    return (
        _table(["", "parameters", "of the dense"], body)
        + "\n\nEvery parameter of the transformer is counted, biases and gates too. With them "
        f"{100 * sparse['ffn_share_with_biases']:.2f} % of the dense FFNs' parameters are "
        f"activated, of the matrices alone {100 * sparse['ffn_share']:g} %."
    )


def _scores(scores: Mapping[str, Any]) -> str:
    sides = [side for side in ("dense", "sparse") if side in scores]
    if not sides:
        return ""
    first = scores[sides[0]]
    rows = []
    for category in (*first["categories"], "overall"):
        cells = [category.replace("_", " ")]
        for side in sides:
            rate = scores[side]["categories"].get(category)
            rate = scores[side]["overall"] if category == "overall" else rate
            cells.append(f"{rate['score']:.3f} ({rate['low']:.3f} – {rate['high']:.3f})")
        rows.append(cells)
    return (
        f"Suite {first['suite']}, {first['n']} pictures of held-out captions, seed {first['seed']};"
        " 95 % Wilson intervals.\n\n" + _table(["category", *sides], rows)
    )


def _recipe(recipe: Mapping[str, Any]) -> str:
    about = (
        f"Recipe {_plain(recipe['name'])} (`recipe.json`), seed {recipe['seed']}: neurons split by "
        f"{recipe['split']} importance over {recipe['calibration']['batches']} batches of "
        f"{recipe['calibration']['batch_size']}"
    )
    if not recipe["stages"]:
        return about + "; not trained."
    head = ["stage", "trains", "top k", "steps", "batch", "learning rate", "losses"]
    rows = [
        [
            _plain(stage["name"]) + (" (left out)" if stage.get("skip") else ""),
            ", ".join(stage["train"]),
            stage["top_k"],
            stage["steps"],
            stage["batch_size"],
            f"{stage['lr']:g}",
            ", ".join(f"{loss} {weight:g}" for loss, weight in stage["losses"].items()),
        ]
        for stage in recipe["stages"]
    ]
    return about + "; then distilled from the dense model:\n\n" + _table(head, rows)


def _licence(base_model: str, licence: str | None) -> str:
    if licence:
        return f"{_plain(licence)}, as `{_plain(base_model)}`, from whose weights it is derived."
    return f"That of `{_plain(base_model)}`, from whose weights it is derived."


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, words to the left, figures to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """One line that breaks neither a table nor a code span."""
    return " ".join(text.split()).replace("`", "'").replace("|", "/")
