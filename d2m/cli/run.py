"""d2m run and d2m measure: images from a bundle, and how long they take at which settings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from d2m.cli import options
from d2m.cli.progress import progress_bars
from d2m.cli.terminal import print_answer, print_json, print_table


def levels(text: str) -> list[float]:
    """'1,0.7,0.3' -> [1.0, 0.7, 0.3]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected numbers such as 1,0.7,0.3") from None


def run(
    first: Annotated[
        str | None, typer.Argument(metavar="BUNDLE|PROMPT", help="Bundle, or the prompt.")
    ] = None,
    second: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the image shall show.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="BUNDLE as an option.")] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="PNG file to write; with -n out-0.png, ...")
    ] = Path("out.png"),
    seed: options.Seed = 0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: Annotated[
        str | None, typer.Option(help="Negative prompt, with guidance by it (SD3, Qwen-Image).")
    ] = None,
    height: options.Height = None,
    width: options.Width = None,
    n: options.Images = 1,
    top_k: options.TopKSteps = None,
    kappa: options.KappaSteps = None,
    sigmas: Annotated[
        Any,
        typer.Option(
            metavar="SIGMA,...",
            parser=levels,
            help="Noise levels before the shift, falling: 1,0.7,0.3.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds: picks steps, top-k, kappa that fit (d2m measure)."),
    ] = None,
    backend: options.Backend = "auto",
    experts: options.Experts = "auto",
    offload: options.Offload = "none",
    regenerate: Annotated[
        Path | None, typer.Option(help="PNG made by d2m: generate the same again, and compare.")
    ] = None,
    again: Annotated[Path | None, typer.Option(hidden=True)] = None,  # the option's old name
    verify: Annotated[
        str, typer.Option(help="cached: hashes of unchanged files are remembered; or full.")
    ] = "cached",
    key: options.PublicKey = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Generate images of PROMPT from a bundle, without torch.

    Without BUNDLE, from the one that ships with d2m: a small model of coloured shapes.
    With --regenerate IMAGE.png, what that image says of itself: same bundle, settings and seed.
    """
    began = time.perf_counter()
    import runtime
    from runtime.image import save, settings_of

    if (png := regenerate or again) is not None:
        from runtime.regenerate import regenerate as function

        if second is not None or (first is not None and bundle is not None):
            raise ValueError("--regenerate takes the prompt from the image; name the bundle alone")
        options = {"experts": experts, "offload": offload}
        with progress_bars() as progress:
            image, answer = function(png, first or bundle, backend, progress=progress, **options)
        print_answer(answer | {"file": str(save(image, out))}, json_)
        return
    if first is None:
        raise ValueError("no prompt is given; add one, or --regenerate IMAGE.png")
    prompt, path = (first, bundle) if second is None else (second, Path(first))
    if second is not None and bundle is not None:
        raise ValueError(f"two bundles are given, {first!r} and {str(bundle)!r}; leave one out")
    if second is not None and not Path(first).exists():
        raise ValueError(
            f"there is no bundle {first!r}; put a prompt of several words in one pair of quotes"
        )
    if second is None and (Path(first) / "manifest.json").is_file():
        raise ValueError(f"{first!r} is a bundle and no prompt follows it; add the prompt")
    if out.suffix.lower() != ".png":
        raise ValueError(f"the image's file is {str(out)!r}, expected a name ending in .png")
    pipeline = runtime.load(path, backend, experts=experts, verify=verify, key=key, offload=offload)
    with progress_bars() as progress:
        result = pipeline(
            prompt,
            negative=negative,
            seed=seed,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            n=n,
            top_k=top_k,
            kappa=kappa,
            sigmas=sigmas,
            budget=budget,
            progress=progress,
        )
    images = result if isinstance(result, list) else [result]
    names = [out] if n == 1 else [out.with_name(f"{out.stem}-{i}.png") for i in range(n)]
    files = [str(save(image, name)) for image, name in zip(images, names, strict=True)]
    seconds = round(time.perf_counter() - began, 2)
    if json_:
        settings = [settings_of(image) for image in images]
        common = {"files": files, "backend": pipeline.backend, "seconds": seconds}
        print_json({**common, "seeds": [row["seed"] for row in settings], "settings": settings})
    else:
        print(f"{', '.join(files)} ({pipeline.backend}, {seconds} s)")


def measure(
    path: options.Bundle = None,
    steps: Annotated[tuple | None, options.numbers_option("Numbers of steps: 2,4,8.")] = None,
    top_k: Annotated[tuple | None, options.numbers_option("Numbers of experts: 1,2.")] = None,
    kappa: Annotated[tuple | None, options.numbers_option("Numbers of blocks: 1,2.")] = None,
    height: options.Height = None,
    width: options.Width = None,
    n: options.Images = 1,
    repeats: Annotated[
        int, typer.Option(help="Times that every setting and prompt is generated.")
    ] = 3,
    backend: options.Backend = "auto",
    experts: options.Experts = "auto",
    offload: options.Offload = "none",
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time BUNDLE at fewer steps, experts and blocks.

    The table is kept for this user and is what d2m run --budget reads.
    """
    import runtime
    from runtime.measure.latency import columns
    from runtime.measure.latency import measure as function

    asked = {"steps": steps, "top_k": top_k, "kappa": kappa}
    lists: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    pipeline = runtime.load(path, backend, experts=experts, offload=offload)
    with progress_bars() as progress:
        answer = function(
            pipeline,
            height=height,
            width=width,
            images=n,
            **lists,
            repeats=repeats,
            progress=progress,
        )
    title = f"{pipeline.bundle.path}: {n} of {answer['for']['width']} x {answer['for']['height']}"
    print_json(answer) if json_ else print_table(f"{title}, {pipeline.backend}", *columns(answer))
