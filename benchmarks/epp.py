"""What a pick costs: Envoy alone and with the picker, in one run; and very many requests held at once.

    python -m benchmarks.epp --seconds 8 --concurrency 64
    python -m benchmarks.epp --held 10000

Stand-in engines that compute nothing, Envoy with one worker thread, `headway epp` in a process of its own, a
client that asks again as soon as it has its answer. CPU is of the processes, per request. "alone" is the same
Envoy without the picker, with its own least-request. Fails when a request is refused or an answer is wrong.
With --held everything is held until all have come, which a policy of this file sees to; a stream that was
shed, or a gauge that is not zero in the end, fails it.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import envoys
from benchmarks.children import HEADWAY, allow_open_files, child, cpu_s, family, mock_engines, rss_bytes
from benchmarks.envoys import envoy
from benchmarks.http_client import Client
from benchmarks.mock_engine import answer
from headway.cli.emulate import to_toml
from headway.core.cluster import PoolPolicy, PoolSettings
from headway.core.settings import setting

WARM_UP_S = 2.0
MORE_FILES = 4096
#: With --held, connections from Envoy to the engines: all are let go at once, and files are bounded.
TO_ENGINES = 4096


@dataclass(frozen=True, slots=True)
class CrowdSettings(PoolSettings):
    """How many make a crowd."""

    most: int = setting(10_000, "so many are held, then all are let go", unit="requests", at_least=1)


class Crowd(PoolPolicy):
    """Holds until so many are there, then lets all of them go."""

    Settings = CrowdSettings
    settings: CrowdSettings
    summary = "hold until there are many"

    def _place(self, now: float) -> None:
        if len(self.buffer) >= self.settings.most and self.ledger.ranks:
            for waiting in list(self.buffer.values()):
                rank = min(self.ledger.ranks, key=lambda each: each.requests)
                self._dispatch(waiting, rank, now, "all")


class Picker(NamedTuple):
    """A picker that runs."""

    pid: int
    port: int
    metrics_url: str


@contextmanager
def picker(
    engines: Sequence[str],
    policy: str,
    *,
    processors: int = 1,
    before: Callable[[], None] | None = None,
    **tables: Any,
) -> Iterator[Picker]:
    """Run `headway epp` before these engines, in plain text, logging warnings only."""
    server = {"host": "127.0.0.1", "grpc_port": 0, "grpc_health_port": 0, "models": ["mock"]}
    data = {
        "server": server | {"processors": processors},
        "metrics": {"host": "127.0.0.1", "port": 0},
        "instances": [{"name": f"engine-{n}", "url": url} for n, url in enumerate(engines)],
        "policy": {"cluster": policy},
        "logs": {"level": "warning", "access": False},
        "tls": {"mode": "off"},
    }
    with running(data | tables, before=before) as found:
        yield found


@contextmanager
def running(data: dict[str, Any], *, before: Callable[[], None] | None = None) -> Iterator[Picker]:
    """Run `headway epp` from a configuration as data."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "epp.toml"
        file.write_text(to_toml(data))
        command = (*HEADWAY, "epp", "--config", str(file))
        with child(command, stdout=subprocess.PIPE, before=before) as process:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                port, metrics = re.search(r"picks on \S+:(\d+)", said), re.search(r"metrics +(\S+)", said)
                if port is not None and metrics is not None:
                    yield Picker(process.pid, int(port[1]), metrics[1].removesuffix("/metrics"))
                    return
            raise SystemExit(f"headway epp did not start: {said}")


# What a pick costs


class Cost(NamedTuple):
    """Of one setting: requests per second, and CPU seconds per request of Envoy, of the picker's process that
    decides, and of its others together.
    """

    setting: str
    rps: float
    envoy_s: float
    picker_s: float | None
    others_s: float | None = None


