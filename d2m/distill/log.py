"""The log of a distillation: one JSON object per line in `log.jsonl`, none twice after a resume.

A line averages the steps since the line before it. Its fields:

    stage, index, step, steps    name and number of the stage, steps done in it and in all of it
    done, seconds                steps done in all stages, seconds of training until here
    lr, loss, gradient           learning rate, weighted sum of the terms, gradient norm unclipped
    output, feature, balance,    the terms, unweighted, as far as the stage computes them
    group, group_balance
    features                     {block.stream: ||student - teacher||^2 / ||teacher||^2}
    experts                      {FFN site: {share [E], entropy, busiest, dead}}, see load_figures
    dead                         experts of all sites that hardly any token chose
    groups                       {group of blocks: {share [W], entropy, busiest, dead}}: its windows
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from d2m.distill.losses import load_figures
from runtime.files.atomic import write_text

GROUP = "group/"  # before a group's name: its windows' choices in a step's figures
Window = dict[str, Tensor]  # sums over the steps since the last line, on the model's device


def add(window: Window, figures: dict[str, Tensor]) -> None:
    """Add one step's figures to the sums, in place; nothing waits for the device here."""
    for name, value in figures.items():
        value = value.detach().float()
        window[name] = window[name] + value if name in window else value.clone()


def averages(
    window: Window, steps: int, feature_names: Sequence[str], sites: Sequence[str]
) -> dict[str, Any]:
    """The averages of a window of `steps` steps as plain numbers; ValueError as `check`."""
    check(window)
    fields: dict[str, Any] = {}
    for name, value in window.items():
        mean = (value / steps).tolist()
        if name == "features":
            fields[name] = {layer: _short(x) for layer, x in zip(feature_names, mean, strict=True)}
        elif name == "load":
            fields["experts"] = dict(zip(sites, map(_load, mean), strict=True))
            fields["dead"] = sum(int(figures["dead"]) for figures in fields["experts"].values())
        elif name.startswith(GROUP):
            fields.setdefault("groups", {})[name.removeprefix(GROUP)] = _load(mean)
        else:
            fields[name] = _short(mean)
    return fields


def check(window: Window) -> None:
    """Raise ValueError if a loss or gradient of the window was no number: to train on is vain."""
    for name in ("loss", "gradient"):
        if name in window and not math.isfinite(value := float(window[name])):
            raise ValueError(
                f"the {name} became {value} in training, expected a number; lower the learning "
                "rate or the clip of this stage in the recipe and start again."
            )


def append(path: Path, fields: dict[str, Any]) -> None:
    """Write one line at the end of the log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def sync(path: Path) -> None:
    """Put the log on the disk, before a checkpoint that counts on it."""
    if path.exists():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def rewind(path: Path, done: int) -> list[dict[str, Any]]:
    """Cut the log back to its first `done` steps and return what remains.

    Lines after a checkpoint are written again when its steps are; a torn last line is dropped.
    """
    kept: list[dict[str, Any]] = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            fields = json.loads(text)
        except ValueError:
            break
        if fields["done"] > done:
            break
        kept.append(fields)
    write_text(path, "".join(json.dumps(fields) + "\n" for fields in kept))
    return kept


def _load(counts: Sequence[float]) -> dict[str, Any]:
    """Every expert's (or window's) share of the choices, and `load_figures` of them."""
    share = [_short(count / max(sum(counts), 1e-9)) for count in counts]
    return {"share": share} | {key: _short(x) for key, x in load_figures(counts).items()}


def _short(value: float) -> float:
    """Six significant digits, what a curve needs at a third of the bytes; integers as they are."""
    return value if isinstance(value, int) else float(f"{value:.6g}")
