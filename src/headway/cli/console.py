"""How the command line talks: options, one line for an error, a progress bar, where things are printed.

Errors of the user's are one red line on stderr and exit status 2.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
import typer.core
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from headway.core.errors import ConfigError, HeadwayError

__all__ = ["Bar", "OneLineErrors", "friendly", "option", "plain_table", "port_number", "stderr", "stdout"]


def option(text: str, panel: str, *names: str, metavar: str | None = None) -> Any:
    """Declare an option: its help, the panel it is in, its names where not the parameter's."""
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)


def port_number(text: str | int) -> int:
    """Return a port from the command line. Raises typer.BadParameter, which names the option."""
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise typer.BadParameter(f"{text!r} is not a port (0 to 65535)")
    return port


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors made on purpose into one line, and Ctrl-C into exit status 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HeadwayError as error:
            stderr().print(
                f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False, emoji=False
            )
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
        except KeyboardInterrupt:
            stderr().print("interrupted")
            raise typer.Exit(130) from None

    return wrapped


#: What a wrong command line raises. Typer exports only the class that derives from it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class OneLineErrors(typer.core.TyperGroup):
    """A group of commands that reports a wrong command line as one line, as every other error."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command line. A usage error is one line that names the option, and exit status 2."""
        extra["standalone_mode"] = False
        try:
            result = super().main(*args, **extra)
        except _UsageError as error:
            if not standalone_mode:
                raise
            _report_usage(error)
            sys.exit(2)
        except typer.Abort:
            if not standalone_mode:
                raise
            stderr().print("interrupted")
            sys.exit(130)
        if standalone_mode:
            sys.exit(result if isinstance(result, int) else 0)
        return result


def _report_usage(error: Any) -> None:
    message = error.format_message().strip()
    if not message or "\n" in message:  # the help text, of a group that was called without a command
        stdout().print(message, markup=False)
        return
    stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False, emoji=False)


class Bar:
    """A progress bar on stderr with the time left, drawn only in a terminal, and only once work is under way.

    Drawing starts a thread; processes are best forked before there is one.
    """

    def __init__(self, unit: str) -> None:
        self.done = self.total = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=stderr(),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        self.done, self.total = done, total
        if self._progress.console.is_terminal and not self._progress.live.is_started:
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total)


def stdout() -> Console:
    """Return the console for results."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140, highlight=False)


def stderr() -> Console:
    """Return the console for errors and progress."""
    return Console(stderr=True, emoji=False)


def plain_table(title: str, *heads: str) -> Table:
    """Make an empty table with these heads."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head)
    return table
