"""Many requests through one gateway: does its memory grow, is an answer lost, does a counter stay behind?

    python -m benchmarks.soak --requests 200000

`headway serve` before two stand-in engines, each in a process of its own; JSON and streams in turn, some
clients leave, some engines' answers are errors, and some clients cut their connection in the head, in a body
of a megabyte, while they wait or in the middle of a stream. Every answer is compared with what the engine
must have said. Shows the gateway's resident memory along the way and its slope; fails when an answer is
wrong, a request went to the engines more often than it had reason to, a gauge is not zero in the end, or
memory grew by more than `MOST_GROWTH_BYTES` after the first quarter.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.children import Gateway, allow_open_files, cpu_s, gateway, gauges, mock_engines, rss_bytes
from benchmarks.http_client import Client
from benchmarks.mock_engine import answer

TOKENS, PROMPT_BYTES = 8, 400
LEAVE_S, SETTLE_S = 0.02, 10.0
#: Where memory is looked at, as shares of all requests: a cold gateway grows, so the first 5% do not count.
MARKS = (0.05, 0.25, 0.5, 0.75, 1.0)
STAGES = ("head", "body", "waiting", "streaming")
CUT_BODY_BYTES, MOST_GROWTH_BYTES = 1 << 20, 24 << 20


class Mark(NamedTuple):
    """The gateway after so many requests. `cpu_s`, `wall_s`: since the start of the load."""

    requests: int
    rss_bytes: int
    cpu_s: float
    wall_s: float


class Soak:
    """The load: a closed loop of `clients` clients, each sending the next of `requests` requests."""

    def __init__(self, given: argparse.Namespace, front: Gateway) -> None:
        self._given = given
        self._front = front
        self._client = Client(front.url)
        self._rng = random.Random(given.seed)
        self._left = given.requests
        self._done = 0
        self.seen: Counter[str] = Counter()
        self.marks: list[Mark] = []

    async def run(self) -> None:
        """Send all of them."""
        self._began_s, self._cpu_s = time.monotonic(), cpu_s(self._front.pid)
        self._wanted = [round(share * self._given.requests) for share in MARKS]
        await asyncio.gather(*(self._send() for _ in range(self._given.clients)))

    async def _send(self) -> None:
        while self._left:
            self._left -= 1
            stream = self._rng.random() < self._given.streams
            prompt = f"{self._left} ".ljust(PROMPT_BYTES, "x")
            body: dict[str, Any] = {"model": "mock", "messages": [{"role": "user", "content": prompt}]}
            body |= {"max_tokens": TOKENS, "stream": stream}
            request = self._client.request("POST", "/v1/chat/completions", orjson.dumps(body))
            if self._rng.random() < self._given.cut:
                await self._cut(self._rng.choice(STAGES))
            elif self._rng.random() < self._given.leave:
                await self._client.ask_and_leave(request, self._rng.uniform(0.0, LEAVE_S))
                self.seen["left"] += 1
            else:
                await self._ask(request, stream=stream)
            self._count()

    async def _cut(self, stage: str) -> None:
        """Send a request whose connection is cut at a stage."""
        size = CUT_BODY_BYTES if stage in ("head", "body") else PROMPT_BYTES
        body = {"model": "mock", "messages": [{"role": "user", "content": "x" * size}], "max_tokens": TOKENS}
        body["stream"] = stage == "streaming"
        request = self._client.request("POST", "/v1/chat/completions", orjson.dumps(body))
        head_bytes = request.index(b"\r\n\r\n")
        if stage == "head":
            await self._client.cut(request[: self._rng.randrange(head_bytes)], LEAVE_S / 10)
        elif stage == "body":
            await self._client.cut(request[: self._rng.randrange(head_bytes + 4, len(request))], LEAVE_S)
        elif stage == "waiting":
            await self._client.cut(request, self._rng.uniform(0.0, LEAVE_S / 10))
        else:
            await self._client.ask_and_leave(request, SETTLE_S)
        self.seen[f"cut: {stage}"] += 1

    async def _ask(self, request: bytes, *, stream: bool) -> None:
        got = await self._client.ask(request)
        if got.status != 200:
            self.seen[f"status {got.status}"] += 1
        else:
            right = got.whole and got.body == answer(TOKENS, stream=stream)
            self.seen["right" if right else "wrong"] += 1

    def _count(self) -> None:
        self._done += 1
        if self._done in self._wanted:
            pid = self._front.pid
            used_s, wall_s = cpu_s(pid) - self._cpu_s, time.monotonic() - self._began_s
            self.marks.append(Mark(self._done, rss_bytes(pid), used_s, wall_s))
            print(f"{self._done} requests, {rss_bytes(pid) / 2**20:.1f} MiB", file=sys.stderr, flush=True)


async def settled(client: Client) -> dict[str, float]:
    """Wait until the gateway says that nothing is under way; return its gauges, at the latest after a
    while.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + SETTLE_S
    while True:
        seen = gauges((await client.get("/metrics")).body.decode())
        if not any(seen.values()) or loop.time() > deadline_s:
            return seen
        await asyncio.sleep(0.1)


