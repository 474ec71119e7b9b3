"""d2m run and d2m measure: images from a bundle, and how long they take at which settings."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from d2m.cli import options
from d2m.cli.options import numbers_option, option
from d2m.cli.progress import progress_bars
from d2m.cli.prompts import image_files, read_prompts
from d2m.cli.terminal import print_answer, print_json, print_table, say


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
    prompts: Annotated[
        Path | None,
        option(
            "File of prompts, or - for standard input: a line each, a text or a JSON object of "
            "prompt, seed and negative."
        ),
    ] = None,
    out: Annotated[
        Path,
        option(
            "Image to write (.png, .jpg, .webp; - for a PNG on standard output). {index}, {seed} "
            "and {prompt} in its name are filled in; of many without them: out-0.png, out-1.png.",
            "-o",
            "--out",
        ),
    ] = Path("out.png"),
    scale: Annotated[int, option("Write every pixel as a square of this side.", min=1, max=64)] = 1,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: Annotated[
        str | None, option("Negative prompt (SD3, PixArt-Sigma, Qwen-Image).")
    ] = None,
    image: Annotated[
        Path | None, option("Image to change: image to image, or the one that --mask is of.")
    ] = None,
    strength: Annotated[
        float | None, option("How far the image is changed, 0 to 1; by default 0.6, with a mask 1.")
    ] = None,
    mask: Annotated[Path | None, option("Image that is white where --image is repainted.")] = None,
    control: Annotated[
        list[Path] | None,
        option("Image that the model follows, such as edges; one for each --controlnet."),
    ] = None,
    controlnet: Annotated[
        list[Path] | None, option("Bundle of a ControlNet; may be repeated (docs/controlnet.md).")
    ] = None,
    control_scale: Annotated[
        list[float] | None,
        option("How strongly --control is followed, 1 unless said; or one each."),
    ] = None,
    control_range: Annotated[
        list[Any] | None,
        option("Share of the steps that follow it: 0,0.6.", metavar="FROM,TO", parser=levels),
    ] = None,
    control_mode: Annotated[
        list[int] | None, option("Kind of image, for ControlNets that know several.")
    ] = None,
    reference: Annotated[
        list[Path] | None,
        option("Image that the model sees (FLUX.1 Kontext one, FLUX.2 several: name each)."),
    ] = None,
    height: options.Height = None,
    width: options.Width = None,
    n: options.Images = 1,
    top_k: options.TopKSteps = None,
    kappa: options.KappaSteps = None,
    cache: options.Cache = None,
    lora: Annotated[list[Any] | None, options.LORA] = None,
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
        Path | None,
        option("PNG made by d2m: generate it again, from the same images, and compare."),
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
    With --prompts, one image (or -n) for every line of the file.
    With --regenerate IMAGE.png, the bundle, settings and seed are those recorded in that image.
    """
    began = time.perf_counter()
    import runtime
    from runtime.files.atomic import check_writable
    from runtime.image import check_name, enlarge, save, settings_of, to_png
    from runtime.images import open_image

    how: dict[str, Any] = {"experts": experts, "offload": offload, "loras": dict(lora or ())}
    how["controlnets"] = controlnet or ()
    files_in = {"image": image, "mask": mask}
    images_in: dict[str, Any] = {
        name: open_image(file, f"--{name}") for name, file in files_in.items() if file is not None
    }
    if followed := [open_image(file, "--control") for file in control or ()]:
        if not controlnet and len(followed) > 1:
            raise ValueError("--control is given twice without --controlnet; leave one out")
        images_in["control"] = followed if controlnet else followed[0]
    elif controlnet and not (regenerate or again):
        raise ValueError("--controlnet is given without --control; name the image that it follows")
    if reference:
        images_in["references"] = [open_image(file, "--reference") for file in reference]
    if (png := regenerate or again) is not None:
        from runtime.regenerate import regenerate as function

        if second is not None or (first is not None and bundle is not None):
            raise ValueError("--regenerate takes the prompt from the image; name the bundle alone")
        with progress_bars() as progress:
            again_made, comparison = function(
                png, first or bundle, backend, images=images_in, **how, progress=progress
            )
        print_answer(comparison | {"file": str(save(again_made, out))}, json_)
        return
    if prompts is not None:
        if second is not None or (first is not None and bundle is not None):
            raise ValueError("--prompts takes the prompts from a file; name the bundle alone")
        path = bundle if first is None else Path(first)
        asked = read_prompts(prompts, seed, negative)
    else:
        prompt, path = prompt_and_bundle(first, second, bundle)
        asked = {"prompt": prompt, "seed": seed, "negative": negative}
    # What can be refused is refused before the bundle opens.
    to_stdout = str(out) == "-"
    if to_stdout and (n > 1 or prompts is not None):
        raise ValueError("-o - writes one image; name a file for many")
    if to_stdout and sys.stdout.isatty():
        raise ValueError("-o - writes a PNG's bytes, expected standard output in a pipe or a file")
    if not to_stdout:
        check_name(out)
        check_writable(out)
    pipeline = runtime.load(path, backend, verify=verify, key=key, **how)
    settings: dict[str, Any] = {"guidance": guidance, "n": n, "top_k": top_k, "kappa": kappa}
    settings |= {"steps": steps, "height": height, "width": width, "budget": budget, "cache": cache}
    given = asked["prompt"]
    size = height, width
    given_images = images_in.get("image"), *followed, images_in.get("mask")
    if own := next((each for each in given_images if each is not None), None):
        size = height or own.height, width or own.width
    for clause in pipeline.warnings([given] if isinstance(given, str) else given, *size):
        say(f"warning: {clause}")
    settings |= {**images_in, "strength": strength}
    knobs = {"scale": control_scale, "range": control_range, "mode": control_mode}
    for knob, values in knobs.items():
        if values:
            settings[f"control_{knob}"] = values if len(values) > 1 else values[0]
    with progress_bars() as progress:
        answer = pipeline(**asked, **settings, sigmas=sigmas, progress=progress)
    images: list[Any] = answer if isinstance(answer, list) else [answer]
    if scale > 1:
        images = [enlarge(made, scale) for made in images]
    used = [settings_of(made) for made in images]
    if to_stdout:
        sys.stdout.buffer.write(to_png(images[0]))
        return
    names = [row["prompt"] for row in used], [row["seed"] for row in used]
    files = image_files(out, *names, many=isinstance(answer, list))
    for made, name in zip(images, files, strict=True):
        save(made, name)
    seconds = round(time.perf_counter() - began, 2)
    if json_:
        common = {"files": list(map(str, files)), "backend": pipeline.backend, "seconds": seconds}
        print_json({**common, "seeds": names[1], "settings": used})
    else:
        shown = ", ".join(map(str, files[:8])) + (f" and {len(files) - 8} more" * (len(files) > 8))
        print(f"{shown} ({pipeline.backend}, {seconds} s)")


def prompt_and_bundle(
    first: str | None, second: str | None, bundle: Path | None
) -> tuple[str, Path | None]:
    """PROMPT, BUNDLE PROMPT, or --bundle BUNDLE PROMPT; ValueError where it is none of them."""
    if first is None:
        raise ValueError(
            "no prompt is given; add one, or --prompts FILE, or --regenerate IMAGE.png"
        )
    if second is None:
        if (Path(first) / "manifest.json").is_file():
            raise ValueError(f"{first!r} is a bundle and no prompt follows it; add the prompt")
        if Path(first).suffix.lower() in (".txt", ".jsonl") and Path(first).is_file():
            raise ValueError(f"{first!r} is a file; read its prompts with --prompts {first}")
        return first, bundle
    if bundle is not None:
        raise ValueError(f"two bundles are given, {first!r} and {str(bundle)!r}; leave one out")
    if not Path(first).exists():
        raise ValueError(
            f"{first!r} is no bundle directory; put a prompt of several words in one pair of quotes"
        )
    return second, Path(first)


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
