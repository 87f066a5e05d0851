"""All quick benchmarks in one table (about a minute), or the long one.

python -m benchmarks
python -m benchmarks million [REQUESTS]
"""

import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from benchmarks import Figure, engine_steps, fair_plan, million, sim_steps, staggered_decision

QUICK: list[Callable[[], list[Figure]]] = [
    sim_steps.figures,
    engine_steps.figures,
    staggered_decision.figures,
    fair_plan.figures,
]
MARKS = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}


def measured(arguments: list[str]) -> list[Figure]:
    if arguments[:1] == ["million"]:
        return million.figures(int(arguments[1])) if arguments[1:] else million.figures()
    return [figure for figures in QUICK for figure in figures()]


def main(arguments: list[str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table("what", "case", "figure", "target", "", title="Headway, speed (CPU time of one core)")
    with console.status("measuring …"):
        for figure in measured(arguments):
            table.add_row(figure.what, figure.case, figure.figure, figure.target, MARKS[figure.met])
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
