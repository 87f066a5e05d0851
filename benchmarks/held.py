"""Very many streams held at once: what each costs in memory, and that all are served when the engines return.

    python -m benchmarks.held --requests 10000

`headway serve` before two stand-in engines that are drained through the admin API: everything that comes is
held. When all are held the engines are taken back. Fails when a request is refused, an answer is wrong, or
a gauge is not zero in the end. Client and gateway need a socket for each request: mind `ulimit -Hn`.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.children import Gateway, allow_open_files, cpu_s, gateway, gauges, mock_engines, rss_bytes
from benchmarks.http_client import Client
from benchmarks.mock_engine import answer
from benchmarks.soak import settled

TOKENS, WARM_UP = 8, 500
#: Beside a socket for each client: those to the engines while the buffer empties.
MORE_FILES = 4096


class Held(NamedTuple):
    """What came out. Memory of the gateway: empty, with all held, after all were served."""

    requests: int
    empty_bytes: int
    full_bytes: int
    after_bytes: int
    took_in_s: float
    took_in_cpu_s: float
    served_s: float
    served_cpu_s: float
    seen: dict[str, int]
    gauges: dict[str, float]


def request(client: Client, number: int, prompt_bytes: int) -> bytes:
    """Return a streaming request."""
    messages = [{"role": "user", "content": f"{number} ".ljust(prompt_bytes, "x")}]
    body = {"model": "mock", "messages": messages, "max_tokens": TOKENS, "stream": True}
    return client.request("POST", "/v1/chat/completions", orjson.dumps(body))


async def ask(client: Client, number: int, prompt_bytes: int) -> str:
    """Send one and say in a word what became of it."""
    got = await client.ask(request(client, number, prompt_bytes))
    if got.status != 200:
        return f"status {got.status}"
    return "right" if got.whole and got.body == answer(TOKENS, stream=True) else "wrong"


async def measure(given: argparse.Namespace, front: Gateway) -> Held:
    """Warm up, hold, release."""
    client, admin, watch = Client(front.url), Client(front.admin_url), Client(front.url)
    for first in range(0, WARM_UP, 50):
        await asyncio.gather(*(ask(client, n, given.prompt_bytes) for n in range(first, first + 50)))
    await settled(watch)
    await tell(admin, "drain")
    empty_bytes, began_s, began_cpu_s = rss_bytes(front.pid), time.monotonic(), cpu_s(front.pid)
    asked = [asyncio.create_task(ask(client, n, given.prompt_bytes)) for n in range(given.requests)]
    await all_held(watch, asked)
    full_bytes, full_s, full_cpu_s = rss_bytes(front.pid), time.monotonic(), cpu_s(front.pid)
    print(f"{given.requests} held, {full_bytes / 2**20:.1f} MiB", file=sys.stderr, flush=True)
    await tell(admin, "undrain")
    seen = Counter(await asyncio.gather(*asked))
    served_s, served_cpu_s = time.monotonic(), cpu_s(front.pid)
    left = await settled(watch)
    return Held(
        given.requests,
        empty_bytes,
        full_bytes,
        rss_bytes(front.pid),
        full_s - began_s,
        full_cpu_s - began_cpu_s,
        served_s - full_s,
        served_cpu_s - full_cpu_s,
        dict(seen),
        left,
    )


async def tell(admin: Client, word: str) -> None:
    """Drain all engines, or take them back."""
    for worker in json.loads((await admin.get("/workers")).body):
        await admin.ask(admin.request("POST", f"/workers/{worker['name']}/{word}"))


async def all_held(watch: Client, asked: list["asyncio.Task[str]"]) -> None:
    """Wait until each request is held, or answered already, which is wrong and will be told."""
    while True:
        held = gauges((await watch.get("/metrics")).body.decode())["headway_held_requests"]
        if held + sum(task.done() for task in asked) >= len(asked):
            return
        await asyncio.sleep(0.2)


def show(came: Held) -> None:
    """Print the table."""
    table = Table("", "memory", "time", "CPU per request", title=f"Headway, {came.requests:,} streams held")
    each = 1e6 / came.requests
    rows = (
        ("empty", came.empty_bytes, 0.0, 0.0),
        ("all held", came.full_bytes, came.took_in_s, came.took_in_cpu_s),
        ("all served", came.after_bytes, came.served_s, came.served_cpu_s),
    )
    for what, memory, took_s, used_s in rows:
        timed = (f"{took_s:.1f} s", f"{each * used_s:.0f} µs") if took_s else ("", "")
        table.add_row(what, f"{memory / 2**20:.1f} MiB", *timed)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    per_request = (came.full_bytes - came.empty_bytes) / came.requests / 1024
    console.print(f"memory per held request: {per_request:.1f} KiB, its socket's in the kernel not counted")
    console.print("clients:", ", ".join(f"{n:,} {what}" for what, n in sorted(came.seen.items())))
    left = came.gauges
    console.print("gauges in the end:", "all zero" if left and not any(left.values()) else left)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.held", description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--prompt-bytes", type=int, default=1000)
    parser.add_argument("--policy", default="staggered")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    return parser.parse_args()


def main() -> None:
    """Run it."""
    given = options()
    allow_open_files(given.requests + MORE_FILES)
    with mock_engines(2) as engines, gateway(engines, given.policy) as front:
        came = uvloop.run(measure(given, front))
    show(came)
    if given.out is not None:
        given.out.write_text(json.dumps(came._asdict(), indent=1))
    if came.seen != {"right": came.requests} or not came.gauges or any(came.gauges.values()):
        raise SystemExit("not all were served, or something is left")


if __name__ == "__main__":
    main()
