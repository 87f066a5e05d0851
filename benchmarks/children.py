"""The processes that the data path's benchmarks start, watch and stop."""

import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from headway.cli.emulate import to_toml

HEADWAY = (sys.executable, "-c", "from headway.cli import main; main()")
START_S, STOP_S = 30.0, 10.0


class Gateway(NamedTuple):
    """A gateway that runs."""

    pid: int
    url: str
    admin_url: str


@contextmanager
def child(
    command: Sequence[str], *, stdout: int | IO[str] | None = None, before: Callable[[], None] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """Run a process; stop it in the end, by force if it must be. `before` runs in it first."""
    process = subprocess.Popen(list(command), stdout=stdout, text=True, preexec_fn=before)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@contextmanager
def mock_engines(count: int, *options: str) -> Iterator[list[str]]:
    """Run stand-in engines (`mock_engine.py`); yields their URLs."""
    with ExitStack() as stack:
        urls = []
        for seed in range(count):
            command = (sys.executable, "-m", "benchmarks.mock_engine", "--seed", str(seed), *options)
            process = stack.enter_context(child(command, stdout=subprocess.PIPE))
            assert process.stdout is not None
            urls.append(f"http://127.0.0.1:{int(process.stdout.readline())}")
        yield urls


@contextmanager
def gateway(
    engines: Sequence[str], policy: str, *, before: Callable[[], None] | None = None
) -> Iterator[Gateway]:
    """Run `headway serve` before these engines, with an admin side, logging warnings only."""
    data = {
        "server": {"port": 0, "models": ["mock"], "drain_timeout_s": 1.0},
        "admin": {"port": 0},
        "instances": [{"name": f"engine-{n}", "url": url} for n, url in enumerate(engines)],
        "policy": {"cluster": policy},
        "logs": {"level": "warning", "access": False},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gateway.toml"
        file.write_text(to_toml(data))
        command = (*HEADWAY, "serve", "--config", str(file))
        with child(command, stdout=subprocess.PIPE, before=before) as process:
            yield Gateway(process.pid, *_addresses(process))


@contextmanager
def headway_serve(data: Mapping[str, Any]) -> Iterator[str]:
    """Run `headway serve` from a configuration as data; yields its URL."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gateway.toml"
        file.write_text(to_toml(dict(data)))
        with child([*HEADWAY, "serve", "--config", str(file)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            found = re.search(r"serves on (\S+?):? ", process.stdout.readline())
            if found is None:
                raise SystemExit("headway serve did not start")
            yield found[1]


def _addresses(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Read the addresses off what it says when it is ready."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        url, admin = re.search(r"serves on (\S+?):? ", said), re.search(r"admin +(\S+)", said)
        if url is not None and admin is not None:
            return url[1], admin[1]
    raise SystemExit(f"headway serve did not start: {said}")


def wait_for(
    condition: Callable[[], bool], what: str, process: "subprocess.Popen[str] | None" = None
) -> None:
    """Wait for something outside to come true. Raises SystemExit when it does not, or its process ends."""
    deadline_s = time.monotonic() + START_S
    while not condition():
        if process is not None and process.poll() is not None:
            raise SystemExit(f"{what} ended with status {process.returncode}")
        if time.monotonic() > deadline_s:
            raise SystemExit(f"{what} did not come up within {START_S:g} s")
        time.sleep(0.05)


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]


def cpu_s(pid: int) -> float:
    """Return the CPU time a process has used, to 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(word) for task in tasks for word in task.read_text().split()]
    return [pid, *(each for one in children for each in family(one))]


def allow_open_files(wanted: int) -> None:
    """Raise the limit of open files for this process and its children. Raises SystemExit above the hard
    one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"{wanted} open files are needed, the hard limit is {hard}: raise it (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def gauges(exposition: str) -> dict[str, float]:
    """Return what the gateway says is under way: all zero when nothing is."""
    names = r"headway_held_(?:requests|tokens|bytes)|headway_in_flight_requests|headway_worker_legs\{.*\}"
    return {name: float(value) for name, value in re.findall(rf"^({names}) (\S+)$", exposition, re.M)}