async def measure(
    given: argparse.Namespace, front: Gateway, engines: Sequence[str]
) -> tuple[Soak, dict[str, float], Counter[str]]:
    """Return the load that was, the gauges after it, and what the engines counted."""
    soak = Soak(given, front)
    await soak.run()
    client = Client(front.url)
    left = await settled(client)
    loads: Counter[str] = Counter()
    for url in engines:
        loads.update(json.loads((await Client(url).get("/load")).body))
    return soak, left, loads


def slope_bytes(marks: Sequence[Mark]) -> float:
    """Return the memory that a request leaves behind, by least squares."""
    return float(np.polyfit([mark.requests for mark in marks], [mark.rss_bytes for mark in marks], 1)[0])


def faults(soak: Soak, left: dict[str, float], loads: Counter[str], requests: int) -> list[str]:
    """Say what is wrong."""
    said = [f"{name} is {value:g} in the end" for name, value in left.items() if value]
    if not left:
        said.append("the gateway shows no gauges")
    if loads["under_way"]:
        said.append(f"{loads['under_way']} requests are at the engines in the end")
    grown = soak.marks[-1].rss_bytes - soak.marks[1].rss_bytes
    if grown > MOST_GROWTH_BYTES:
        said.append(f"memory grew by {grown / 2**20:.1f} MiB after the first quarter")
    if soak.seen["wrong"]:
        said.append(f"{soak.seen['wrong']} answers were wrong or broken")
    most = requests + loads["errors"]  # only an engine's error is a reason to ask again
    if loads["posts"] > most:
        said.append(f"the engines were asked {loads['posts']} times, at most {most} were due")
    return said


def show(soak: Soak, left: dict[str, float], loads: Counter[str]) -> None:
    """Print the table."""
    table = Table("requests", "memory", "CPU per request", "requests/s", title="Headway, soak: the gateway")
    for mark in soak.marks:
        per_request_us = f"{1e6 * mark.cpu_s / mark.requests:.0f} µs"
        rate = f"{mark.requests / mark.wall_s:,.0f}"
        table.add_row(f"{mark.requests:,}", f"{mark.rss_bytes / 2**20:.1f} MiB", per_request_us, rate)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    marks = soak.marks
    console.print(f"slope: {slope_bytes(marks):+.2f} bytes a request over all marks")
    if len(marks) > 3:
        console.print(f"       {slope_bytes(marks[-3:]):+.2f} bytes a request over the last half")
    console.print("clients:", ", ".join(f"{n:,} {what}" for what, n in sorted(soak.seen.items())))
    console.print("engines:", ", ".join(f"{n:,} {what}" for what, n in loads.items()))
    console.print("gauges in the end:", "all zero" if left and not any(left.values()) else left)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--clients", type=int, default=64, help="requests at once")
    parser.add_argument("--streams", type=float, default=0.5, help="share of streams")
    parser.add_argument("--leave", type=float, default=0.05, help="share of clients that leave")
    parser.add_argument("--cut", type=float, default=0.1, help="share of connections that are cut")
    parser.add_argument("--errors", type=float, default=0.01, help="share of the engines' answers")
    parser.add_argument("--policy", default="staggered")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    return parser.parse_args()


def main() -> None:
    """Run it."""
    given = options()
    allow_open_files(4 * given.clients + 256)
    pace = ("--errors", str(given.errors), "--gap-ms", "1")
    with mock_engines(2, *pace) as engines, gateway(engines, given.policy) as front:
        soak, left, loads = uvloop.run(measure(given, front, engines))
    show(soak, left, loads)
    if given.out is not None:
        marks = [mark._asdict() for mark in soak.marks]
        told = {"marks": marks, "clients": soak.seen, "engines": loads, "gauges": left}
        given.out.write_text(json.dumps(told, indent=1))
    wrong = faults(soak, left, loads, given.requests)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
