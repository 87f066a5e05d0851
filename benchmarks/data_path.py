"""What the gateway costs a request and an SSE chunk, beside other routers, in one run.

    python -m benchmarks.data_path --harness ../shared/bench --vllm-router PATH --smg PATH

The harness is a folder of two files that are no part of this project: `mock.c`, an OpenAI-compatible engine
of one epoll loop, and `load.py`, a raw-socket client that reports latencies and the CPU time of given
processes. Method: two engines and the client on core 0, the router alone on core 1, round robin, logging
warnings only; the routers in turn, several rounds, so that a noisy minute hits them all. Five cases:

JSON           8 connections                                                CPU per request
SSE            8 connections, 32 chunks back to back                        CPU per request
SSE at 10 ms   64 streams, a chunk each 10 ms                               CPU per chunk
added          1 connection, JSON: median latency less that of the engine   ms
stall          1 connection, SSE: TTFB p99, and the slowest whole answer    ms (delayed ACKs show as 40 ms)

CPU time is what compares; wall time of a shared machine is noise. Rows tell the least and the median of the
rounds, and the ratio of medians to `vllm-router`.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import children

CHUNKS, PACE_US = 32, 10_000
CLIENT_CORE, ROUTER_CORE = 0, 1
#: The peers, and how they start apart from the flags they share.
PEERS = {"vllm-router": ((), "warning"), "smg": (("launch",), "warn")}
#: Routers listen before they have looked at their engines.
SOUND_ANSWERS = 20


class Case(NamedTuple):
    """One column: how it is measured, and how a figure is read off what the client reports."""

    name: str
    unit: str
    paced: bool
    load: tuple[str, ...]
    read: Callable[[dict[str, Any]], float]


def _cpu_us(told: dict[str, Any]) -> float:
    return float(told["cpu_us_per_req"])


def _cpu_us_per_chunk(told: dict[str, Any]) -> float:
    return float(told["cpu_us_per_req"] / told["ev_per_req"])


CASES = (
    Case("JSON", "µs", False, ("--conc", "8"), _cpu_us),
    Case("SSE, 32 chunks", "µs", False, ("--conc", "8", "--stream"), _cpu_us),
    Case("chunk at 10 ms", "µs", True, ("--conc", "64", "--stream"), _cpu_us_per_chunk),
    Case("added p50", "ms", False, ("--conc", "1"), lambda told: float(told["lat_ms"]["p50"])),
    Case("TTFB p99", "ms", False, ("--conc", "1", "--stream"), lambda told: float(told["ttfb_ms"]["p99"])),
    Case("slowest", "ms", False, ("--conc", "1", "--stream"), lambda told: float(told["lat_ms"]["max"])),
)
ADDED = next(case for case in CASES if case.name == "added p50")

#: router → case → a value per round
Results = dict[str, dict[str, list[float]]]


# Engines and routers


@contextmanager
def mocks(binary: Path, pace_us: int) -> Iterator[list[int]]:
    """Run two engines; yields their ports."""
    with ExitStack() as stack:
        ports = [free_port() for _ in range(2)]
        for port in ports:
            command = [str(binary), str(port), str(CHUNKS), str(pace_us), str(pace_us)]
            stack.enter_context(children.child(command, before=on_core(CLIENT_CORE)))
        for port in ports:
            children.wait_for(partial(answers, port), "mock.c")
        yield ports


@contextmanager
def router(name: str, program: str | None, engines: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Run a router before the engines; yields its port and its processes. Without a program it is ours."""
    urls = [f"http://127.0.0.1:{port}" for port in engines]
    if program is not None:
        with peer(name, program, urls) as found:
            yield found
        return
    with children.gateway(urls, "round-robin", before=on_core(ROUTER_CORE)) as front:
        yield int(front.url.rpartition(":")[2]), children.family(front.pid)


@contextmanager
def peer(name: str, program: str, urls: Sequence[str]) -> Iterator[tuple[int, list[int]]]:
    """Run another router."""
    verb, level = PEERS[name]
    port, numbers = free_port(), free_port()
    command = [program, *verb, "--worker-urls", *urls, "--policy", "round_robin", "--log-level", level]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(numbers)]
    with (
        tempfile.TemporaryFile("w+") as log,
        children.child(command, stdout=log, before=on_core(ROUTER_CORE)) as process,
    ):
        children.wait_for(lambda: all(answers(port) for _ in range(SOUND_ANSWERS)), name, process)
        yield port, children.family(process.pid)


