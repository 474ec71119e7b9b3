"""The command line: every command parses, calls one function and prints what it returned.

Only this file imports calib, export and runtime sideways, inside the command bodies, so that
`d2m run` and `d2m inspect` work on the base install and `d2m --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from d2m import options
from d2m.console import (
    explain,
    print_json,
    print_rich,
    print_table,
    print_tree,
    progress_bars,
    quiet_libraries,
    say,
)
from d2m.stopping import terminated_on_signal

app = typer.Typer(
    name="d2m",
    help="Dense2MoE: a dense diffusion transformer becomes a sparse one that draws without torch.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Draw = Callable[[Sequence[str], Sequence[int]], Any]


@app.command()
def convert(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="Pipeline directory or hub id.")],
    out: options.SparseOut,
    preset: options.Preset = "L",
    recipe: options.RecipeFile = None,
    budget: options.Budget = None,
    steps: options.TrainSteps = None,
    stages: options.Stages = "",
    start: options.Start = None,
    init_only: options.InitOnly = False,
    seed: options.RecipeSeed = None,
    importance: options.Importance = "calibration",
    resume: options.Resume = False,
    report: options.Report = True,
    data: options.Data = "shapes",
    cache: options.Cache = None,
    size: options.Size = None,
    shuffle: options.Shuffle = 1000,
    skip: options.Skip = 100,
    columns: options.Columns = None,
    score: options.Score = None,
    compare: options.Compare = None,
    precision: options.Precision = None,
    ema: options.Ema = None,
    accumulate: options.Accumulate = 1,
    gradient_checkpointing: options.Checkpointing = False,
    offload_activations: options.OffloadActivations = False,
    save_seconds: options.SaveSeconds = 60.0,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Turn the dense pipeline DENSE into a sparse one and distil it.

    Started by torchrun or accelerate launch, the processes distil together (docs/many-gpus.md).
    """
    from d2m.processes import ALONE, join, launched

    if launched().size > 1 and budget is not None:
        raise ValueError(
            "--budget is for one process; run it there with --init-only, and give the recipe.json "
            "that it writes as --recipe"
        )
    if launched().size > 1 and data.endswith(".txt"):
        raise ValueError(
            f"--data is {data!r}: prompts alone are for one process, where the teacher is whole; "
            "give pictures and captions to several"
        )
    if launched().size > 1 and init_only and not launched().leads:
        return  # one process is enough
    if init_only and steps is not None:
        raise ValueError(f"--init-only trains nothing but --steps is {steps}; give one of the two")
    if score is not None and score < 0:
        raise ValueError(f"--score is {score}, expected a number of pictures, 0 for none")
    from d2m.pareto import known_rows

    known = known_rows(compare) if compare else ()
    from calib.data import check_taught
    from calib.data import chosen as chosen_data
    from calib.importance import chosen
    from calib.statistics import routing_table
    from calib.suite import evaluate as judge
    from d2m.convert import convert as function
    from d2m.dense import locate
    from d2m.draw import drawing_defaults
    from d2m.recipe import Recipe

    taught = chosen_data(
        data,
        lambda: drawing_defaults(locate(dense)),
        cache=cache,
        size=size,
        buffer=shuffle,
        skip=skip,
        columns=columns,
        log=say,
    )
    judged = (120 if data == "shapes" else 0) if score is None else score
    neurons, scores, label = chosen(importance)
    if not init_only or scores is None or budget is not None:  # else no data is looked at
        check_taught(dense, taught)
    made: Any = recipe or preset
    facts: dict[str, Any] = {}
    if budget is not None:
        from calib.budget import for_conversion, told

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
            say(told(facts))
    if not isinstance(made, Recipe):
        from d2m.early import check_convert

        streamed = init_only and scores is not None
        if launched().leads:
            check_convert(
                dense, out, preset=preset, recipe=recipe, streamed=streamed, resume=resume
            )
    if init_only and scores is not None:
        from d2m.stream import convert_stream

        if stages or start is not None:
            raise ValueError("--init-only trains nothing; leave --stages and --start out")
        with progress_bars() as progress:
            answer = convert_stream(
                dense,
                out,
                made,
                scores,
                label,
                seed=seed,
                resume=resume,
                progress=progress,
                log=say,
            )
        print_json(answer) if json_ else print_tree(brief(answer))
        return
    crew = ALONE if init_only else join()
    with progress_bars() as progress:
        answer = function(
            dense,
            out,
            made,
            taught.batches,
            neurons,
            steps=steps,
            stages=[name.strip() for name in stages.split(",") if name.strip()],
            start=start,
            init_only=init_only,
            seed=seed,
            resume=resume,
            statistics=partial(routing_table, categories=taught.categories),
            score=(lambda draw: judge(draw, judged, 0)[0]) if judged else None,
            prompts=taught.prompts(6) if report else (),
            data=taught.label,
            known=known,
            report=report,
            precision=precision,
            ema=ema,
            crew=crew,
            parts=accumulate,
            checkpointing=gradient_checkpointing,
            offload=offload_activations,
            save_seconds=save_seconds,
            progress=progress,
            log=say,
        )
    if not crew.leads:
        return
    answer |= {"budget": facts} if facts else {}
    answer |= {"data": found} if (found := taught.facts()) else {}
    print_json(answer) if json_ else print_tree(brief(answer))