async def load(url: str, given: argparse.Namespace, seconds: float) -> int:
    """Ask in a closed loop; return how many were answered. Raises SystemExit for a wrong answer."""
    client = Client(url)
    content = "x" * given.prompt_bytes
    body = {"model": "mock", "messages": [{"role": "user", "content": content}], "max_tokens": given.tokens}
    request = client.request("POST", "/v1/chat/completions", orjson.dumps(body | {"stream": True}))
    expected = answer(given.tokens, stream=True)
    end_s = time.monotonic() + seconds
    answered = 0

    async def one() -> None:
        nonlocal answered
        while time.monotonic() < end_s:
            got = await client.ask(request)
            if got.status != 200 or got.body != expected:
                raise SystemExit(f"status {got.status}: {got.body[:300]!r}")
            answered += 1

    await asyncio.gather(*(one() for _ in range(given.concurrency)))
    client.close()
    return answered


def cost(name: str, given: argparse.Namespace, front: envoys.Envoy, picks: Picker | None) -> Cost:
    """Warm up, then measure one setting."""
    uvloop.run(load(front.url, given, WARM_UP_S))
    others = family(picks.pid)[1:] if picks else []
    began_s, before_s = time.monotonic(), _used_s(front, picks, others)
    answered = uvloop.run(load(front.url, given, given.seconds))
    took_s = time.monotonic() - began_s
    envoy_s, picker_s, others_s = (
        (after - before) / answered
        for after, before in zip(_used_s(front, picks, others), before_s, strict=True)
    )
    return Cost(name, answered / took_s, envoy_s, picker_s if picks else None, others_s if others else None)


def _used_s(front: envoys.Envoy, picks: Picker | None, others: Sequence[int]) -> tuple[float, float, float]:
    return cpu_s(front.pid), cpu_s(picks.pid) if picks else 0.0, sum(map(cpu_s, others))


