"""A dense pipeline directory becomes a sparse one: importance, surgery, distillation, result.

What is under way lives in `OUT.work` beside the result, which appears under its name at once when
it is whole: a kill at any moment loses nothing that was saved there.
Torch is imported inside the functions: this module answers bad arguments before that.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m import recipe as recipes
from d2m.dense import dense_family, locate
from d2m.draw import load_pipeline
from d2m.files import replace_dir
from d2m.pareto import beside, own_rows
from d2m.preset import preset_of
from d2m.processes import ALONE, Crew
from d2m.recipe import Recipe
from d2m.result import (
    compare,
    final_losses,
    parameters_of,
    stage_seconds,
    timed,
    write_papers,
    write_sparse,
)
from d2m.workdir import check_free, finished, identity_of, work_of
from runtime.files.extras import need

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

Batches = Callable[[int, int], Mapping[str, "Tensor"]]
Progress = Callable[[str, int, int], None]

CALIBRATION = 1_000_003  # added to the seed: calibration must not see the training batches


def convert(
    dense_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    recipe: Recipe | str | Path,
    batches: Callable[[DiffusionPipeline, int], Batches],
    importance: Callable[..., dict[str, Tensor]],
    *,
    steps: int | None = None,
    stages: Sequence[int | str] = (),
    start: str | os.PathLike[str] | None = None,
    init_only: bool = False,
    seed: int | None = None,
    resume: bool = False,
    statistics: Callable[..., dict[str, Any]] | None = None,
    score: Callable[[Any], dict[str, Any]] | None = None,
    prompts: Sequence[str] = (),
    known: Sequence[Mapping[str, Any]] = (),
    report: bool = True,
    data: str | None = None,
    device: str = "auto",
    save_seconds: float = 60.0,
    precision: str | None = None,
    ema: float | None = None,
    crew: Crew = ALONE,
    parts: int = 1,
    checkpointing: bool = False,
    offload: bool = False,
    progress: Progress | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Convert the pipeline in `dense_dir`, distil it, and write the sparse pipeline `out_dir`.

    Args:
        dense_dir: a diffusers pipeline directory of a known family, or a hub id.
        recipe: a Recipe, the name of a preset for such a model, or the path of a recipe file.
        batches: (pipeline, seed) -> ((step, batch size) -> batch), e.g. `shapes_batches` of calib.
        importance: (dense transformer, batches, recipe, seed=, progress=) -> {site: scores [N]},
            e.g. `calib.importance.neuron_importance`.
        steps: training steps over all stages, in the recipe's proportion; None: the recipe's own.
        stages: which to run, numbers from 1 or names; the others are skipped; empty: all of them. A
            stage takes the same steps and data on its own as among the others.
        start: a sparse pipeline of the same dense model and structure whose weights the first stage
            begins with, such as the result of the stages before; None: the split itself.
        init_only: split the FFNs and train nothing.
        seed: in place of the recipe's.
        resume: go on with what `OUT.work` holds; from the beginning where it holds nothing.
        statistics: (sparse transformer, batches, top_k=, seed=, progress=) -> table for the report,
            e.g. `calib.statistics.routing_table`.
        score: (draw) -> score, run on the dense and the sparse pipeline for the report.
        prompts: what the report draws with both.
        data: tells the data of `batches` from others, for a resume; None for shapes.
        known: other models, as `d2m.pareto.known_rows` reads them, for the report's plot.
        save_seconds: time between training checkpoints.
        precision, ema: in place of the recipe's, and of its stages'.
        crew: the processes that distil together. The first one does everything else and returns the
            answer; the others return {}.
        parts, checkpointing, offload: as in `d2m.distill.distill`.

    Returns what was done, in JSON types: out, base_model, recipe (its name), steps, parameters,
    identity_error, losses, scores, seconds (by phase).

    Raises:
        FileNotFoundError, ValueError: no dense pipeline of a known family; an output directory in
            use; a resume under other settings; a recipe that does not fit the model.
        ImportError: torch or diffusers is missing.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM after saving; its text says how to go on.
    """
    recipe = _settings(recipe, dense_dir, steps, stages, init_only, seed)
    recipe = _trained_as(recipe, precision, ema)
    spread: dict[str, Any] = {"crew": crew, "parts": parts, "save_seconds": save_seconds}
    spread |= {"checkpointing": checkpointing, "offload": offload, "resume": resume}
    if not crew.leads:
        _follow(locate(dense_dir), recipe, batches, work_of(Path(out_dir)), spread)
        return {}
    out = Path(out_dir)
    work = work_of(out)
    if resume and finished(out, recipe):
        shutil.rmtree(work, ignore_errors=True)  # of a kill between the result and the clean-up
        log(f"{out} is already converted with this recipe; nothing is left to do.")
        return {"out": str(out), "already_converted": True}
    check_free(out, work, resume)
    dense_path = locate(dense_dir)
    family = dense_family(dense_path, recipe)
    _need_torch()
    facts_of_data = {} if data is None else {"data": data}
    identity = identity_of(
        work, dense_path, recipe, Path(start) if start else None, **facts_of_data
    )
    from d2m.start import first_student, kept_importance, start_importance

    seconds: dict[str, float] = {}
    with timed(seconds, "loading"):
        device = device if crew.size == 1 else crew.device
        pipe = load_pipeline(dense_path, device=device, dtype=_loaded_as(recipe, crew))
        dense = pipe.transformer
        calibration = batches(pipe, recipe.seed + CALIBRATION)
    with timed(seconds, "importance"):
        if start:
            importance = start_importance(Path(start))
        neurons = kept_importance(work, identity, dense, calibration, recipe, importance, progress)
    with timed(seconds, "conversion"):
        before = Path(start) if start else None
        student, error = first_student(dense, neurons, recipe, family, calibration, work, before)
    history: list[dict[str, Any]] = []
    if recipe.steps:
        from d2m.distill import distill

        if crew.size > 1:  # the GPU is for shards; what it held so far waits beside
            from d2m.gather import to_cpu

            to_cpu(student, dense)
        options: dict[str, Any] = {"seed": recipe.seed, "workdir": work, **spread}
        options |= {"progress": progress, "log": log}
        history = distill(student, dense, recipe, batches(pipe, recipe.seed), **options)
    seconds |= stage_seconds(history)

    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)  # half of one, of a kill
    write_sparse(result, student, dense_path, recipe, neurons)
    if crew.size > 1:
        student = (
            type(student)
            .from_pretrained(  # type: ignore[attr-defined]
                result / "transformer", torch_dtype=dense.dtype
            )
            .eval()
        )
        student.to(pipe.to(device).device)
    with timed(seconds, "pictures and scores"):
        shown = prompts if report else ()
        images, scores = compare(pipe, student, dense_path, shown, score, recipe.seed, progress)
    facts = {"name": out.name, "base_model": str(dense_dir), "scores": scores}
    facts["parameters"] = parameters_of(pipe, student, recipe)
    more: dict[str, Any] | None = None
    if report:
        routing = None
        if statistics and recipe.top_k:
            options = {"top_k": recipe.top_k, "seed": recipe.seed, "progress": progress}
            with timed(seconds, "routing statistics"):
                routing = statistics(student, calibration, **options)
        more = {"history": history, "importance": neurons, "routing": routing, "images": images}
        more |= {"timings": seconds, "identity_error": error}
        more["pareto"] = beside(own_rows(result, out.name, scores), known)
    write_papers(result, dense_path, recipe, facts, more)
    replace_dir(result, out)
    shutil.rmtree(work, ignore_errors=True)
    answer = {"out": str(out), "base_model": str(dense_dir), "recipe": recipe.name}
    return answer | {
        "steps": recipe.steps,
        "parameters": facts["parameters"],
        "identity_error": error,
        "losses": final_losses(history),
        "scores": scores,
        "seconds": seconds,
    }


