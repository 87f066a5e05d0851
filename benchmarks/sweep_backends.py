"""The same simulations in processes and on Ray: wall time, and with one worker killed half-way.

    .venv-ray/bin/python -m benchmarks.sweep_backends [--simulations 200] [--requests 2000] [--workers 2]

DeepSeek-V3 with prefill and decode apart, Azure conversations, four policies at five loads, as many seeds as
it takes (`make test-ray` prepares .venv-ray). Each backend runs them twice: left alone, and with the process
of one worker killed (SIGKILL) when half of them are done. A start-up is the time until the first simulations
are under way; a Ray of its own is started anew for each run. Whatever happens, all results must be equal, or
this ends with an error.
"""

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import headway
from benchmarks import Figure, show

POLICIES = ["staggered", "triage", "least-tokens", "round-robin"]
LOADS = [0.2, 0.4, 0.6, 0.8, 1.0]


class Watch:
    """Follows a sweep: when its first simulations were under way, and `kill` once half of them are done."""

    def __init__(self, kill: Callable[[], None] | None) -> None:
        self._kill = kill
        self._began_s = time.perf_counter()
        self.start_s: float | None = None

    def __call__(self, done: int, total: int) -> None:
        """Take what a sweep says of its progress."""
        if self.start_s is None:
            self.start_s = time.perf_counter() - self._began_s
        if self._kill and 2 * done >= total:
            kill, self._kill = self._kill, None
            kill()

    @property
    def killed(self) -> bool:
        """Whether the kill is done, or was never wanted."""
        return self._kill is None


def kill_process() -> None:
    """Kill a worker process: every one of them has a job, but for the moment between two."""
    pid = multiprocessing.active_children()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def kill_ray_worker() -> None:
    """Kill a process of our own Ray that runs a job, as Ray's name for it says."""
    while not (busy := [pid for pid in family(os.getpid()) if "_attempt_there" in name(pid)]):
        pass
    os.kill(busy[0], signal.SIGKILL)


def family(pid: int) -> list[int]:
    """Return the ids of all processes under one; those that end meanwhile are left out."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += map(int, task.read_text().split())
        except OSError:
            continue
    return [*children, *(each for child in children for each in family(child))]


def name(pid: int) -> str:
    """Return what a process calls itself, nothing when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


KILLS = {"processes": kill_process, "ray": kill_ray_worker}


def sweep(
    backend: str, options: dict[str, object], *, kill: bool
) -> tuple[list[dict[str, object]], Watch, float]:
    """Run the simulations. Returns what must not depend on the backend, the watch, and the wall time in s."""
    watch = Watch(KILLS[backend] if kill else None)
    began_s = time.perf_counter()
    result = headway.compare(**options, backend=backend, progress=watch)  # type: ignore[arg-type]
    wall_s = time.perf_counter() - began_s
    if not watch.killed:
        raise SystemExit(f"{backend}: no worker was killed")
    rows = [{name: value for name, value in row.items() if name != "wall_s"} for row in result.rows()]
    return rows, watch, wall_s


def figures(simulations: int, requests: int, workers: int, backends: list[str]) -> list[Figure]:
    seeds, rest = divmod(simulations, len(POLICIES) * len(LOADS))
    if rest or not seeds:
        raise SystemExit(f"--simulations must be a multiple of {len(POLICIES) * len(LOADS)}")
    options: dict[str, object] = {
        "workload": "azure-conv",
        "policies": POLICIES,
        "load": LOADS,
        "seeds": seeds,
        "requests": requests,
        "workers": workers,
    }
    made, expected = [], None
    for backend in backends:
        for kill in (False, True):
            rows, watch, wall_s = sweep(backend, options, kill=kill)
            expected = expected or rows
            if rows != expected:
                raise SystemExit(f"{backend}, killed: {kill}: results differ from those of {backends[0]}")
            case = f"{simulations} simulations of {requests:,} requests, {workers} at a time" + (
                ", one worker killed half-way" if kill else ""
            )
            start_s = watch.start_s or 0.0
            rate = simulations / (wall_s - start_s)
            text = f"{wall_s:.1f} s, of it {start_s:.1f} s to start; {rate:.2f} simulations/s; results equal"
            made.append(Figure(backend, case, text))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Processes against Ray, on the same simulations.")
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--backends", default="processes,ray")
    given = parser.parse_args()
    show(figures(given.simulations, given.requests, given.workers, given.backends.split(",")))


if __name__ == "__main__":
    main()
