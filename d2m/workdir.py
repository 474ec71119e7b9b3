"""What lies at OUT and at OUT.work: a finished conversion, one under way, or something else.

Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2m import recipe as recipes
from d2m.dense import fingerprint
from d2m.recipe import Recipe
from runtime.files.checked_json import read_json

RECORD = "run.json"
KNOWN = {
    "dense": "another dense model",
    "start": "another start",
    "importance": "another importance",
    "data": "other training data",
}


def work_of(out: Path) -> Path:
    """The directory of what is under way, beside the result."""
    return out.with_name(out.name + ".work")


def finished(out: Path, recipe: Recipe) -> bool:
    """Whether `out` is a finished conversion; ValueError if it is one of another recipe."""
    record = out / "recipe.json"
    if not record.is_file():
        return False
    if recipes.load(record) != recipe:
        raise ValueError(
            f"{out} is already converted with other settings than these; choose another output "
            "directory, or remove it."
        )
    return True


def check_free(out: Path, work: Path, resume: bool) -> None:
    """ValueError unless `out` may be written, and `work` is empty or to be gone on with."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} exists and is not empty; choose another output directory, or remove it."
        )
    if work.exists() and not resume:
        raise ValueError(
            f"{work} holds an unfinished conversion; go on with --resume, or remove it to start "
            "again."
        )


def identity_of(
    work: Path, dense: Path, recipe: Recipe, start: Path | None, **more: str
) -> dict[str, Any]:
    """What must be the same on a resume; ValueError if `work` holds another conversion.

    `more`: other facts of this kind, under the names in KNOWN.
    """
    now: dict[str, Any] = {"dense": fingerprint(dense), "recipe": recipes.to_dict(recipe)}
    now |= {"start": fingerprint(start) if start else None, **more}
    record = work / RECORD
    before = read_json(record) if record.is_file() else now
    return _same(before, json.loads(json.dumps(now)), work)


def _same(before: Mapping[str, Any], now: dict[str, Any], work: Path) -> dict[str, Any]:
    for what in {**before, **now}:
        if before.get(what) != now.get(what):
            words = KNOWN.get(what, "another recipe, seed or steps")
            raise ValueError(
                f"{work} holds a conversion with {words}; resume it with the same, or remove it to "
                "start again."
            )
    return now