def on_core(core: int) -> Callable[[], None]:
    """Return what binds a new process to a core."""
    return partial(os.sched_setaffinity, 0, {core})


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether a chat is answered there."""
    body = json.dumps({"model": "mock", "messages": [{"role": "user", "content": "x"}]}).encode()
    headers = {"Content-Type": "application/json"}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


# Measuring


class Bench:
    """The harness, compiled, and for how long each case is measured."""

    def __init__(self, harness: Path, binary: Path, seconds: float) -> None:
        self.binary = binary
        self._client = harness / "load.py"
        self._seconds = seconds

    def load(self, port: int, options: Sequence[str], pids: Sequence[int] = ()) -> dict[str, Any]:
        """Run the client once; return what it reports. Raises SystemExit when a request failed."""
        command = [sys.executable, str(self._client), "--port", str(port), "--secs", str(self._seconds)]
        command += [*options, "--pids", ",".join(map(str, pids))]
        done = subprocess.run(
            command, preexec_fn=on_core(CLIENT_CORE), stdout=subprocess.PIPE, text=True, check=True
        )
        told: dict[str, Any] = json.loads(done.stdout)
        if told["err"] or not told["n"]:
            raise SystemExit(f"{told['err']} of {told['n']} requests failed: {done.stdout}")
        return told

    def measure(self, name: str, program: str | None) -> dict[str, float]:
        """Return a figure for each case. A router is started anew for the paced engines."""
        figures: dict[str, float] = {}
        for paced in (False, True):
            cases = [case for case in CASES if case.paced is paced]
            with mocks(self.binary, PACE_US if paced else 0) as engines:
                direct_ms = 0.0 if paced else ADDED.read(self.load(engines[0], ADDED.load))
                with router(name, program, engines) as (port, pids):
                    reports = {
                        options: self.load(port, options, pids)
                        for options in dict.fromkeys(case.load for case in cases)
                    }
            figures |= {case.name: case.read(reports[case.load]) for case in cases}
            if not paced:
                figures[ADDED.name] -= direct_ms
        return figures


def compiled(harness: Path, folder: Path) -> Path:
    """Compile `mock.c`. Raises SystemExit when the harness or a compiler is missing."""
    source, binary = harness / "mock.c", folder / "mock"
    if not source.is_file() or not (harness / "load.py").is_file():
        raise SystemExit(f"{harness}: no mock.c and load.py there (--harness)")
    if shutil.which("gcc") is None:
        raise SystemExit("gcc is needed to compile mock.c")
    subprocess.run(["gcc", "-O2", "-w", "-o", str(binary), str(source)], check=True)
    return binary


# What is shown


def table(results: Results) -> Table:
    """A row for each router: least..median, and the ratio of medians to `vllm-router`."""
    drawn = Table("router", title="Headway, data path: CPU of the router, and latency with one client")
    for case in CASES:
        drawn.add_column(f"{case.name}, {case.unit}", justify="right")
    base = results.get("vllm-router")
    for name, by_case in results.items():
        cells = []
        for case in CASES:
            cell = spread(by_case[case.name])
            if base is not None and name != "vllm-router":
                cell += f" ({ratio(by_case[case.name], base[case.name])})"
            cells.append(cell)
        drawn.add_row(name, *cells)
    return drawn


def spread(values: Sequence[float]) -> str:
    """Return least..median."""
    digits = 0 if min(values) >= 100 else 1 if min(values) >= 10 else 2
    least, median = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values)))
    return least if least == median else f"{least}..{median}"


def ratio(values: Sequence[float], base: Sequence[float]) -> str:
    """Return how many times the base's median it is."""
    of = statistics.median(base)
    return f"{statistics.median(values) / of:.2f}×" if of > 0 else "–"


# The run


def found(given: argparse.Namespace) -> dict[str, str | None]:
    """Return the routers to measure with their programs; ours has none."""
    programs: dict[str, str | None] = {"headway": None}
    said = {"vllm-router": given.vllm_router, "smg": given.smg}
    for name in PEERS:
        below = sorted(given.peers.glob(f"**/bin/{name}")) if given.peers is not None else []
        program = said[name] or next(map(str, below), None) or shutil.which(name)
        if program is not None:
            programs[name] = str(program)
    return programs


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_path", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--harness", type=Path, default=Path("../shared/bench"), help="mock.c and load.py")
    parser.add_argument("--vllm-router", type=Path, help="the program (default: on the PATH)")
    parser.add_argument("--smg", type=Path, help="the program (default: on the PATH)")
    parser.add_argument("--peers", type=Path, help="a folder below which to look for both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--secs", type=float, default=4.0, help="per case")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure all routers in turn, round by round."""
    given = options()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed: one for the router, one for the rest")
    programs = found(given)
    results: Results = {name: {case.name: [] for case in CASES} for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.harness, compiled(given.harness, Path(folder)), given.secs)
        for number in range(given.rounds):
            for name, program in programs.items():
                print(f"round {number + 1} of {given.rounds}: {name}", file=sys.stderr, flush=True)
                for case, value in bench.measure(name, program).items():
                    results[name][case].append(value)
    Console(width=None if sys.stdout.isatty() else 170).print(table(results))
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
