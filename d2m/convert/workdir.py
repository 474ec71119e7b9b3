"""What lies at OUT and at OUT.work: a finished conversion, one under way, or something else.

What is under way lives in `OUT.work` beside the result, which appears under its name at once when
it is whole: a kill at any moment loses nothing that was saved there. Torch-free.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2m.convert.dense import dense_family, fingerprint
from d2m.families import Family
from d2m.generate import need_libraries
from d2m.plan.hub import base_model, locate
from d2m.recipe import recipe as recipes
from d2m.recipe.recipe import Recipe
from runtime.files.checked_json import read_json

RECORD = "run.json"
KNOWN = {
    "dense": "another dense model",
    "start": "another start",
    "importance": "another importance",
    "data": "other training data",
}


@dataclass(frozen=True)
class Conversion:
    """One that may go on: every argument was checked, nothing is written yet.

    base_model: the dense model as the user named it, dense: its directory. identity: what must be
    the same on a resume; it is written to `RECORD` with the first thing worth keeping.
    """

    base_model: str
    dense: Path
    family: Family
    recipe: Recipe
    out: Path
    work: Path
    identity: dict[str, Any]

    @property
    def result(self) -> Path:
        """Where the result is built."""
        return self.work / "result"


def begin(
    dense: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    resume: bool,
    log: Callable[[str], None],
    **facts: str | None,
) -> Conversion | None:
    """The checks that come before any work; None if `out` is finished, which the log then says.

    facts: what a resume must have alike besides the recipe and the dense model, by names in KNOWN;
    None for what is not given. FileNotFoundError, ValueError or ImportError, in one sentence, for
    a dense pipeline that is none, a recipe that does not fit it, directories in use, a resume of
    another conversion, or where torch or diffusers is missing.
    """
    path, work = Path(out), work_of(Path(out))
    if resume and finished(path, recipe):
        shutil.rmtree(work, ignore_errors=True)  # of a kill between the result and the clean-up
        log(f"{path} is already converted with this recipe; nothing is left to do.")
        return None
    check_free(path, work, resume)
    found = locate(dense)
    family = dense_family(found, recipe)
    need_libraries("converting")
    identity = identity_of(work, found, recipe, **facts)
    return Conversion(base_model(dense, found), found, family, recipe, path, work, identity)


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
            f"{work} holds an unfinished conversion; continue with --resume, or remove it to start "
            "again."
        )


def identity_of(work: Path, dense: Path, recipe: Recipe, **facts: str | None) -> dict[str, Any]:
    """What must be the same on a resume; ValueError if `work` holds another conversion."""
    found: dict[str, Any] = {"dense": fingerprint(dense), "recipe": recipes.to_dict(recipe)}
    found |= {name: value for name, value in facts.items() if value is not None}
    now: dict[str, Any] = json.loads(json.dumps(found))
    record = work / RECORD
    before = read_json(record) if record.is_file() else now
    for what in {**before, **now}:
        if before.get(what) != now.get(what):
            words = KNOWN.get(what, "another recipe, seed or steps")
            raise ValueError(
                f"{work} holds a conversion with {words}; resume it with the same, or remove it to "
                "start again."
            )
    return now
