"""d2m eval, d2m bench and d2m parity: how good, how fast and how exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from d2m.cli import options
from d2m.cli.options import numbers_option, option
from d2m.cli.progress import progress_bars
from d2m.cli.terminal import print_json, print_rich, print_table
from runtime.files.checked_json import read_json

Generate = Callable[..., Any]


def world_of(text: str) -> dict[str, int]:
    """'size=64,shapes=6' -> {"size": 64, "shapes": 6}; whose names a suite's world knows."""
    from calib.suites import NAMES, suite_named

    known = dict.fromkeys(name for suite in NAMES for name in suite_named(suite).settings)
    values = {}
    for part in text.split(",") if text else ():
        key, _, value = part.partition("=")
        if key.strip() not in known or not value.strip().isdecimal():
            names = ", ".join(known)
            raise typer.BadParameter(f"{part!r}, expected NAME=NUMBER with a name of {names}")
        values[key.strip()] = int(value)
    return values


def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="PIPELINE_OR_BUNDLE", help="Pipeline or bundle directory.")
    ],
    suite: Annotated[str, option("Benchmark: shapes, shapes-edit or emoji.")] = "shapes",
    n: options.Images = 600,
    seed: options.Seed = 0,
    out: Annotated[Path | None, option("JSON file to write.", "-o", "--out")] = None,
    grid: Annotated[
        Path | None, option("PNG file to write: a labelled grid of samples, with --vs of pairs.")
    ] = None,
    vs: Annotated[
        Path | None,
        option("Another pipeline or bundle, on the same captions and from the same noise."),
    ] = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    top_k: options.TopKSteps = None,
    kappa: options.KappaSteps = None,
    cache: options.Cache = None,
    batch: Annotated[int, option("Batch size.")] = 16,
    world: Annotated[
        Any,
        option(
            "Make the benchmark harder, e.g. colours=8,shapes=6,max_count=5.",
            metavar="NAME=NUMBER,...",
            parser=world_of,
        ),
    ] = "",
    backend: options.Backend = "auto",
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Score generated images of held-out captions, or edits by held-out instructions."""
    from calib.suites import suite_named

    judge = suite_named(suite)
    if n < 1 or batch < 1:
        raise ValueError(f"-n is {n} and --batch is {batch}, expected at least 1 each")
    if unknown := sorted(set(world) - set(judge.settings)):
        raise ValueError(
            f"--world names {', '.join(unknown)}, which the suite {suite} does not have; expected "
            f"{', '.join(judge.settings)}"
        )
    judge.world(world.get("size", judge.pixels), world)  # what is wrong with it is said at once
    from calib.score.pairs import paired, save_pairs
    from calib.score.rates import percent
    from runtime.files.atomic import check_writable, write_json

    knobs: dict[str, Any] = {"top_k": top_k, "kappa": kappa}
    for file in (grid, out):
        if file is not None:
            check_writable(file)
    paths = [path] if vs is None else [path, vs]
    for each in paths:
        check_edits(each, suite, judge.edits)
    bundle = next((each for each in paths if (each / "manifest.json").is_file()), None)
    answers: list[dict[str, Any]] = []
    samples: list[list[Any]] = []
    for each in paths:
        # torch makes other noise of a seed than the runtime does; with a bundle it is the bundle's.
        noise = bundle if len(paths) > 1 and each != bundle else None
        own = knobs if is_sparse(each) or len(paths) == 1 else {}
        own = own if cache is None else own | {"cache": cache}
        generate, size = generator(
            each, world.get("size"), steps, guidance, own, batch, backend, noise
        )
        with progress_bars() as progress:
            answer, found = judge.evaluate(
                generate,
                n,
                seed,
                judge.world(size, world),
                batch=batch,
                progress=lambda done, total: progress("generate and judge", done, total),
            )
        answers.append(answer)
        samples.append(found)
        del generate
    answer = answers[0]
    if vs is not None:
        names = [f"{each}: {percent(row['overall'])}" for each, row in zip(paths, answers)]
        answer |= {"vs": answers[1], "pairs": paired(samples[0], samples[1])}
        if grid is not None:
            save_pairs(samples[0], samples[1], (names[0], names[1]), grid)
    elif grid is not None:
        judge.save_grid(samples[0], grid)
    if out is not None:
        write_json(out, answer)
    if json_:
        print_json(answer)
        return
    for each, row in zip(paths, answers):
        print_scores(each, suite, n, row)
    if vs is not None:
        print(
            "of {n} captions both show {both}, {first} alone {first_only}, {second} alone "
            "{second_only}, neither {neither}".format(n=n, first=path, second=vs, **answer["pairs"])
        )


def check_edits(path: Path, suite: str, edits: bool) -> None:
    """ValueError where a suite of edits is asked of what edits nothing, or another of an editor."""
    from d2m.families import pairs_for

    if (path / "manifest.json").is_file():
        if edits:
            raise ValueError(
                f"--suite is {suite}, which needs a pipeline directory, but {path} is a bundle; "
                "score the pipeline that it was exported from"
            )
    elif (path / "model_index.json").is_file():
        taken = pairs_for(path)
        if suite not in taken if edits else taken:
            name = read_json(path / "model_index.json")["_class_name"]
            raise ValueError(
                f"--suite is {suite}, which {name} in {path} cannot do; expected shapes-edit for a "
                "pipeline that edits by instructions, shapes or emoji for one that is given no "
                "image"
            )


def is_sparse(path: Path) -> bool:
    """Whether a pipeline or bundle has experts, and so knobs."""
    manifest, index = path / "manifest.json", path / "model_index.json"
    if manifest.is_file():
        return read_json(manifest).get("num_experts") is not None
    return index.is_file() and "Sparse" in str(read_json(index).get("transformer"))


def print_scores(path: Path, suite: str, n: int, answer: dict[str, Any]) -> None:
    """A table of a suite's result."""
    rows = [*answer["categories"].items(), ("overall", answer["overall"])]
    for each, found in answer.get("recall", {}).items():
        rows += [(f"recall {each} {name}", rate) for name, rate in found.items()]
    columns = ("score", "low", "high", "n")
    print_table(
        f"{path}: {suite}, {n} images, {answer['images_per_second']} a second",
        ["category", *columns],
        [[name.replace("_", " "), *(row[column] for column in columns)] for name, row in rows],
    )


