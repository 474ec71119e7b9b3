"""d2m inspect: what a checkpoint or a bundle holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2m.cli import options
from d2m.cli.terminal import print_json, print_table


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="Sparse pipeline or bundle directory.")
    ],
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT", help="Show the blocks run per group and step for this prompt."
        ),
    ] = None,
    steps: options.Steps = None,
    kappa: options.KappaSteps = None,
    backend: options.Backend = "auto",
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the contents of a sparse pipeline or a bundle.

    Of a bundle also the GPUs that its plans need.
    With --schedule PROMPT, the blocks that a bundle's groups run in each step, where routers read
    no tokens (alpha 0) and so all steps are known in advance.
    """
    if schedule is not None:
        from runtime.inspect.block_table import columns
        from runtime.inspect.block_table import schedule as blocks
        from runtime.pipeline import Pipeline

        answer = blocks(Pipeline(path, backend, mode="blocks"), schedule, steps=steps, kappa=kappa)
        print_json(answer) if json_ else print_table(f"{path}: {schedule}", *columns(answer))
        return
    from runtime.inspect.directory import inspect as function
    from runtime.inspect.directory import lines

    answer = function(path)
    print_json(answer) if json_ else print("\n".join(lines(answer)))
