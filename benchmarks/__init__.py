"""Speed. `python -m benchmarks` runs the quick ones; each runs by itself as `python -m benchmarks.sim_steps`.

Times are CPU time of this process, the best of a few runs, so that a busy machine blurs them less.
"""

import time
from collections.abc import Callable
from typing import NamedTuple


class Figure(NamedTuple):
    """One line of the table: what was measured, in which case, what came out, what was aimed at."""

    what: str
    case: str
    figure: str
    target: str = ""
    met: bool | None = None


def cpu_s(work: Callable[[], object], runs: int = 5) -> float:
    """Return the CPU seconds of one call of `work`, the best of `runs`."""
    best_s = float("inf")
    for _ in range(runs):
        started_s = time.process_time()
        work()
        best_s = min(best_s, time.process_time() - started_s)
    return best_s


def show(figures: list[Figure]) -> None:
    """Print figures as plain lines."""
    for figure in figures:
        aim = f"   (target {figure.target})" if figure.target else ""
        print(f"{figure.what:22} {figure.case:52} {figure.figure}{aim}")
