"""d2m convert and d2m lora: a dense pipeline becomes a sparse one, a LoRA is fused into it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from d2m.cli import options
from d2m.cli.options import option
from d2m.cli.progress import progress_bars
from d2m.cli.terminal import print_answer, say
from d2m.plan.machine import free_cores


def convert(
    dense: Annotated[
        str,
        typer.Argument(
            metavar="DENSE",
            help="Pipeline directory, Hugging Face id, or a transformer's .safetensors or .gguf.",
        ),
    ],
    out: Annotated[Path, option("Directory of the sparse pipeline to write.", "-o", "--out")],
    preset: Annotated[str, option("Recipe that ships with d2m: L, M, S or XS.")] = "L",
    recipe: options.RecipeFile = None,
    base: Annotated[
        str | None,
        option("For a single file: the pipeline (directory or id) of its other components."),
    ] = None,
    variant: Annotated[
        str | None, option("Variant of the pipeline's weight files to read: fp16, bf16.")
    ] = None,
    budget: Annotated[
        float | None, option("Choose groups and shared experts for this share of the dense FLOPs.")
    ] = None,
    steps: Annotated[int | None, option("Training steps over all stages.")] = None,
    stages: Annotated[
        str, option("Stages to train, numbers or names, e.g. 1,2; by default all.")
    ] = "",
    start: Annotated[Path | None, option("Sparse pipeline to start training from.")] = None,
    init_only: Annotated[bool, option("Convert without training.", "--init-only")] = False,
    local: Annotated[
        bool,
        typer.Option(
            "--local",
            help="Every FFN learns by itself, block by block: for models larger than memory.",
        ),
    ] = False,
    samples: Annotated[
        int | None, option("With --local: samples that run through the teacher.")
    ] = None,
    seed: Annotated[int | None, option("Random seed; by default the recipe's.")] = None,
    importance: Annotated[
        str, option("Neurons by: calibration, magnitude (the model is not run), or a file.")
    ] = "calibration",
    resume: Annotated[bool, option("Continue an unfinished conversion.", "--resume")] = False,
    report: Annotated[bool, option("Write report.html.", "--report/--no-report")] = True,
    data: Annotated[
        str,
        typer.Option(
            help="Training data: shapes, shapes-edit, emoji, prompts.txt, a folder, .tar shards, a "
            "dataset."
        ),
    ] = "shapes",
    cache: Annotated[Path | None, option("Folder for cached encodings of --data.")] = None,
    size: Annotated[
        int | None, option("Side of training pictures in pixels; by default the pipeline's.")
    ] = None,
    shuffle: Annotated[int, option("Samples in the shuffle buffer.")] = 1000,
    skip: Annotated[int, option("Unreadable samples to skip before stopping with an error.")] = 100,
    columns: Annotated[
        str | None,
        option("IMAGE,CAPTION or BEFORE,AFTER,INSTRUCTION: columns (or file endings) of --data."),
    ] = None,
    score: Annotated[
        int | None,
        typer.Option(
            help="Images to score for the report; by default 120 with a world of ours, else 0."
        ),
    ] = None,
    compare: Annotated[
        Path | None, option("summary.json with other models for the report's plot.")
    ] = None,
    precision: options.Precision = None,
    ema: Annotated[float | None, option("EMA decay of the weights, 0 for none.")] = None,
    accumulate: Annotated[int, option("Gradient accumulation: micro-batches per batch.")] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Recompute activations in the backward pass."
        ),
    ] = False,
    offload_activations: options.OffloadActivations = False,
    save_seconds: Annotated[float, option("Seconds between two training checkpoints.")] = 60.0,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Turn the dense pipeline DENSE into a sparse one and distil it.

    Started by torchrun or accelerate launch, the processes distil together (docs/many-gpus.md).
    """
    from d2m.distill.processes import ALONE, from_environment, join

    if from_environment().size > 1 and budget is not None:
        raise ValueError(
            "--budget is for one process; run it there with --init-only, and give the recipe.json "
            "that it writes as --recipe"
        )
    if from_environment().size > 1 and data.endswith(".txt"):
        raise ValueError(
            f"--data is {data!r}: prompts alone are for one process, where the teacher is whole; "
            "give images and captions to several"
        )
    if from_environment().size > 1 and init_only and not from_environment().leads:
        return  # one process is enough
    if init_only and steps is not None:
        raise ValueError(
            f"--init-only trains nothing but --steps is {steps}; give only one of them"
        )
    if local and (init_only or stages or start is not None or budget is not None):
        raise ValueError(
            "--local converts and trains in one pass; leave --init-only, --stages, --start and "
            "--budget out (train its result further with --start)"
        )
    if local and data.endswith(".txt"):
        raise ValueError(
            f"--data is {data!r}: prompts alone need the whole teacher in memory; give --local "
            "images and captions"
        )
    if samples is not None and not local:
        raise ValueError("--samples is for --local; leave it out")
    if score is not None and score < 0:
        raise ValueError(f"--score is {score}, expected a number of images, 0 for none")
    from d2m.report.pareto import known_rows

    known = known_rows(compare) if compare else ()
    from calib.data.option import check_data, open_data
    from calib.measure.importance import importance_from_option
    from calib.measure.routing import routing_table
    from calib.suites import NAMES, suite_named
    from d2m.convert.in_memory import Options, Report
    from d2m.convert.in_memory import convert as function
    from d2m.families.family import PAIRS
    from d2m.families.generation_defaults import generation_defaults
    from d2m.plan.hub import locate
    from d2m.plan.presets import recipe_named
    from d2m.recipe.recipe import changed, with_local
    from d2m.unpack.dense import is_single_file, remove_unpacked, unpack

    if from_environment().size > 1 and (is_single_file(dense) or variant):
        raise ValueError(
            "a single file or a variant is unpacked by one process; convert it there with "
            "--init-only, and give its result to several with --start"
        )
    with progress_bars() as progress:
        dense = unpack(dense, base, variant, out, progress=progress, log=say)
    taught = open_data(
        data,
        lambda: generation_defaults(locate(dense)),
        cache=cache,
        size=size,
        window=shuffle,
        skip=skip,
        columns=columns,
        log=say,
    )
    judged = (120 if data in NAMES else 0) if score is None else score
    # Of pictures from elsewhere the shapes suite is asked for, if any.
    judge = suite_named(data if data in NAMES else "shapes").evaluate
    neurons, scores, label = importance_from_option(importance)
    if not init_only or scores is None or budget is not None:  # else no data is looked at
        check_data(dense, taught)
    # What the model is to become: by a budget, which searches with the data, or by the recipe.
    made: Any = recipe or preset
    facts: dict[str, Any] = {}
    if budget is not None:
        from calib.budget.recipe import for_conversion, summary

        with progress_bars() as progress:
            made, neurons, facts = for_conversion(
                dense,
                out,
                budget,
                made,
                taught.batches,
                neurons,
                seed=seed,
                resume=resume,
                progress=progress,
            )
        if facts:
            say(summary(facts))
    elif from_environment().leads:
        from d2m.plan.fits_here import check_convert

        streamed = local or (init_only and scores is not None)
        check_convert(dense, out, preset=preset, recipe=recipe, streamed=streamed, resume=resume)
    made = changed(recipe_named(made, dense), seed=seed)
    # Nothing holds the model: it goes from file to file, whatever its size.
    if local:
        from d2m.convert.streamed import convert_stream

        made = with_local(made, steps=steps, samples=samples)
        with progress_bars() as progress:
            answer = convert_stream(
                dense,
                out,
                made,
                importance="activations",
                batches=taught.batches,
                data=taught.label,
                resume=resume,
                progress=progress,
                log=say,
            )
        remove_unpacked(out)
        print_answer(answer if json_ else brief(answer), json_)
        return
    if init_only and scores is not None:
        from d2m.convert.streamed import convert_stream

        if stages or start is not None:
            raise ValueError("--init-only trains nothing; leave --stages and --start out")
        with progress_bars() as progress:
            answer = convert_stream(
                dense, out, made, scores, label, resume=resume, progress=progress, log=say
            )
        remove_unpacked(out)
        print_answer(answer if json_ else brief(answer), json_)
        return
    made = changed(
        made,
        steps=steps,
        stages=[name.strip() for name in stages.split(",") if name.strip()],
        init_only=init_only,
        precision=precision,
        ema=ema,
    )
    crew = ALONE if init_only else join()
    if "OMP_NUM_THREADS" not in os.environ and crew.size == 1 and not init_only:
        import torch

        torch.set_num_threads(free_cores())
    memory: Any = {"checkpointing": gradient_checkpointing, "offload": offload_activations}
    memory |= {"parts": accumulate, "save_seconds": save_seconds}
    how = Options(start=start, resume=resume, data=taught.label, crew=crew, **memory)
    shown = Report(
        statistics=partial(routing_table, categories=taught.categories),
        score=(lambda generate: judge(generate, judged, 0)[0]) if judged else None,
        # What edits is given images, too, which the report does not show.
        prompts=taught.prompts(6) if report and taught.kind not in PAIRS else (),
        other_models=known,
        write=report,
    )
    with progress_bars() as progress:
        answer = function(
            dense,
            out,
            made,
            taught.batches,
            neurons,
            options=how,
            report=shown,
            progress=progress,
            log=say,
        )
    if not crew.leads:
        return
    remove_unpacked(out)
    answer |= {"budget": facts} if facts else {}
    answer |= {"data": found} if (found := taught.facts()) else {}
    print_answer(answer if json_ else brief(answer), json_)


