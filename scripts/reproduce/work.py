"""One row with one seed: convert, judge, and write a JSON file that holds all that was done.

Run as a process of its own (`python -m scripts.reproduce.work ...`), so that rows run side by side
on a thread each: at the shapes model's size a second thread saves a tenth of a step, a second
process makes another step.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from d2m.cli.progress import progress_bars
from d2m.plan.count import plan
from d2m.recipe import recipe as recipes
from runtime.files.atomic import write_json
from scripts.figures import machine
from scripts.reproduce.rows import Row, chain, named, recipe_of


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is the same for all rows. dense: the teacher; work: models; results: figures."""

    dense: str
    work: Path
    results: Path
    steps: int
    n: int
    world: str = "shapes"


def slug(row: Row, seed: int) -> str:
    """The row's name as a file's."""
    return f"{row.name.replace(' ', '-').replace('=', '')}-seed{seed}"


def result_file(row: Row, seed: int, settings: Settings) -> Path:
    """Where the figures of a row go."""
    return settings.results / f"{slug(row, seed)}.json"


def model_dir(row: Row, seed: int, settings: Settings) -> Path:
    """The pipeline directory that a row generates with."""
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
    import torch

    from calib.suites import suite_named
    from d2m.generate import generate_with, load_pipeline
    from d2m.generate import settings as generation_settings
    from runtime.files.atomic import write_json

    device = "cuda" if torch.cuda.is_available() else "cpu"
    began, made = time.monotonic(), None
    folder = model_dir(row, seed, settings)
    if row.recipe:
        made = _converted(row, seed, settings, folder)
    trained = time.monotonic() - began
    values = generation_settings(folder)
    options: dict[str, Any] = {**row.knobs, **values}
    draw = generate_with(load_pipeline(folder), batch_size=16, **options)
    with progress_bars() as progress:
        suite = suite_named(settings.world)
        score, _ = suite.evaluate(
            draw,
            settings.n,
            seed,
            suite.world(values["height"], {}),
            progress=lambda done, total: progress("images", done, total),
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
        "machine": machine(torch.get_num_threads(), "torch", "diffusers") | {"device": device},
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
        write_json(file, recipes.to_dict(made))
        found = plan(settings.dense, recipe=file, top_k=row.knobs.get("top_k"))
    names = ("total_params", "activated_params", "flops", "flops_vs_dense", "blocks")
    return {name: found[name] for name in names}


def _converted(row: Row, seed: int, settings: Settings, folder: Path) -> dict[str, Any]:
    """Convert, or go on where it stopped; losses and seconds of the training."""
    from calib.measure.importance import neuron_importance
    from calib.suites import suite_named
    from d2m.convert.in_memory import Options, convert

    start = model_dir(named(row.start), seed, settings) if row.start else None
    label = None if settings.world == "shapes" else settings.world  # as `--data` labels it
    recipe = recipe_of(row, settings.dense, settings.steps, seed)
    if recipe.local is not None:
        return _learnt_alone(recipe, settings, folder, label)
    with progress_bars() as progress:  # lines in the row's log
        answer = convert(
            settings.dense,
            folder,
            recipe,
            suite_named(settings.world).batches,
            neuron_importance,
            options=Options(start=start, resume=True, data=label),
            progress=progress,
            log=lambda text: print(text, flush=True),
        )
    fields = ("identity_error", "losses", "seconds", "parameters")
    return {name: answer[name] for name in fields if name in answer}


def _learnt_alone(
    recipe: recipes.Recipe, settings: Settings, folder: Path, label: str | None
) -> dict[str, Any]:
    """Convert with every FFN learning by itself; its seconds, and the mean errors."""
    from calib.suites import suite_named
    from d2m.convert.streamed import convert_stream, summary_of

    began = time.monotonic()
    with progress_bars() as progress:
        convert_stream(
            settings.dense,
            folder,
            recipe,
            batches=suite_named(settings.world).batches,
            data=label,
            resume=True,
            progress=progress,
            log=lambda text: print(text, flush=True),
        )
    learnt = json.loads((folder / "local.json").read_text("utf-8"))
    seconds = {"local": round(time.monotonic() - began, 1)}
    return {"local": summary_of(learnt), "seconds": seconds}


def main() -> None:
    """argv: row, seed, settings as JSON."""
    name, seed, text = sys.argv[1:]
    plain = json.loads(text)
    paths = {key: Path(plain[key]) for key in ("work", "results")}
    work(named(name), int(seed), Settings(**{**plain, **paths}))


if __name__ == "__main__":
    main()
