"""d2m plan and d2m doctor: what a model takes before it is made, and what this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from d2m.cli import options
from d2m.cli.options import numbers_option, option
from d2m.cli.terminal import print_json, print_table


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Dense or sparse pipeline directory, or a config of d2m's: flux-dev, qwen-image.",
        ),
    ],
    preset: Annotated[str | None, option("Recipe that ships with d2m: L, M, S or XS.")] = None,
    recipe: options.RecipeFile = None,
    blocks: Annotated[str | None, option("Count a model of fewer blocks, e.g. 8D+38S.")] = None,
    height: options.Height = None,
    width: options.Width = None,
    text_tokens: Annotated[int | None, option("Text tokens.")] = None,
    top_k: options.TopK = None,
    gpus: Annotated[
        tuple | None, numbers_option("Numbers of GPUs to distil on, e.g. 1,8,32.")
    ] = None,
    gpu_memory: Annotated[float, option("GB of memory per GPU.")] = 80.0,
    rows_: Annotated[int, option("Batch size per GPU.", "--rows")] = 1,
    precision: options.Precision = None,
    gradient_checkpointing: Annotated[
        bool, option("Recompute activations in the backward pass.")
    ] = True,
    offload_activations: options.OffloadActivations = False,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Estimate MODEL before it is made: parameters, FLOPs, memory.

    Also whether this machine can convert it, export it and generate with it.
    With --gpus, the memory per GPU of distilling it by --preset or --recipe.
    """
    if gpus is not None:
        from d2m.plan.gpus import fits, fits_table, formula

        size: dict[str, Any] = {"height": height, "width": width, "text_tokens": text_tokens}
        memory: dict[str, Any] = {
            "precision": precision or "bfloat16",
            "rows": rows_,
            "checkpointing": gradient_checkpointing,
            "offload": offload_activations,
        }
        found = fits(model, gpus, gpu_memory, preset=preset, recipe=recipe, **memory, **size)
        if json_:
            print_json({"gpus": found, "formula": formula()})
            return
        print_table(*fits_table(found))
        print("\n" + formula())
        return
    from d2m.plan.count import plan as function
    from d2m.plan.fits_here import needs, needs_table
    from d2m.plan.machine import machine
    from d2m.plan.tables import conclusion, table

    size = {"height": height, "width": width, "text_tokens": text_tokens, "top_k": top_k}
    answer = function(model, preset=preset, recipe=recipe, blocks=blocks, **size)
    # Models of fewer blocks are counted, but nothing converts or exports them.
    rows = [] if blocks else needs(model, machine(), preset=preset, recipe=recipe, **size)
    if json_:
        print_json({**answer, "needs": rows})
        return
    print_table(*table(answer))
    print(conclusion(answer))
    if rows:
        print_table(*needs_table(rows))


def doctor(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory whose disk is checked.")
    ] = Path("."),
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check the installation, the hardware, and which models fit this machine."""
    from d2m.plan.doctor import MODEL, PRESET, lines
    from d2m.plan.doctor import doctor as function
    from d2m.plan.fits_here import needs_table
    from runtime.program.backends import MODULES

    answer = function(str(path), MODULES)
    if json_:
        print_json(answer)
        return
    print("\n".join(lines(answer)))
    print(f"{MODEL} with preset {PRESET} (another: d2m plan MODEL --preset S):")
    print_table(*needs_table(answer["stages"]))
    print("\n".join(f"advice: {sentence}" for sentence in answer["advice"]))
