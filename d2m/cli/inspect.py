"""d2m inspect: what a checkpoint or a bundle holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2m.cli import options
from d2m.cli.terminal import print_json, print_table


def inspect(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint or bundle.")],
    schedule: Annotated[
        str | None,
        typer.Option(metavar="PROMPT", help="Show the blocks run per group and step for it."),
    ] = None,
    steps: options.Steps = None,
    kappa: options.KappaSteps = None,
    backend: options.Backend = "auto",
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a sparse checkpoint or a bundle holds.

    Of a bundle also what machine its plans need.
    With --schedule PROMPT, which blocks a bundle's groups run in each step, where that is known
    before the first step (alpha 0).
    """
    if schedule is not None:
        from runtime.inspect.block_table import columns, forecast_table
        from runtime.pipeline import Pipeline

        pipeline = Pipeline(path, backend, mode="blocks")
        answer = forecast_table(pipeline, schedule, steps=steps, kappa=kappa)
        print_json(answer) if json_ else print_table(f"{path}: {schedule}", *columns(answer))
        return
    from runtime.inspect.directory import inspect as function
    from runtime.inspect.directory import summary_lines

    answer = function(path)
    print_json(answer) if json_ else print("\n".join(summary_lines(answer)))
