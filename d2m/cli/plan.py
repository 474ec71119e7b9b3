"""d2m plan and d2m doctor: what a model takes before it is made, and what this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2m.cli import options
from d2m.cli.terminal import print_json, print_table


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Model directory, dense or sparse, or a shipped config: flux-dev, flux-schnell.",
        ),
    ],
    preset: Annotated[
        str | None, typer.Option(help="Recipe that comes with d2m for such a model: L, M, S or XS.")
    ] = None,
    recipe: options.RecipeFile = None,
    blocks: Annotated[
        str | None, typer.Option(help="Keep so many of the blocks, e.g. 8D+38S.")
    ] = None,
    height: options.Height = None,
    width: options.Width = None,
    text_tokens: Annotated[int | None, typer.Option(help="Length of the text.")] = None,
    top_k: options.TopK = None,
    gpus: Annotated[
        tuple | None, options.numbers_option("Numbers of GPUs to distil on, e.g. 1,8,32.")
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="GB of each of --gpus.")] = 80.0,
    rows_: Annotated[
        int, typer.Option("--rows", help="Samples of a batch, run at once on each of --gpus.")
    ] = 1,
    precision: options.Precision = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="With --gpus.")] = True,
    offload_activations: options.OffloadActivations = False,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Estimate MODEL before it is made: parameters, FLOPs, memory.

    Also what converting, exporting and generating need of this machine.
    With --gpus, what distilling it by --preset or --recipe takes of each of so many GPUs.
    """
    if gpus is not None:
        from d2m.plan.gpus import fits, fits_table, formula

        found = fits(
            model,
            gpus,
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
        Path, typer.Argument(metavar="DIR", help="Where files would be written.")
    ] = Path("."),
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what is installed and works, and what fits this machine."""
    from d2m.plan.doctor import doctor as function
    from d2m.plan.doctor import lines
    from d2m.plan.fits_here import needs_table
    from runtime.program.backends import MODULES

    answer = function(str(path), MODULES)
    if json_:
        print_json(answer)
        return
    print("\n".join(lines(answer)))
    print_table(*needs_table(answer["stages"]))
    print("\n".join(f"advice: {sentence}" for sentence in answer["advice"]))