def brief(answer: dict[str, Any]) -> dict[str, Any]:
    """A conversion's answer without what the report shows better: counts by part, categories."""
    short = dict(answer)
    if counts := answer.get("parameters"):
        kept = ("total", "activated")
        short["parameters"] = {
            name: {key: row[key] for key in kept} for name, row in counts.items() if row
        }
    if scores := answer.get("scores"):
        short["scores"] = {name: row["overall"] for name, row in scores.items() if row}
    return short


@app.command()
def lora(
    file: Annotated[Path, typer.Argument(metavar="LORA", help="LoRA as .safetensors.")],
    onto: options.Onto,
    out: options.LoraOut = None,
    scale: options.Scale = 1.0,
    lossy: options.Lossy = False,
    steps: options.LoraSteps = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fuse a dense model's LoRA into a sparse pipeline, or a dense one; tell where it lies."""
    from d2m.lora import lora as function

    answer = function(file, onto, out, scale=scale, lossy=lossy, steps=steps)
    print_json(answer) if json_ else print_tree(answer)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Model directory, dense or sparse, or a shipped config: flux-dev, flux-schnell.",
        ),
    ],
    preset: options.PlanPreset = None,
    recipe: options.RecipeFile = None,
    blocks: options.Blocks = None,
    height: options.Height = None,
    width: options.Width = None,
    text_tokens: options.TextTokens = None,
    top_k: options.TopK = None,
    gpus: options.Gpus = None,
    gpu_memory: options.GpuMemory = 80.0,
    rows_: options.Rows = 1,
    precision: options.Precision = None,
    gradient_checkpointing: options.PlanCheckpointing = True,
    offload_activations: options.OffloadActivations = False,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Count MODEL before it is made: parameters, FLOPs, memory; and what this machine needs.

    With --gpus, what distilling it by --preset or --recipe takes of each of so many GPUs.
    """
    if gpus is not None:
        from d2m.fits import fits, fits_table, formula

        found = fits(
            model,
            options.numbers("--gpus", gpus),
            gpu_memory,
            preset=preset,
            recipe=recipe,
            precision=precision or "bfloat16",
            rows=rows_,
            checkpointing=gradient_checkpointing,
            offload=offload_activations,
            height=height,
            width=width,
            text_tokens=text_tokens,
        )
        if json_:
            print_json({"gpus": found, "formula": formula()})
            return
        print_table(*fits_table(found))
        print("\n" + formula())
        return
    from d2m.machine import machine
    from d2m.needs import needs, needs_table
    from d2m.plan import plan as function
    from d2m.plantable import conclusion, table

    answer = function(
        model,
        preset=preset,
        recipe=recipe,
        blocks=blocks,
        height=height,
        width=width,
        text_tokens=text_tokens,
        top_k=top_k,
    )
    # Models of fewer blocks are counted, but nothing converts or exports them.
    rows = (
        []
        if blocks
        else needs(
            model,
            machine(),
            preset=preset,
            recipe=recipe,
            height=height,
            width=width,
            text_tokens=text_tokens,
            top_k=top_k,
        )
    )
    if json_:
        print_json({**answer, "needs": rows})
        return
    print_table(*table(answer))
    print(conclusion(answer))
    if rows:
        print_table(*needs_table(rows))


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Where files would go.")] = Path("."),
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what is installed and works, what fits this machine, and what to do about the rest."""
    from d2m.doctor import doctor as function
    from d2m.doctor import lines
    from d2m.needs import needs_table
    from runtime.executor import MODULES

    answer = function(str(path), MODULES)
    if json_:
        print_json(answer)
        return
    print("\n".join(lines(answer)))
    print_table(*needs_table(answer["stages"]))
    print("\n".join(f"advice: {sentence}" for sentence in answer["advice"]))


