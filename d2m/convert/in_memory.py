"""A dense pipeline directory becomes a sparse one: importance, surgery, distillation, result.

Torch is imported inside the functions: this module answers bad arguments before that.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.convert.dense import fingerprint
from d2m.convert.sparse_pipeline import (
    compare,
    final_losses,
    parameters_of,
    publish,
    shapes_of,
    stage_seconds,
    timed,
    write_sparse,
)
from d2m.convert.workdir import begin, work_of
from d2m.distill.processes import ALONE, Crew
from d2m.generate import load_pipeline
from d2m.plan.hub import locate
from d2m.plan.presets import recipe_named
from d2m.recipe.recipe import Batches, Progress, Recipe
from d2m.report.pareto import merge_rows, own_rows

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


CALIBRATION = 1_000_003  # added to the seed: calibration must not see the training batches


@dataclass(frozen=True)
class Options:
    """How a conversion is run, whatever its recipe.

    start: a sparse pipeline of the same dense model and structure whose weights the first stage
    begins with, such as the result of the stages before; None: the split itself. resume: go on with
    what `OUT.work` holds; from the beginning where it holds nothing. data: tells the data of
    `batches` from others, for a resume; None for shapes. device: "auto", or as torch names it.
    save_seconds: time between training checkpoints. crew: the processes that distil together; the
    first one does everything else and returns the answer, the others return {}. parts,
    checkpointing, offload: as in `d2m.distill.loop.distill`.
    """

    start: str | os.PathLike[str] | None = None
    resume: bool = False
    data: str | None = None
    device: str = "auto"
    save_seconds: float = 60.0
    crew: Crew = ALONE
    parts: int = 1
    checkpointing: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Report:
    """What is measured of the result, and shown in report.html and report.json.

    statistics: (sparse transformer, batches, top_k=, seed=, progress=) -> table of routing. score:
    (generate) -> score, run on the dense and the sparse pipeline. prompts: generated with both.
    other_models: for the plot, as `d2m.report.pareto.known_rows` reads them. write: False leaves
    the report out; scores are then in the model card alone.
    """

    statistics: Callable[..., dict[str, Any]] | None = None
    score: Callable[[Any], dict[str, Any]] | None = None
    prompts: Sequence[str] = ()
    other_models: Sequence[Mapping[str, Any]] = ()
    write: bool = True


def convert(
    dense_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    recipe: Recipe | str | Path,
    batches: Callable[[DiffusionPipeline, int], Batches],
    importance: Callable[..., dict[str, Tensor]],
    *,
    options: Options = Options(),
    report: Report = Report(),
    progress: Progress | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Convert the pipeline in `dense_dir`, distil it, and write the sparse pipeline `out_dir`.

    Args:
        dense_dir: a diffusers pipeline directory of a known family, or a hub id.
        recipe: a Recipe, the name of a preset for such a model, or the path of a recipe file;
            `d2m.recipe.recipe.changed` makes one with other steps, stages, seed or precision.
        batches: (pipeline, seed) -> ((step, batch size) -> batch), e.g. `shapes_batches` of calib.
        importance: (dense transformer, batches, recipe, seed=, progress=) -> {site: scores [N]},
            e.g. `calib.measure.importance.neuron_importance`.

    Returns what was done, in JSON types: out, base_model, recipe (its name), steps, parameters,
    identity_error, losses, scores, seconds (by phase).

    Raises:
        FileNotFoundError, ValueError: no dense pipeline of a known family; an output directory in
            use; a resume under other settings; a recipe that does not fit the model.
        ImportError: torch or diffusers is missing.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM after saving; its text says how to go on.
    """
    recipe, crew = recipe_named(recipe, dense_dir), options.crew
    if not crew.leads:
        _train_shards(locate(dense_dir), recipe, batches, work_of(Path(out_dir)), options)
        return {}
    start = None if options.start is None else Path(options.start)
    known = {"start": fingerprint(start) if start else None, "data": options.data}
    conversion = begin(dense_dir, out_dir, recipe, options.resume, log, **known)
    if conversion is None:
        return {"out": str(Path(out_dir)), "already_converted": True}
    # All arguments are good as far as JSON can tell; the first slow import and the first load.
    from d2m.convert.first_student import first_student, neuron_scores, start_importance

    dense_path, work, result = conversion.dense, conversion.work, conversion.result
    seconds: dict[str, float] = {}
    with timed(seconds, "loading"):
        device = options.device if crew.size == 1 else crew.device
        pipe = load_pipeline(dense_path, device=device, dtype=_loaded_as(recipe, crew))
        dense = pipe.transformer
        calibration = batches(pipe, recipe.seed + CALIBRATION)
    with timed(seconds, "importance"):
        if start:  # its neurons were split by its own scores, and must be again
            importance = start_importance(start)
        neurons = neuron_scores(
            work, conversion.identity, dense, calibration, recipe, importance, progress
        )
    with timed(seconds, "conversion"):
        student, error = first_student(
            dense, neurons, recipe, conversion.family, calibration, work, start
        )
    # Until here a resume computes again what is cheap and reads the rest from `work`; training has
    # checkpoints of its own there.
    history: list[dict[str, Any]] = []
    if recipe.steps:
        from d2m.distill.loop import distill

        if crew.size > 1:  # the GPU is for shards; what it held so far waits on the CPU
            from d2m.distill.gather import to_cpu

            to_cpu(student, dense)
        keywords: dict[str, Any] = {"workdir": work, "progress": progress, "log": log}
        keywords |= {"seed": recipe.seed, **_training(options)}
        history = distill(student, dense, recipe, batches(pipe, recipe.seed), **keywords)
    seconds |= stage_seconds(history)

    # A kill from here on goes on from training's last checkpoint, and does all of this once more.
    shutil.rmtree(result, ignore_errors=True)  # half of one, of a kill
    write_sparse(result, student, dense_path, recipe, neurons)
    if crew.size > 1:
        # It came back from the shards in float32 on the CPU; images are made as users make them.
        kind: Any = type(student)
        student = kind.from_pretrained(result / "transformer", torch_dtype=dense.dtype).eval()
        student.to(pipe.to(device).device)
    # Scores come before the papers because the model card shows them, with a report or without.
    with timed(seconds, "images and scores"):
        shown = report.prompts if report.write else ()
        score = report.score
        images, scores = compare(pipe, student, dense_path, shown, score, recipe.seed, progress)
    more: dict[str, Any] | None = None
    if report.write:
        routing = None
        if report.statistics and recipe.top_k:
            with timed(seconds, "routing statistics"):
                routing = report.statistics(
                    student, calibration, top_k=recipe.top_k, seed=recipe.seed, progress=progress
                )
        more = {"history": history, "importance": neurons, "routing": routing, "images": images}
        more |= {"timings": seconds, "identity_error": error}
        rows = own_rows(result, conversion.out.name, scores)
        more["pareto"] = merge_rows(rows, report.other_models)
    parameters = parameters_of(shapes_of(pipe.transformer), shapes_of(student), recipe)
    answer = publish(conversion, parameters, scores, more)
    return answer | {
        "steps": recipe.steps,
        "identity_error": error,
        "losses": final_losses(history),
        "scores": scores,
        "seconds": seconds,
    }


# ---------------------------------------------------------------- steps of `convert`


def _training(options: Options) -> dict[str, Any]:
    """Keywords of `d2m.distill.loop.distill`."""
    names = ("crew", "parts", "save_seconds", "checkpointing", "offload", "resume")
    return {name: getattr(options, name) for name in names}


def _loaded_as(recipe: Recipe, crew: Crew) -> str:
    """What the dense pipeline is loaded in: a GPU of many holds it in what is computed in."""
    return "bf16" if crew.size > 1 and recipe.precision == "bfloat16" else "fp32"


def _train_shards(
    dense: Path,
    recipe: Recipe,
    batches: Callable[[DiffusionPipeline, int], Batches],
    work: Path,
    options: Options,
) -> None:
    """The part of a process that does not lead: to encode its rows, and to train its shards."""
    crew = options.crew
    if not recipe.steps:
        return
    from d2m.distill.loop import distill

    dtype = _loaded_as(recipe, crew)
    pipe = load_pipeline(dense, device=crew.device, dtype=dtype, transformer=False)
    keywords: dict[str, Any] = {"workdir": work, "seed": recipe.seed, **_training(options)}
    distill(None, None, recipe, batches(pipe, recipe.seed), **keywords)