def costs(given: argparse.Namespace, engines: list[str]) -> Iterator[Cost]:
    """Measure Envoy alone, and with the picker accounting in each way."""
    config = envoys.load("override-host")
    envoys.cluster(config, "engines")["load_assignment"]["endpoints"][0]["lb_endpoints"] = envoys.endpoints(
        engines
    )
    alone = json.loads(json.dumps(config))
    envoys.without_picker(alone)
    known = envoys.cluster(alone, "engines")
    known.pop("load_balancing_policy")
    known["lb_policy"] = "LEAST_REQUEST"
    with envoy(alone) as front:
        yield cost("Envoy alone", given, front, None)
    if given.processors:
        with picker(engines, given.policy, processors=given.processors) as picks:
            asked = json.loads(json.dumps(config))
            envoys.before_picker(asked, picks.port)
            envoys.spread(asked, given.concurrency // 8)
            with envoy(asked) as front:
                yield cost(f"picker, access log, full, {given.processors} processes", given, front, picks)
    for by, name in (("access-log", "picker, access log"), ("response", "picker, answers pass by")):
        for bodies in ("FULL_DUPLEX_STREAMED", "BUFFERED"):
            with picker(engines, given.policy, accounting={"by": by}) as picks:
                asked = json.loads(json.dumps(config))
                envoys.before_picker(asked, picks.port)
                _set(asked, bodies, by)
                with envoy(asked) as front:
                    yield cost(f"{name}, {bodies.partition('_')[0].lower()}", given, front, picks)


def _set(config: dict[str, Any], bodies: str, by: str) -> None:
    modes = envoys.connections(config)["http_filters"][0]["typed_config"]["processing_mode"]
    modes["request_body_mode"] = bodies
    if bodies == "BUFFERED":
        modes["request_trailer_mode"] = "SKIP"
    if by == "response":
        modes |= {"response_header_mode": "SEND", "response_body_mode": "STREAMED"}
        envoys.connections(config).pop("access_log")


def show(rows: Sequence[Cost]) -> None:
    """Print the table."""
    table = Table("", "requests/s", "Envoy, CPU per request", "picker, who decides", "its other processes")
    for row in rows:
        cells = ["" if each is None else f"{1e3 * each:.2f} ms" for each in row[2:]]
        table.add_row(row.setting, f"{row.rps:.0f}", *cells)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


# Very many held


async def crowd(given: argparse.Namespace, front: envoys.Envoy, picks: Picker) -> dict[str, Any]:
    """Hold all, then let them go; return what is to be told."""
    client, watch = Client(front.url), Client(picks.metrics_url)
    empty = rss_bytes(picks.pid), rss_bytes(front.pid)
    full, held = empty, 0
    body = {"model": "mock", "messages": [{"role": "user", "content": "x" * given.prompt_bytes}]}
    request = client.request(
        "POST", "/v1/chat/completions", orjson.dumps(body | {"max_tokens": given.tokens, "stream": True})
    )
    expected = answer(given.tokens, stream=True)

    async def one() -> str:
        got = await client.ask(request)
        if got.status != 200:
            return f"status {got.status}"
        return "right" if got.body == expected else "wrong"

    began_s, began_cpu_s = time.monotonic(), cpu_s(picks.pid)
    asked = [asyncio.create_task(one()) for _ in range(given.held - 1)]
    while held < given.held - 1:
        if any(task.done() for task in asked):
            raise SystemExit(f"not held: {Counter(t.result() for t in asked if t.done())}")
        await asyncio.sleep(0.2)
        held = int((await gauges(watch))["headway_held_requests"])
    full = rss_bytes(picks.pid), rss_bytes(front.pid)
    held_s, held_cpu_s = time.monotonic(), cpu_s(picks.pid)
    seen = Counter(await asyncio.gather(*asked, one()))  # the last one lets all go
    done_s, done_cpu_s = time.monotonic(), cpu_s(picks.pid)
    left = {"": 1.0}
    for _ in range(100):
        left = await gauges(watch)
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    return {
        "requests": given.held,
        "picker_mib": [each / 2**20 for each in (empty[0], full[0], rss_bytes(picks.pid))],
        "envoy_mib": [each / 2**20 for each in (empty[1], full[1], rss_bytes(front.pid))],
        "took_in_s": held_s - began_s,
        "served_s": done_s - held_s,
        "picker_cpu_s": [held_cpu_s - began_cpu_s, done_cpu_s - held_cpu_s],
        "seen": dict(seen),
        "gauges": left,
    }


async def gauges(watch: Client) -> dict[str, float]:
    """Return what the picker says is under way."""
    text = (await watch.get("/metrics")).body.decode()
    names = r"headway_held_(?:requests|tokens|bytes)|headway_in_flight_requests|headway_picker_\w+"
    found = re.findall(rf"^({names}) (\S+)$", text, re.M)
    return {name: float(value) for name, value in found if "oddities" not in name}


def held(given: argparse.Namespace, engines: list[str]) -> None:
    """Run it and print what came out."""
    allow_open_files(given.held + TO_ENGINES + MORE_FILES)
    policy = f"benchmarks.epp:Crowd:most={given.held}"
    limits = {"limits": {"buffer_requests": 2 * given.held}}
    with picker(engines, policy, **limits) as picks:
        config = envoys.load("override-host")
        known = envoys.cluster(config, "engines")["load_assignment"]["endpoints"][0]
        known["lb_endpoints"] = envoys.endpoints(engines)
        engines_cluster = envoys.cluster(config, "engines")
        bounds = engines_cluster["circuit_breakers"]["thresholds"][0] | {"max_connections": TO_ENGINES}
        engines_cluster["circuit_breakers"] = {"thresholds": [bounds]}
        envoys.before_picker(config, picks.port)
        with envoy(config) as front:
            came = uvloop.run(crowd(given, front, picks))
    print(json.dumps(came, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(came, indent=1))
    if came["seen"] != {"right": given.held} or any(came["gauges"].values()):
        raise SystemExit("not all were served, or something is left")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epp", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each setting")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--prompt-bytes", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=32, help="events of an answer")
    parser.add_argument("--policy", default="least-requests")
    parser.add_argument(
        "--processors", type=int, help="also with so many processes before the one that decides"
    )
    parser.add_argument("--held", type=int, help="hold so many at once, in place of the costs")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    return parser.parse_args()


def main() -> None:
    """Run it."""
    given = options()
    with mock_engines(2) as engines:
        if given.held is not None:
            held(given, engines)
            return
        rows = list(costs(given, engines))
    show(rows)
    if given.out is not None:
        given.out.write_text(json.dumps([row._asdict() for row in rows], indent=1))


if __name__ == "__main__":
    main()
