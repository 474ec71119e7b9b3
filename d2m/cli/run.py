"""d2m run and d2m measure: images from a bundle, and how long they take at which settings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from d2m.cli import options
from d2m.cli.options import numbers_option, option
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
        str | None, typer.Argument(metavar="BUNDLE|PROMPT", help="Bundle directory, or the prompt.")
    ] = None,
    second: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Text prompt.")] = None,
    bundle: Annotated[Path | None, option("Bundle directory, in place of the argument.")] = None,
    out: Annotated[
        Path, option("PNG file to write; with -n: out-0.png, out-1.png, ...", "-o", "--out")
    ] = Path("out.png"),
    seed: options.Seed = 0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: Annotated[
        str | None, option("Negative prompt (SD3, PixArt-Sigma, Qwen-Image).")
    ] = None,
    height: options.Height = None,
    width: options.Width = None,
    n: options.Images = 1,
    top_k: options.TopKSteps = None,
    kappa: options.KappaSteps = None,
    sigmas: Annotated[
        Any,
        option(
            "Decreasing noise levels, before the scheduler's shift: 1,0.7,0.3.",
            metavar="SIGMA,...",
            parser=levels,
        ),
    ] = None,
    budget: Annotated[
        float | None, option("Seconds: choose steps, top-k and kappa that fit (see d2m measure).")
    ] = None,
    backend: options.Backend = "auto",
    experts: options.Experts = "auto",
    offload: options.Offload = "none",
    regenerate: Annotated[
        Path | None, option("PNG made by d2m: generate it again and compare.")
    ] = None,
    again: Annotated[Path | None, typer.Option(hidden=True)] = None,  # the option's old name
    verify: Annotated[
        str,
        typer.Option(
            help="cached: skip files verified before and unchanged; full: hash every file."
        ),
    ] = "cached",
    key: options.PublicKey = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Generate images of PROMPT from a bundle, without torch.

    Without BUNDLE, the bundle that ships with d2m: a small model of coloured shapes.
    With --regenerate IMAGE.png, the bundle, settings and seed are those recorded in that image.
    """
    began = time.perf_counter()
    import runtime
    from runtime.image import save, settings_of

    how: dict[str, Any] = {"experts": experts, "offload": offload}
    if (png := regenerate or again) is not None:
        from runtime.regenerate import regenerate as function

        if second is not None or (first is not None and bundle is not None):
            raise ValueError("--regenerate takes the prompt from the image; name the bundle alone")
        with progress_bars() as progress:
            image, comparison = function(png, first or bundle, backend, **how, progress=progress)
        print_answer(comparison | {"file": str(save(image, out))}, json_)
        return
    if first is None:
        raise ValueError("no prompt is given; add one, or --regenerate IMAGE.png")
    prompt, path = (first, bundle) if second is None else (second, Path(first))
    if second is not None and bundle is not None:
        raise ValueError(f"two bundles are given, {first!r} and {str(bundle)!r}; leave one out")
    if second is not None and not Path(first).exists():
        raise ValueError(
            f"{first!r} is no bundle directory; put a prompt of several words in one pair of quotes"
        )
    if second is None and (Path(first) / "manifest.json").is_file():
        raise ValueError(f"{first!r} is a bundle and no prompt follows it; add the prompt")
    if out.suffix.lower() != ".png":
        raise ValueError(f"the image's file is {str(out)!r}, expected a name ending in .png")
    pipeline = runtime.load(path, backend, verify=verify, key=key, **how)
    settings: dict[str, Any] = {"negative": negative, "seed": seed, "guidance": guidance, "n": n}
    settings |= {"steps": steps, "height": height, "width": width, "budget": budget}
    settings |= {"top_k": top_k, "kappa": kappa, "sigmas": sigmas}
    with progress_bars() as progress:
        answer = pipeline(prompt, **settings, progress=progress)
    images = answer if isinstance(answer, list) else [answer]
    names = [out] if n == 1 else [out.with_name(f"{out.stem}-{i}.png") for i in range(n)]
    files = [str(save(image, name)) for image, name in zip(images, names, strict=True)]
    seconds = round(time.perf_counter() - began, 2)
    if json_:
        used = [settings_of(image) for image in images]
        common = {"files": files, "backend": pipeline.backend, "seconds": seconds}
        print_json({**common, "seeds": [row["seed"] for row in used], "settings": used})
    else:
        print(f"{', '.join(files)} ({pipeline.backend}, {seconds} s)")


def measure(
    path: options.Bundle = None,
    steps: Annotated[tuple | None, numbers_option("Numbers of steps to try: 2,4,8.")] = None,
    top_k: Annotated[tuple | None, numbers_option("Numbers of experts to try: 1,2.")] = None,
    kappa: Annotated[tuple | None, numbers_option("Numbers of blocks to try: 1,2.")] = None,
    height: options.Height = None,
    width: options.Width = None,
    n: options.Images = 1,
    repeats: Annotated[int, option("Repetitions of every setting and prompt.")] = 3,
    backend: options.Backend = "auto",
    experts: options.Experts = "auto",
    offload: options.Offload = "none",
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure the latency of BUNDLE by steps, experts and blocks.

    d2m run --budget reads the table, which is stored in this user's cache.
    """
    import runtime
    from runtime.measure.latency import columns
    from runtime.measure.latency import measure as function

    values = {"steps": steps, "top_k": top_k, "kappa": kappa}
    lists: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    lists |= {"height": height, "width": width, "images": n, "repeats": repeats}
    pipeline = runtime.load(path, backend, experts=experts, offload=offload)
    with progress_bars() as progress:
        answer = function(pipeline, **lists, progress=progress)
    title = f"{pipeline.bundle.path}: {n} of {answer['for']['width']} x {answer['for']['height']}"
    print_json(answer) if json_ else print_table(f"{title}, {pipeline.backend}", *columns(answer))