@app.command()
def export(
    sparse: Annotated[Path, typer.Argument(metavar="SPARSE", help="Pipeline directory.")],
    out: options.BundleOut = None,
    trt: options.Trt = False,
    trt_rtx: options.TrtRtx = False,
    plugin: options.Plugin = False,
    cubins: options.Cubins = False,
    sm: options.Sm = "",
    top_k: options.TopKs = "0,1,2,4",
    dtype: options.Dtype = "fp32",
    plan_dtype: options.PlanDtype = None,
    storage: options.Storage = None,
    link: options.Link = False,
    triton_repo: options.TritonRepo = None,
    triton_instances: options.TritonInstances = 1,
    triton_batch: options.TritonBatch = 8,
    triton_bundle: options.TritonBundle = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compile the pipeline SPARSE into a bundle: ONNX, plans, weights, tokenizers, manifest.

    With --triton-repo DIR also a model repository around it; SPARSE may be a bundle then.
    """
    ready = (sparse / "manifest.json").is_file()
    if out is None and not (ready and triton_repo is not None):
        raise ValueError("the bundle's directory is not given; add -o BUNDLE")
    if out is not None and ready:
        raise ValueError(f"{str(sparse)!r} is a bundle already; leave -o {out} out")
    repository: dict[str, Any] = {
        "instances": triton_instances,
        "max_batch": triton_batch,
        "at": triton_bundle,
    }
    if triton_repo is not None:
        from export.nvtriton import check_options, write_repository

        check_options(**repository)
        if out is None:
            answer = write_repository(sparse, triton_repo, **repository)
            print_json(answer) if json_ else print_tree(answer)
            return
    assert out is not None
    capabilities, portable = options.capabilities(sm)
    choices = options.numbers("--top-k", top_k)
    from d2m.early import check_export
    from export.bundle import export_bundle

    sets = (trt or trt_rtx) * (1 + (portable and bool(capabilities)))
    check_export(sparse, out, top_k=len(choices), plans=sets, link=link, storage=storage)

    with progress_bars() as progress:
        answer = export_bundle(
            sparse,
            out,
            trt=trt,
            trt_rtx=trt_rtx,
            plugin=plugin,
            cubins=cubins,
            sm=capabilities,
            portable=portable,
            link=link,
            top_k=choices,
            dtype=dtype,
            plan_dtype=plan_dtype,
            storage=storage,
            progress=progress,
        )
    if triton_repo is not None:
        answer["triton"] = write_repository(out, triton_repo, **repository)
    print_json(answer) if json_ else print_tree(answer)


@app.command()
def run(
    first: Annotated[
        str | None, typer.Argument(metavar="BUNDLE|PROMPT", help="Bundle, or the prompt.")
    ] = None,
    second: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw.")] = None,
    bundle: options.BundleOption = None,
    out: options.Png = Path("out.png"),
    seed: options.Seed = 0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: options.Negative = None,
    height: options.Height = None,
    width: options.Width = None,
    n: options.Count = 1,
    top_k: options.TopKSteps = None,
    kappa: options.KappaSteps = None,
    sigmas: options.Sigmas = None,
    budget: options.Seconds = None,
    backend: options.Backend = "auto",
    experts: options.Experts = "auto",
    offload: options.Offload = "none",
    again: options.Again = None,
    verify: options.Verify = "cached",
    key: options.PublicKey = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Draw PROMPT; without BUNDLE, with the small shapes model that ships with d2m.

    With --again IMAGE.png, what that image says of itself: same bundle, settings and seed.
    """
    began = time.perf_counter()
    import runtime
    from runtime.picture import save

    if again is not None:
        from runtime.again import draw_again

        if second is not None or (first is not None and bundle is not None):
            raise ValueError("--again takes the prompt from the image; name the bundle alone")
        with progress_bars() as progress:
            image, told = draw_again(
                again,
                first or bundle,
                backend,
                experts=experts,
                offload=offload,
                progress=progress,
            )
        told |= {"file": str(save(image, out))}
        print_json(told) if json_ else print_tree(told)
        return
    if first is None:
        raise ValueError("no prompt is given; add what to draw, or --again IMAGE.png")
    prompt, path = (first, bundle) if second is None else (second, Path(first))
    if second is not None and bundle is not None:
        raise ValueError(f"two bundles are given, {first!r} and {str(bundle)!r}; leave one out")
    if second is None and (Path(first) / "manifest.json").is_file():
        raise ValueError(f"{first!r} is a bundle and no prompt follows it; add what to draw")
    if out.suffix.lower() != ".png":
        raise ValueError(f"the picture's file is {str(out)!r}, expected a name ending in .png")
    knobs: dict[str, Any] = {"top_k": options.knob("--top-k", top_k)}
    knobs["kappa"] = options.knob("--kappa", kappa)
    knobs |= {"sigmas": options.levels("--sigmas", sigmas), "budget": budget}
    knobs |= {"negative": negative}
    pipeline = runtime.load(path, backend, experts=experts, verify=verify, key=key, offload=offload)
    with progress_bars() as progress:
        answer = pipeline(
            prompt,
            seed=seed,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            n=n,
            **knobs,
            progress=progress,
        )
    images = answer if isinstance(answer, list) else [answer]
    names = [out] if n == 1 else [out.with_name(f"{out.stem}-{i}.png") for i in range(n)]
    files = [str(save(image, name)) for image, name in zip(images, names, strict=True)]
    seconds = round(time.perf_counter() - began, 2)
    if json_:
        print_json({"files": files, "backend": pipeline.backend, "seconds": seconds})
    else:
        print(f"{', '.join(files)} ({pipeline.backend}, {seconds} s)")


@app.command()
def measure(
    path: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Bundle; the embedded one by default.")
    ] = None,
    steps: options.StepsList = None,
    top_k: options.TopKList = None,
    kappa: options.KappaList = None,
    height: options.Height = None,
    width: options.Width = None,
    n: options.Count = 1,
    repeats: options.Repeats = 3,
    backend: options.Backend = "auto",
    experts: options.Experts = "auto",
    offload: options.Offload = "none",
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time BUNDLE at fewer steps, experts and blocks, for d2m run --budget; kept for this user."""
    import runtime
    from runtime.budget import columns
    from runtime.budget import measure as function

    lists = {"steps": steps, "top_k": top_k, "kappa": kappa}
    size: dict[str, Any] = {"height": height, "width": width, "images": n}
    for name, text in lists.items():
        if text is not None:
            size[name] = options.numbers(f"--{name.replace('_', '-')}", text)
    pipeline = runtime.load(path, backend, experts=experts, offload=offload)
    with progress_bars() as progress:
        answer = function(pipeline, **size, repeats=repeats, progress=progress)
    title = f"{pipeline.bundle.path}: {n} of {answer['for']['width']} x {answer['for']['height']}"
    print_json(answer) if json_ else print_table(f"{title}, {pipeline.backend}", *columns(answer))


@app.command()
def serve(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Bundle; the embedded one by default.")
    ] = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    workers: options.Workers = 1,
    max_queue: options.MaxQueue = 64,
    max_batch: options.MaxBatch = 8,
    max_images: options.MaxImages = 10,
    max_steps: options.MaxSteps = 100,
    max_pixels: options.MaxPixels = None,
    deadline: options.Deadline = 120.0,
    drain: options.Drain = 30.0,
    api_key_file: options.KeyFile = None,
    model_alias: options.ModelAlias = None,
    cors_origin: options.CorsOrigin = None,
    log_prompts: options.LogPrompts = False,
    backend: options.Backend = "auto",
    experts: options.Experts = "auto",
    debug: options.Debug = False,
) -> None:
    """Generate for OpenAI's clients: POST /v1/images/generations, a page on /, /metrics.

    --workers are threads that share one set of weights; a GPU takes one, so start a server per GPU.
    """
    import logging

    from runtime.serve.server import serve as function
    from runtime.serve.service import Service

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    key = os.environ.get("D2M_API_KEY") or None
    if api_key_file is not None:
        key = api_key_file.read_text(encoding="utf-8").strip()
    service = Service(
        bundle,
        backend,
        workers=workers,
        max_queue=max_queue,
        max_batch=max_batch,
        max_images=max_images,
        max_steps=max_steps,
        max_pixels=max_pixels,
        deadline=deadline,
        experts=experts,
        aliases=model_alias or (),
    )
    function(
        service,
        host,
        port,
        key=key,
        drain=drain,
        log_prompts=log_prompts,
        origins=cors_origin or (),
    )


@app.command("eval")
def evaluate(
    path: Annotated[Path, typer.Argument(metavar="PIPELINE_OR_BUNDLE", help="What to judge.")],
    suite: options.Suite = "shapes",
    n: options.Count = 600,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
    grid: options.Grid = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    top_k: options.TopKSteps = None,
    kappa: options.KappaSteps = None,
    batch: options.Batch = 16,
    world: options.Harder = "",
    backend: options.Backend = "auto",
    debug: options.Debug = False,
) -> None:
    """Score PIPELINE_OR_BUNDLE: pictures of held-out captions against an exact verifier."""
    if suite != "shapes":
        raise ValueError(f"--suite is {suite!r}, expected shapes, the only suite so far")
    if n < 1 or batch < 1:
        raise ValueError(f"-n is {n} and --batch is {batch}, expected 1 or more of each")
    from calib.suite import evaluate as function
    from calib.suite import save_grid
    from calib.world import World
    from d2m.files import write_json

    harder = options.pairs("--world", world, World.__dataclass_fields__)
    asked = World(**harder)
    knobs: dict[str, Any] = {
        "top_k": options.knob("--top-k", top_k),
        "kappa": options.knob("--kappa", kappa),
    }
    draw, size = drawer(path, harder.get("size"), steps, guidance, knobs, batch, backend)
    with progress_bars() as progress:
        answer, samples = function(
            draw,
            n,
            seed,
            replace(asked, size=size),
            batch=batch,
            progress=lambda done, total: progress("draw and judge", done, total),
        )
    if grid is not None:
        save_grid(samples, grid)
    if str(json_file) == "-":
        print_json(answer)
        return
    if json_file is not None:
        write_json(json_file, answer)
    rows = [*answer["categories"].items(), ("overall", answer["overall"])]
    columns = ("score", "low", "high", "n")
    print_table(
        f"{path}: {suite}, {n} pictures, {answer['images_per_second']} a second",
        ["category", *columns],
        [[name.replace("_", " "), *(row[column] for column in columns)] for name, row in rows],
    )


def drawer(
    path: Path,
    size: int | None,
    steps: int | None,
    guidance: float | None,
    knobs: dict[str, Any],
    batch: int,
    backend: str,
) -> tuple[Draw, int]:
    """(prompts, seeds) -> pictures for a bundle (no torch) or a pipeline directory, and the size.

    What is None comes from the directory; `knobs`: top_k and kappa, a number or a list of one a
    step. Raises FileNotFoundError where it is neither.
    """
    if (path / "manifest.json").is_file():
        from runtime.pipeline import Pipeline

        bundle = Pipeline(path, backend, max_batch=batch)
        pixels = size or int(bundle.manifest["defaults"]["height"])

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
            kept: dict[str, Any] = {"steps": steps, "guidance": guidance, **knobs}
            return bundle(list(prompts), seed=list(seeds), height=pixels, width=pixels, **kept)

        return draw, pixels
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{str(path)!r} is neither a bundle (manifest.json) nor a pipeline directory "
            "(model_index.json); give what d2m export or d2m convert has written"
        )
    from d2m.draw import load_pipeline, pipeline_draw, settings

    values = settings(
        path, num_inference_steps=steps, guidance_scale=guidance, height=size, width=size
    )
    pipe = load_pipeline(path)
    return pipeline_draw(pipe, batch_size=batch, **knobs, **values), values["height"]


@app.command()
def bench(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Bundle; the embedded one by default.")
    ] = None,
    vs: options.Versus = None,
    runs: options.Runs = 5,
    batch: options.Batches = "1",
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    top_k: options.TopK = None,
    kappa: options.Kappa = None,
    backend: options.Backend = "auto",
    threads: options.Threads = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure BUNDLE here: cold start, images, steps, blocks, memory; with --vs in turns."""
    batches = options.numbers("--batch", batch)
    from runtime.bench import bench as function
    from runtime.benchtable import tables

    with progress_bars() as progress:
        answer = function(
            bundle,
            vs,
            backend=backend,
            runs=runs,
            batches=batches,
            steps=steps,
            height=height,
            width=width,
            top_k=top_k,
            kappa=kappa,
            threads=threads,
            progress=progress,
        )
    if json_:
        print_json(answer)
        return
    for title, header, rows in tables(answer):
        print_table(title, header, rows)
    for sentence in answer.get("differences", ()):
        print(f"not alike: {sentence}")


@app.command()
def parity(
    sparse: Annotated[Path, typer.Argument(metavar="SPARSE", help="Pipeline directory.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Exported from it.")],
    backend: options.Backend = "ort",
    seed: options.Seed = 0,
    steps: options.Steps = None,
    top_k: options.TopK = None,
    kappa: options.Kappa = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare BUNDLE with torch part by part; exit code 1 where it misses a limit."""
    from export.parity import parity as function
    from export.parity import tables

    with progress_bars() as progress:
        answer = function(
            sparse,
            bundle,
            backend=backend,
            seed=seed,
            steps=steps,
            top_k=top_k,
            kappa=kappa,
            progress=progress,
        )
    print_json(answer) if json_ else print_rich(tables(answer))
    if not answer["passed"]:
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint or bundle.")],
    schedule: options.Schedule = None,
    steps: options.Steps = None,
    kappa: options.KappaSteps = None,
    backend: options.Backend = "auto",
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a sparse checkpoint or a bundle holds and what machine its plans need.

    With --schedule PROMPT, which blocks a bundle's groups run in each step, where that is known
    before drawing (alpha 0).
    """
    if schedule is not None:
        from runtime.forecast import columns
        from runtime.forecast import schedule as blocks
        from runtime.pipeline import Pipeline

        pipeline = Pipeline(path, backend, mode="blocks")
        answer = blocks(pipeline, schedule, steps=steps, kappa=options.knob("--kappa", kappa))
        print_json(answer) if json_ else print_table(f"{path}: {schedule}", *columns(answer))
        return
    from runtime.inspect import inspect as function
    from runtime.inspect import lines

    answer = function(path)
    print_json(answer) if json_ else print("\n".join(lines(answer)))


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(metavar="KEY", help="File to write; KEY.pub beside it.")],
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Make a pair of Ed25519 keys to sign bundles with: KEY, which stays secret, and KEY.pub."""
    from runtime.signature import make_key

    answer = make_key(path)
    print_json(answer) if json_ else print_tree(answer)


@app.command()
def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to sign.")],
    key: options.PrivateKey,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check every file of BUNDLE and sign its manifest, which holds all their hashes."""
    from runtime.signature import sign as function

    answer = function(bundle, key)
    print_json(answer) if json_ else print_tree(answer)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to check.")],
    key: options.PublicKey = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compute every hash of BUNDLE anew and check its signature; --key: by whom it must be."""
    from runtime.signature import verify as function

    answer = function(bundle, key)
    print_json(answer) if json_ else print_tree(answer)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 bad input, 130 Ctrl-C, 143 SIGTERM, 1 our fault.

    The command is invoked without typer's own `main`, which would swallow what a KeyboardInterrupt
    has to say (where a conversion stopped and how it goes on).
    """
    arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if "--debug" not in arguments:
        quiet_libraries()
    try:
        command = typer.main.get_command(app)
        with command.make_context("d2m", arguments.copy()) as context, terminated_on_signal():
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as done:  # --help, or a comparison that failed
        return done.exit_code
    except BrokenPipeError:  # `d2m inspect DIR | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            raise
        from d2m.processes import settled

        ending, speaks = settled(error)
        sentence, code = explain(ending)
        if speaks:
            say(f"error: {sentence}")
        return code


if __name__ == "__main__":
    sys.exit(main())
