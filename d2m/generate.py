"""Images out of a diffusers pipeline directory, dense or sparse, in batches, one seed each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.families.generation_defaults import FIELDS, generation_defaults
from runtime.files.extras import need

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from d2m.model.knobs import Knob

Generate = Callable[..., "list[Image]"]


def settings(directory: str | Path, **overrides: Any) -> dict[str, Any]:
    """`generation_defaults` with the overrides that are not None; ValueError for a bad value."""
    values = generation_defaults(directory)
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        low = 0 if FIELDS[name] is float else 1
        if value < low:
            raise ValueError(f"{name} is {value}, expected {low} or more")
    return values | given


def need_libraries(work: str) -> None:
    """ImportError that says how to install torch and diffusers, which `work` needs."""
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(need("convert", f"{work} needs torch and diffusers", error)) from error


def load_pipeline(
    directory: str | Path, *, device: str = "auto", dtype: str = "auto", transformer: bool = True
) -> Any:
    """The pipeline on `device` ("auto": CUDA where there is one), in eval mode, quiet.

    transformer: False leaves it out, for a process that only encodes.

    dtype: "auto" is bfloat16 on CUDA and float32 elsewhere, or "fp32", "bf16", "fp16".
    Raises FileNotFoundError for no pipeline, ValueError where weights do not fit their class,
    ImportError where torch or diffusers is missing.
    """
    generation_defaults(directory)  # a clear error before five seconds of imports
    need_libraries("generating from a pipeline directory")
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bf16" if device.startswith("cuda") else "fp32"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype {dtype!r} is not known, expected one of auto, {', '.join(dtypes)}")
    from d2m.model.components import check_components

    check_components(Path(directory), transformer)
    diffusers_logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(
        str(directory),
        torch_dtype=dtypes[dtype],
        local_files_only=True,
        **({} if transformer else {"transformer": None}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def generate_with(
    pipe: DiffusionPipeline,
    *,
    batch_size: int = 16,
    top_k: Knob = None,
    kappa: Knob = None,
    noise: Callable[[Sequence[int]], Any] | None = None,
    **values: Any,
) -> Generate:
    """A function (prompts, seeds) -> images; `values` are the fields of `generation_defaults`.

    Of a pipeline that edits: (prompts, seeds, images), a PIL image a prompt.

    top_k, kappa: experts a token uses and blocks a group keeps meanwhile, or lists with one number
    for every denoising step; None: as the model has them. noise(seeds): the initial latents, an
    array [n, ...] as the pipeline takes them, in place of those of torch's generator.
    An image depends on its own prompt and seed and on nothing else: one CPU generator per seed,
    so that batches, and CPU and CUDA, start from the same noise.
    """
    import torch

    from d2m.families import family_of_pipeline
    from d2m.model.knobs import knobs

    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}, expected 1 or more")
    steps = int(values.get("num_inference_steps", 28))  # the pipeline's own default
    counts = {"top_k": top_k, "kappa": kappa}
    call_pipeline = family_of_pipeline(pipe).data.generate
    with knobs(pipe.transformer, steps, **counts):
        pass  # a wrong number is answered before anything is generated

    def generate(
        prompts: Sequence[str], seeds: Sequence[int], before: Sequence[Image] | None = None
    ) -> list[Image]:
        if len(prompts) != len(seeds):
            raise ValueError(
                f"{len(prompts)} prompts but {len(seeds)} seeds, expected one seed a prompt"
            )
        images: list[Image] = []
        with torch.inference_mode(), knobs(pipe.transformer, steps, **counts) as on_step_end:
            for start in range(0, len(prompts), batch_size):
                chunk = slice(start, start + batch_size)
                generators = [torch.Generator("cpu").manual_seed(int(s)) for s in seeds[chunk]]
                arguments: dict[str, Any] = {
                    "prompt": list(prompts[chunk]),
                    "generator": generators,
                }
                arguments |= {"callback_on_step_end": on_step_end, **values}
                if before is not None:
                    arguments["images"] = list(before[chunk])
                if noise is not None:
                    given = torch.from_numpy(noise([int(seed) for seed in seeds[chunk]]))
                    arguments["latents"] = given.to(pipe.device, pipe.dtype)
                answer = call_pipeline(pipe, arguments)
                images.extend(answer.images)
        return images

    return generate
