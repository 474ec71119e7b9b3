"""What a conversion leaves behind: the sparse pipeline directory, its model card and its report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.convert.dense import licence_of
from d2m.convert.workdir import Conversion
from d2m.families.generation_defaults import DEFAULTS_FILE, generation_defaults
from d2m.generate import generate_with
from d2m.recipe import recipe as recipes
from d2m.recipe.recipe import Progress, Recipe
from d2m.shards import IMPORTANCE, library_errors
from runtime.files.atomic import replace_dir, write_json, write_text
from runtime.files.checked_json import read_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

Score = Callable[[Any], dict[str, Any]]
Shapes = Mapping[str, tuple[int, ...]]


def write_sparse(
    folder: Path, student: nn.Module, dense: Path, recipe: Recipe, scores: Mapping[str, Tensor]
) -> None:
    """Write a sparse pipeline directory: the student's weights, all else as in the dense one.

    `folder` must not exist. `scores` are the neurons' importance, kept in importance.safetensors.
    """
    from d2m.model.block_group import set_kappa
    from d2m.model.surgery import set_top_k

    folder.mkdir(parents=True)
    set_top_k(student, recipe.top_k)
    set_kappa(student, recipe.blocks.kappa)
    with library_errors():
        student.save_pretrained(folder / "transformer")
    write_around(folder, type(student).__name__, dense, recipe, scores)


def write_around(
    folder: Path, sparse_class: str, dense: Path, recipe: Recipe, scores: Mapping[str, Tensor]
) -> None:
    """Everything of a sparse pipeline directory that is not its transformer."""
    from safetensors.torch import save_file

    index = read_json(dense / "model_index.json")
    for name, value in index.items():
        if isinstance(value, list) and name != "transformer" and (dense / name).is_dir():
            shutil.copytree(dense / name, folder / name)
    index["transformer"] = ["d2m", sparse_class]
    write_json(folder / "model_index.json", index)
    for path in dense.iterdir():
        if path.is_file() and (path.name == DEFAULTS_FILE or path.name.startswith("LICENSE")):
            shutil.copyfile(path, folder / path.name)
    write_json(folder / "recipe.json", recipes.to_dict(recipe))
    with library_errors():
        save_file({k: v.contiguous() for k, v in scores.items()}, folder / IMPORTANCE)
    for path in folder.rglob("*.safetensors"):
        # safetensors 0.8 makes them readable by their owner alone, whatever the umask.
        shutil.copymode(folder / "model_index.json", path)


def compare(
    pipe: DiffusionPipeline,
    student: nn.Module,
    dense: Path,
    prompts: Sequence[str],
    score: Score | None,
    seed: int,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Images and scores of the dense pipeline and of the same with `student` in it.

    Returns (images, scores): images [{"prompt", "seed", "dense", "sparse"}] of PIL images from the
    same noise, scores {"dense", "sparse"} of `score(generate)`, {} without `score`. `pipe` has its
    dense transformer back afterwards.
    """
    seeds = [seed * 1_000_000 + i for i in range(len(prompts))]
    teacher, report = pipe.transformer, progress or (lambda phase, done, total: None)
    images: dict[str, list[Any]] = {}
    scores: dict[str, Any] = {}
    total = 2 * (1 + (score is not None))
    try:
        for transformer, name in ((teacher, "dense"), (student, "sparse")):
            pipe.register_modules(transformer=transformer)
            generate = generate_with(pipe, **generation_defaults(dense))
            images[name] = generate(prompts, seeds) if prompts else []
            report("images and scores", len(images) + len(scores), total)
            if score:
                scores[name] = score(generate)
                report("images and scores", len(images) + len(scores), total)
    finally:
        pipe.register_modules(transformer=teacher)
    rows = zip(prompts, seeds, images["dense"], images["sparse"], strict=True)
    return [dict(zip(("prompt", "seed", "dense", "sparse"), row)) for row in rows], scores


def publish(
    conversion: Conversion,
    parameters: Mapping[str, Any],
    scores: Mapping[str, Any],
    report: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write the model card and, unless `report` is None, the report; let OUT appear, clean up.

    report: further keywords of `d2m.report.build.build_report`. Returns what every conversion
    answers: out, base_model, recipe (its name) and parameters.
    """
    from d2m.convert.model_card import model_card
    from d2m.report.build import build_report, write_report

    folder, dense, recipe = conversion.result, conversion.dense, conversion.recipe
    shown: dict[str, Any] = {"name": conversion.out.name, "base_model": conversion.base_model}
    shown |= {"parameters": parameters, "recipe": recipes.to_dict(recipe)}
    about: dict[str, Any] = {"defaults": generation_defaults(dense), "licence": licence_of(dense)}
    config = read_json(dense / "transformer" / "config.json")
    names = conversion.family.names
    about |= {"family": names.title_of(config), "tags": names.tags}
    write_text(folder / "README.md", model_card(**shown, scores=scores or None, **about))
    if report is not None:
        write_report(folder, build_report(**shown, scores=scores, **report))
    replace_dir(folder, conversion.out)
    shutil.rmtree(conversion.work, ignore_errors=True)
    answer = {"out": str(conversion.out), "base_model": conversion.base_model}
    return answer | {"recipe": recipe.name, "parameters": parameters}


def stage_seconds(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Training time of every stage from the log, {"stage NAME": seconds}."""
    ends = {f"stage {line['stage']}": float(line["seconds"]) for line in history}
    before = [0.0, *ends.values()]
    return {name: round(end - start, 1) for (name, end), start in zip(ends.items(), before)}


def final_losses(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The output loss at the beginning and the end of every stage's log."""
    losses: dict[str, dict[str, float]] = {}
    for line in history:
        stage = losses.setdefault(line["stage"], {"first": line["output"]})
        stage["last"] = line["output"]
    return losses


def parameters_of(dense: Shapes, sparse: Shapes, recipe: Recipe) -> dict[str, Any]:
    """`runtime.files.parameters.count` of the dense and of the sparse transformer's shapes."""
    from runtime.files.parameters import count

    counts = count(sparse, recipe.top_k, recipe.blocks.kappa)
    return {"dense": count(dense), "sparse": counts}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of a module (a model on the meta device will do)."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Within: time that ends up in `seconds[name]`."""
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 1)