# ---------------------------------------------------------------- steps of `convert`


def _settings(
    recipe: Recipe | str | Path,
    dense: str | os.PathLike[str],
    steps: int | None,
    stages: Sequence[int | str],
    init_only: bool,
    seed: int | None,
) -> Recipe:
    """The recipe with the caller's steps, stages and seed; `dense` tells which preset a name means.

    A preset's groups are lists of block indices, so one name is another file for another depth.
    """
    if not isinstance(recipe, Recipe):
        is_file = isinstance(recipe, Path) or recipe.endswith(".json")
        recipe = recipes.load(recipe if is_file else preset_of(str(recipe), dense))
    if init_only and steps is not None:
        raise ValueError(f"steps is {steps} but init_only trains nothing; give one of the two.")
    if init_only and stages:
        raise ValueError(
            f"stages is {list(stages)} but init_only trains nothing; give one of them."
        )
    if seed is not None:
        recipe = dataclasses.replace(recipe, seed=seed)
    if init_only:
        return dataclasses.replace(recipe, stages=())
    recipe = recipe if steps is None else recipes.with_steps(recipe, steps)
    return recipes.with_stages(recipe, stages) if stages else recipe


def _trained_as(recipe: Recipe, precision: str | None, ema: float | None) -> Recipe:
    """The recipe with another precision, and another average in every stage."""
    if precision is not None:
        if precision not in recipes.PRECISIONS:
            raise ValueError(
                f"precision is {precision!r}, expected one of {', '.join(recipes.PRECISIONS)}."
            )
        recipe = dataclasses.replace(recipe, precision=precision)
    if ema is None:
        return recipe
    if not 0 <= ema < 1:
        raise ValueError(f"ema is {ema}, expected 0 (none) or a decay under 1, such as 0.999.")
    stages = tuple(dataclasses.replace(stage, ema=ema) for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=stages)


def _loaded_as(recipe: Recipe, crew: Crew) -> str:
    """What the dense pipeline is loaded in: a GPU of many holds it in what is computed in."""
    return "bf16" if crew.size > 1 and recipe.precision == "bfloat16" else "fp32"


def _follow(
    dense: Path,
    recipe: Recipe,
    batches: Callable[[DiffusionPipeline, int], Batches],
    work: Path,
    options: dict[str, Any],
) -> None:
    """The part of a process that does not lead: to encode its rows, and to train its shards."""
    crew = options["crew"]
    if not recipe.steps:
        return
    from d2m.distill import distill

    pipe = load_pipeline(
        dense, device=crew.device, dtype=_loaded_as(recipe, crew), transformer=False
    )
    distill(
        None, None, recipe, batches(pipe, recipe.seed), workdir=work, seed=recipe.seed, **options
    )


def _need_torch() -> None:
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        said = "converting needs torch and diffusers"
        raise ImportError(need("convert", said, error)) from error