def brief(answer: dict[str, Any]) -> dict[str, Any]:
    """A conversion's answer without what the report shows better: counts by part, categories."""
    short = dict(answer)
    if counts := answer.get("parameters"):
        short["parameters"] = {
            name: {key: row[key] for key in ("total", "activated")}
            for name, row in counts.items()
            if row
        }
    if scores := answer.get("scores"):
        short["scores"] = {name: row["overall"] for name, row in scores.items() if row}
    return short


def lora(
    file: Annotated[Path, typer.Argument(metavar="LORA", help="LoRA file (.safetensors).")],
    onto: Annotated[str, option("Sparse or dense pipeline directory.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Pipeline directory to write; without it only the shares are printed.",
        ),
    ] = None,
    scale: Annotated[float, option("Scale, times the LoRA's own.")] = 1.0,
    lossy: Annotated[
        bool, option("Skip LoRA weights that the model has no layer for.", "--lossy")
    ] = False,
    steps: Annotated[int | None, option("Default number of denoising steps of OUT.")] = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fuse a dense model's LoRA into a sparse or a dense pipeline.

    Prints which share of it is in which experts.
    """
    from d2m.lora.fuse import lora as function

    print_answer(function(file, onto, out, scale=scale, lossy=lossy, steps=steps), json_)
