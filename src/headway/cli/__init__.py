"""The command line: `headway serve | epp | emulate | demo | compare | capacity | policies | presets | …`."""

import sys

import typer

from headway.cli import emulate, epp, serve, simulate, sweep

__all__ = ["app", "main"]

app = typer.Typer(
    name="headway",
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
