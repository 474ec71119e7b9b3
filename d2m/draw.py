"""Pictures out of a diffusers pipeline directory, dense or sparse, in batches, one seed each.

`drawing_defaults` is the one place that knows how a pipeline directory wants to be drawn from:
its optional `defaults.json`, and where that is silent, what its component configs imply.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.families import family_of
from runtime.files.extras import need

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

DEFAULTS_FILE = "defaults.json"
FIELDS: dict[str, type] = {
    "height": int,
    "width": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "max_sequence_length": int,
}
Draw = Callable[[Sequence[str], Sequence[int]], "list[Image]"]
Knob = int | Sequence[int] | None  # one number, or one for every denoising step


def drawing_defaults(directory: str | Path) -> dict[str, Any]:
    """How to draw from the pipeline in `directory` (reads JSON files only, no torch).

    Returns height and width (pixels), num_inference_steps, guidance_scale, max_sequence_length.
    `defaults.json` in the directory wins; the rest is what the family's `drawing` reads from the
    component configs: for FLUX.1 the VAE's `sample_size`, and for a model with guidance embedding
    ([dev]) 28 steps at 3.5 and T5 texts of up to 512 tokens, without ([schnell]) 4, 0.0 and 256.

    Raises FileNotFoundError if the directory is no pipeline, ValueError for a bad `defaults.json`.
    """
    directory = Path(directory)
    if not (directory / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{str(directory)!r} has no model_index.json, so it is not a diffusers pipeline "
            "directory; give one that save_pretrained or d2m convert has written"
        )
    values = family_of(directory).drawing(lambda file: _config(directory / file))
    path = directory / DEFAULTS_FILE
    if path.is_file():
        values.update(_checked(_config(path), path))
    return values


def write_defaults(directory: str | Path, **values: Any) -> Path:
    """Write `defaults.json` into a pipeline directory; fields as in `drawing_defaults`."""
    from d2m.files import write_json

    path = Path(directory) / DEFAULTS_FILE
    return write_json(path, _checked(values, path))


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds a {type(value).__name__}, expected a JSON object")
    return value


def _checked(values: dict[str, Any], path: Path) -> dict[str, Any]:
    for name, value in values.items():
        if name not in FIELDS:
            raise ValueError(f"{str(path)!r} names {name!r}, expected only {', '.join(FIELDS)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or (FIELDS[name] is int and (value != int(value) or value < 1)) or value < 0:
            kind = "a whole number from 1 on" if FIELDS[name] is int else "a number from 0 on"
            raise ValueError(f"{str(path)!r}: {name} is {value!r}, expected {kind}")
    return {name: FIELDS[name](value) for name, value in values.items()}


def settings(directory: str | Path, **overrides: Any) -> dict[str, Any]:
    """`drawing_defaults` with the overrides that are not None; ValueError for a bad value."""
    values = drawing_defaults(directory)
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        low = 0 if FIELDS[name] is float else 1
        if value < low:
            raise ValueError(f"{name} is {value}, expected {low} or more")
    return values | given


def load_pipeline(
    directory: str | Path, *, device: str = "auto", dtype: str = "auto", transformer: bool = True
) -> Any:
    """The pipeline on `device` ("auto": CUDA where there is one), in eval mode, quiet.

    transformer: False leaves it out, for a process that only encodes.

    dtype: "auto" is bfloat16 on CUDA and float32 elsewhere, or "fp32", "bf16", "fp16".
    Raises FileNotFoundError for no pipeline, ImportError where torch or diffusers is missing.
    """
    drawing_defaults(directory)  # a clear error before five seconds of imports
    try:
        import torch
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging as diffusers_logging
    except ImportError as error:
        said = "generating from a pipeline directory needs torch and diffusers"
        raise ImportError(need("convert", said, error)) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bf16" if device.startswith("cuda") else "fp32"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype {dtype!r} is not known, expected one of auto, {', '.join(dtypes)}")
    diffusers_logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(
        str(directory),
        torch_dtype=dtypes[dtype],
        local_files_only=True,
        **({} if transformer else {"transformer": None}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def pipeline_draw(
    pipe: DiffusionPipeline,
    *,
    batch_size: int = 16,
    top_k: Knob = None,
    kappa: Knob = None,
    **values: Any,
) -> Draw:
    """A function (prompts, seeds) -> pictures; `values` are the fields of `drawing_defaults`.

    top_k, kappa: experts a token uses and blocks a group keeps meanwhile, or lists with one number
    for every denoising step; None: as the model has them.
    A picture depends on its own prompt and seed and on nothing else: one CPU generator per seed,
    so that batches, and CPU and CUDA, start from the same noise.
    """
    import torch

    from d2m.families import family_of_pipeline
    from d2m.knobs import knobs

    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}, expected 1 or more")
    steps = int(values.get("num_inference_steps", 28))  # the pipeline's own default
    turned = {"top_k": top_k, "kappa": kappa}
    drawn = family_of_pipeline(pipe).drawn
    with knobs(pipe.transformer, steps, **turned):
        pass  # a wrong number is answered before anything is drawn

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds, expected as many")
        pictures: list[Image] = []
        with torch.inference_mode(), knobs(pipe.transformer, steps, **turned) as on_step_end:
            for start in range(0, len(prompts), batch_size):
                chunk = slice(start, start + batch_size)
                generators = [torch.Generator("cpu").manual_seed(int(s)) for s in seeds[chunk]]
                given = {"prompt": list(prompts[chunk]), "generator": generators}
                answer = drawn(pipe, {**given, "callback_on_step_end": on_step_end, **values})
                pictures.extend(answer.images)
        return pictures

    return draw
