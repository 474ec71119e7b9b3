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


# Any: typer takes a tuple's annotation for that many words, and a default is text to be parsed.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Backend = Annotated[str, typer.Option(help="auto, ort, ort-cuda, trt or trt-rtx.")]
Experts = Annotated[str, typer.Option(help="With plans: auto, plans (portable) or cubins.")]
Offload = Annotated[str, typer.Option(help="none, or block: weights streamed through two blocks.")]
PublicKey = Annotated[
    Path | None, typer.Option("--key", help="Public key by which BUNDLE must be signed.")
]
Bundle = Annotated[
    Path | None, typer.Argument(metavar="BUNDLE", help="Bundle; the one that ships with d2m.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Images = Annotated[int, typer.Option("-n", "--n", help="Number of images.")]
TopK = Annotated[int | None, typer.Option(help="Experts per token.")]
TopKSteps = Annotated[
    Any,
    typer.Option(
        metavar="K[,K...]", parser=knob, help="Experts per token; or one number a step: 2,2,1."
    ),
]
Kappa = Annotated[int | None, typer.Option(help="Blocks that a group keeps.")]
KappaSteps = Annotated[
    Any,
    typer.Option(
        metavar="N[,N...]", parser=knob, help="Blocks that a group keeps; or one number a step."
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="Recipe file (JSON), in place of a preset.")
]
Precision = Annotated[
    str | None, typer.Option(help="float32 or bfloat16, in place of the recipe's.")
]
OffloadActivations = Annotated[
    bool, typer.Option("--offload-activations", help="Keep those inputs in main memory.")
]


def numbers_option(help: str) -> Any:
    """An option of whole numbers with commas."""
    return typer.Option(metavar="N[,N...]", parser=numbers, help=help)
