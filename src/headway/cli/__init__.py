"""The command line: `headway serve | epp | emulate | demo | compare | capacity | policies | presets | …`."""

import sys
from typing import Annotated

import typer

from headway import __version__
from headway.cli import emulate, epp, serve, simulate, sweep
from headway.cli.console import OneLineErrors

__all__ = ["app", "main"]

app = typer.Typer(
    name="headway",
    cls=OneLineErrors,
    help=(
        "Schedule LLM serving: staggered batches, FairBatching and triage, against every baseline.\n\n"
        "Start with [bold]headway demo[/] (simulated) or [bold]headway serve[/] (real, on emulated engines); "
        "then [bold]headway compare --help[/]."
    ),
    epilog="Policies: headway policies · Clusters: headway presets · Results go to JSON, HTML and Perfetto.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headway {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Take the options that come before a command."""


app.command(context_settings=serve.OTHER_FLAGS)(serve.serve)
for command in (
    epp.epp,
    emulate.emulate,
    simulate.demo,
    simulate.compare,
    simulate.capacity,
    sweep.sweep,
    simulate.policies,
    simulate.presets,
    simulate.calibrate,
):
    app.command()(command)


def main() -> None:
    """Run the command line. Policies of one's own are looked for in the working directory first."""
    sys.path.insert(0, "")
    app(prog_name="headway")