def generator(
    path: Path,
    size: int | None,
    steps: int | None,
    guidance: float | None,
    knobs: dict[str, Any],
    batch: int,
    backend: str,
    noise_of: Path | None = None,
) -> tuple[Generate, int]:
    """(prompts, seeds) -> images for a bundle (no torch) or a pipeline directory, and the size.

    What is None comes from the directory; `knobs`: top_k and kappa, a number or a list of one a
    step, and cache; noise_of: a bundle whose noise a pipeline starts from. Raises
    FileNotFoundError where it is neither.
    """
    if (path / "manifest.json").is_file():
        from runtime.pipeline import Pipeline

        bundle = Pipeline(path, backend, max_batch=batch)
        pixels = size or int(bundle.manifest["defaults"]["height"])

        def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
            settings: dict[str, Any] = {"steps": steps, "guidance": guidance, **knobs}
            return bundle(list(prompts), seed=list(seeds), height=pixels, width=pixels, **settings)

        return generate, pixels
    if not (path / "model_index.json").is_file():
        from runtime.files.kinds import not_a

        cure = "d2m convert and d2m export write them"
        raise FileNotFoundError(not_a("a pipeline directory or a bundle", path, cure))
    from d2m.generate import generate_with, load_pipeline, settings

    if "cache" in knobs:
        raise ValueError(
            f"--cache is {knobs['cache']}, but {path} is a pipeline, expected a bundle: steps are "
            "cached in the runtime; export it first, or leave --cache out"
        )
    values = settings(
        path, num_inference_steps=steps, guidance_scale=guidance, height=size, width=size
    )
    pipe = load_pipeline(path)
    noise = None if noise_of is None else bundle_noise(noise_of, values["height"], values["width"])
    made = generate_with(pipe, batch_size=batch, noise=noise, **knobs, **values)
    return made, values["height"]


def bundle_noise(path: Path, height: int, width: int) -> Callable[[Sequence[int]], Any]:
    """seeds -> the noise that a bundle starts images of that size from."""
    from runtime.bundle import open_bundle
    from runtime.families import family_of

    manifest = open_bundle(path, "sizes").manifest
    settings, family = manifest["latents"], family_of(manifest)
    scale = settings["vae_scale_factor"]
    return lambda seeds: family.noise(seeds, settings["channels"], height // scale, width // scale)


def bench(
    bundle: options.Bundle = None,
    vs: Annotated[
        Path | None,
        option("Baseline to compare with: the dense model's bundle, exported likewise."),
    ] = None,
    runs: Annotated[int, option("Repetitions of every measurement.")] = 5,
    batch: Annotated[Any, numbers_option("Batch sizes, e.g. 1,8.")] = "1",
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    top_k: options.TopK = None,
    kappa: options.Kappa = None,
    cache: options.Cache = None,
    backend: options.Backend = "auto",
    threads: Annotated[int | None, option("CPU threads.")] = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure BUNDLE on this machine: start-up, images, steps, blocks, memory.

    With --vs the two bundles are measured in turns; a ratio above 1 is in favour of
    BUNDLE.
    """
    from runtime.measure.bench import bench as function
    from runtime.measure.bench_tables import ratio_sentence, tables

    settings: dict[str, Any] = {"backend": backend, "runs": runs, "batches": batch}
    settings |= {"height": height, "width": width, "threads": threads}
    knobs: dict[str, Any] = {"steps": steps, "top_k": top_k, "kappa": kappa, "cache": cache}
    with progress_bars() as progress:
        answer = function(bundle, vs, **settings, **knobs, progress=progress)
    if json_:
        print_json(answer)
        return
    for title, header, rows in tables(answer):
        print_table(title, header, rows)
    if "vs" in answer:
        print(ratio_sentence(answer))
    for sentence in answer.get("differences", ()):
        print(f"difference: {sentence}")


def parity(
    sparse: Annotated[
        Path, typer.Argument(metavar="PIPELINE", help="Sparse or dense pipeline directory.")
    ],
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Bundle exported from PIPELINE.")
    ],
    backend: options.Backend = "ort",
    seed: options.Seed = 0,
    steps: options.Steps = None,
    top_k: options.TopK = None,
    kappa: options.Kappa = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare BUNDLE with torch: components, blocks, experts, images.

    The exit code is 1 where a difference exceeds its limit.
    """
    from export.parity.run import parity as function
    from export.parity.run import tables

    knobs: dict[str, Any] = {"seed": seed, "steps": steps, "top_k": top_k, "kappa": kappa}
    with progress_bars() as progress:
        answer = function(sparse, bundle, backend=backend, **knobs, progress=progress)
    print_json(answer) if json_ else print_rich(tables(answer))
    if not answer["passed"]:
        raise typer.Exit(1)
