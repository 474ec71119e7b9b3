"""One row with one seed: convert, judge, and write a JSON file that holds all that was done.

Run as a process of its own (`python -m reproduction.work ...`), so that rows run side by side on a
thread each: at the shapes model's size a second thread saves a tenth of a step, a second process
makes another step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from d2m.plan.count import plan
from d2m.recipe import recipe as recipes
from d2m.recipe.recipe import Recipe
from scripts.reproduce.rows import Row, chain, named, recipe_of


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is the same for all rows. dense: the teacher; work: models; results: figures."""

    dense: str
    work: Path
    results: Path
    steps: int
    n: int


def slug(row: Row, seed: int) -> str:
    """The row's name as a file's."""
    return f"{row.name.replace(' ', '-').replace('=', '')}-seed{seed}"


def result_file(row: Row, seed: int, settings: Settings) -> Path:
    """Where the figures of a row go."""
    return settings.results / f"{slug(row, seed)}.json"


def model_dir(row: Row, seed: int, settings: Settings) -> Path:
    """The pipeline directory a row is drawn with."""
    if row.of:
        return model_dir(named(row.of), seed, settings)
    return settings.work / slug(row, seed) if row.recipe else Path(settings.dense)


def identity(row: Row, seed: int, settings: Settings) -> dict[str, Any]:
    """What a result must agree with to count as done: how its models are made and judged."""
    made = [
        recipes.to_dict(recipe_of(each, settings.dense, settings.steps, seed))
        for each in chain(row)
        if each.recipe
    ]
    return json.loads(json.dumps({"recipes": made, "knobs": row.knobs, "n": settings.n}))


def finished(row: Row, seed: int, settings: Settings) -> dict[str, Any] | None:
    """The figures of a row, where they are there and of these settings."""
    path = result_file(row, seed, settings)
    if not path.is_file():
        return None
    found = json.loads(path.read_text("utf-8"))
    return found if same(found["identity"], identity(row, seed, settings)) else None


def same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two identities agree; what recipes did not know yet had its default value."""
    try:
        made = [recipes.to_dict(recipes.from_dict(each)) for each in before["recipes"]]
    except ValueError:  # a recipe of another version of d2m
        return False
    return json.loads(json.dumps(before | {"recipes": made})) == now


def work(row: Row, seed: int, settings: Settings) -> dict[str, Any]:
    """Make the row's model where it is not there yet, judge it, and write its figures."""
    from calib.shapes.suite import evaluate
    from calib.shapes.world import World
    from d2m.generate import generate_with, load_pipeline
    from d2m.generate import settings as drawing
    from runtime.files.atomic import write_json

    began, made = time.monotonic(), None
    folder = model_dir(row, seed, settings)
    if row.recipe:
        made = _converted(row, seed, settings, folder)
    trained = time.monotonic() - began
    values = drawing(folder)
    draw = generate_with(load_pipeline(folder), batch_size=16, **row.knobs, **values)
    told = _Told(row, seed)
    score, _ = evaluate(
        draw, settings.n, seed, World(size=values["height"]), progress=told.pictures
    )
    answer = {
        "row": row.name,
        "seed": seed,
        "identity": identity(row, seed, settings),
        "score": score,
        "cost": cost(row, seed, settings),
        "training": made,
        "seconds": {"conversion": round(trained), "all": round(time.monotonic() - began)},
        "date": date.today().isoformat(),
        "machine": _machine(),
    }
    write_json(result_file(row, seed, settings), answer)
    return answer


def cost(row: Row, seed: int, settings: Settings) -> dict[str, Any]:
    """Activated parameters and FLOPs of a step, as `d2m plan` counts them."""
    base = named(row.of) if row.of else row
    if base.recipe is None:
        found = plan(settings.dense)
    else:
        made = recipe_of(base, settings.dense, settings.steps, seed)
        if "kappa" in row.knobs:
            blocks = dataclasses.replace(made.blocks, kappa=row.knobs["kappa"])
            made = dataclasses.replace(made, blocks=blocks)
        file = settings.work / f"{slug(row, seed)}.recipe.json"
        _write_recipe(file, made)
        found = plan(settings.dense, recipe=file, top_k=row.knobs.get("top_k"))
    names = ("total_params", "activated_params", "flops", "flops_vs_dense", "blocks")
    return {name: found[name] for name in names}


def _converted(row: Row, seed: int, settings: Settings, folder: Path) -> dict[str, Any]:
    """Convert, or go on where it stopped; losses and seconds of the training."""
    from calib.measure.importance import neuron_importance
    from calib.shapes.batches import shapes_batches
    from d2m.convert.in_memory import Options, convert

    start = model_dir(named(row.start), seed, settings) if row.start else None
    answer = convert(
        settings.dense,
        folder,
        recipe_of(row, settings.dense, settings.steps, seed),
        lambda pipe, seed: shapes_batches(pipe, seed=seed),
        neuron_importance,
        options=Options(start=start, resume=True),
        progress=_Told(row, seed),
        log=lambda text: print(text, flush=True),
    )
    kept = ("identity_error", "losses", "seconds", "parameters")
    return {name: answer[name] for name in kept if name in answer}


def _write_recipe(path: Path, recipe: Recipe) -> None:
    from runtime.files.atomic import write_json

    write_json(path, recipes.to_dict(recipe))


def _machine() -> dict[str, Any]:
    import diffusers
    import torch

    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


class _Told:
    """Progress as a line every half minute: two rows at a time cannot share a bar."""

    def __init__(self, row: Row, seed: int):
        self.name, self.last, self.phase = f"{row.name} (seed {seed})", 0.0, ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self.phase or now - self.last > 30 or done == total:
            self.last, self.phase = now, phase
            print(f"{self.name}: {phase} {done}/{total}", flush=True)

    def pictures(self, done: int, total: int) -> None:
        self("pictures", done, total)


def main() -> None:
    """argv: row, seed, settings as JSON."""
    name, seed, text = sys.argv[1:]
    plain = json.loads(text)
    paths = {key: Path(plain[key]) for key in ("work", "results")}
    work(named(name), int(seed), Settings(**{**plain, **paths}))


if __name__ == "__main__":
    main()
