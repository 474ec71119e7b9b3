"""Options that several commands share, and how lists in options are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def numbers(text: str) -> tuple[int, ...]:
    """'0,1,2' -> (0, 1, 2), for `parser=` of an option."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}, expected whole numbers with commas such as 1,2"
        ) from None


def knob(text: str) -> int | list[int]:
    """'2' -> 2, '2,2,1' -> [2, 2, 1] (one for every denoising step)."""
    values = numbers(text)
    if not values:
        raise typer.BadParameter(f"{text!r}, expected a number, or one for every step: 2,2,1")
    return list(values) if len(values) > 1 else values[0]


def option(help: str, *names: str, **settings: Any) -> Any:
    """An option of a command; `names` where they do not follow from the parameter's."""
    return typer.Option(*names, help=help, **settings)


def numbers_option(help: str) -> Any:
    """An option of whole numbers with commas."""
    return option(help, metavar="N[,N...]", parser=numbers)


# Any: typer takes a tuple's annotation for that many words, and a default is text to be parsed.
Debug = Annotated[bool, option("Show the traceback of an error.", "--debug")]
Json = Annotated[bool, option("Print the answer as JSON.", "--json")]
Seed = Annotated[int, option("Random seed.")]
Backend = Annotated[str, option("Backend: auto, ort, ort-cuda, trt or trt-rtx.")]
Experts = Annotated[str, option("Experts in TensorRT plans: auto, plans (portable) or cubins.")]
Offload = Annotated[str, option("none, or block: two blocks of weights in memory at a time.")]
PublicKey = Annotated[Path | None, option("Public key by which BUNDLE must be signed.", "--key")]
Bundle = Annotated[
    Path | None,
    typer.Argument(
        metavar="BUNDLE", help="Bundle directory; by default the one that ships with d2m."
    ),
]
Steps = Annotated[int | None, option("Denoising steps.")]
Guidance = Annotated[float | None, option("Guidance scale.")]
Height = Annotated[int | None, option("Image height in pixels.")]
Width = Annotated[int | None, option("Image width in pixels.")]
Images = Annotated[int, option("Number of images.", "-n", "--n")]
TopK = Annotated[int | None, option("Experts per token.")]
TopKSteps = Annotated[
    Any,
    option("Experts per token, or one number per step: 2,2,1.", metavar="K[,K...]", parser=knob),
]
Kappa = Annotated[int | None, option("Blocks that a group runs.")]
KappaSteps = Annotated[
    Any,
    option("Blocks that a group runs, or one number per step.", metavar="N[,N...]", parser=knob),
]


def lora(text: str) -> tuple[str, float]:
    """'style.safetensors:0.8' -> ("style.safetensors", 0.8); without a number 1.0."""
    file, colon, number = text.rpartition(":")
    try:
        return (file, float(number)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0  # a colon of the name's own


LORA = option(
    "LoRA of the dense model and its strength; may be repeated.",
    "--lora",
    metavar="FILE[:STRENGTH]",
    parser=lora,
)
Cache = Annotated[
    str | None,
    option(
        "Step caching: none, auto, first-block:0.1, interval:2, taylor:interval:2 "
        "(docs/caching.md)."
    ),
]
RecipeFile = Annotated[Path | None, option("Recipe file (JSON), in place of a preset.", "--recipe")]
Precision = Annotated[
    str | None, option("Training dtype, float32 or bfloat16; by default the recipe's.")
]
OffloadActivations = Annotated[
    bool, option("Keep the saved activations in CPU memory.", "--offload-activations")
]
