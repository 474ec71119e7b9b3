"""The command line: every command parses, calls one function and prints what it returned.

A file a group of commands: convert (convert, lora), plan (plan, doctor), export, run (run,
measure), serve, judge (eval, bench, parity), inspect, sign (keygen, sign, verify). options holds
what several commands share, prompts the files that run reads and writes, terminal what a person
reads, progress the bars and lines of long phases.

Only these files import calib, export and runtime sideways, inside the command bodies, so that
`d2m run` and `d2m inspect` work on the base install and `d2m --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from d2m.cli import convert, export, inspect, judge, plan, run, serve, sign
from d2m.cli.terminal import explain, quiet_libraries, say
from d2m.distill.stopping import terminated_on_signal

app = typer.Typer(
    name="d2m",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    *(convert.convert, convert.lora, plan.plan, plan.doctor, export.export, run.run, run.measure),
    *(serve.serve, judge.evaluate, judge.bench, judge.parity, inspect.inspect),
    *(sign.keygen, sign.sign, sign.verify),
):
    app.command("eval" if command is judge.evaluate else None)(command)


def show_version(wanted: bool) -> None:
    """Print d2m's version and end."""
    if wanted:
        from d2m import __version__

        print(f"d2m {__version__}")
        raise typer.Exit


@app.callback()
def d2m(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Dense2MoE: a dense diffusion transformer becomes a sparse one that runs without torch."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 bad input, 130 Ctrl-C, 143 SIGTERM, 1 our fault.

    The command is invoked without typer's own `main`, which would swallow what a KeyboardInterrupt
    has to say (where a conversion stopped and how it continues).
    """
    # Threads that wait take no core from who computes: read by OpenMP when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us: nobody reads, the work is done
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if "--debug" not in arguments:
        quiet_libraries()
    try:
        group = typer.main.get_command(app)
        if "_D2M_COMPLETE" in os.environ:  # a shell asks how a line may continue
            group.main(arguments, prog_name="d2m")
        with group.make_context("d2m", arguments.copy()) as context, terminated_on_signal():
            group.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as done:  # --help, or a comparison that failed
        return done.exit_code
    except BrokenPipeError:  # `d2m inspect DIR | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            raise
        from d2m.distill.processes import final_error

        ending, speaks = final_error(error)
        sentence, code = explain(ending, resumes=arguments[0] == "convert")
        if speaks:
            say(sentence if isinstance(ending, KeyboardInterrupt) else f"error: {sentence}")
        return code
