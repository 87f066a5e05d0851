"""Mutated requests against one gateway: does any end in a 500, and does any block its event loop?

    python -m benchmarks.fuzz_requests --requests 1000000

A gateway runs in a thread of this process before an engine that answers every request at once; clients on
loopback send it requests whose HTTP bytes, headers or JSON bodies are changed at random, from a seed. Shows
how many there were and the statuses they got. Fails when a status is 500, when the gateway has logged a
fault, when it no longer answers a sound request, or when one turn of its event loop took more than `--stall`
seconds of the thread's CPU time. CPU time, because a busy machine stalls every process.
"""

import argparse
import asyncio
import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import orjson
import uvloop
from rich.console import Console

from headway.hosts.gateway import Gateway, GatewayConfig

STEP_S, ANSWER_S, PROGRESS = 0.005, 2.0, 50_000
ANSWER = orjson.dumps(
    {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }
)
MODELS = orjson.dumps({"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": 131072}]})
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/generate",
    *("/v1/chat/completions", "/v1/completions") * 4,
    "/v1/embeddings",
    "/tokenize",
    "/v1/models",
    "/v1/realtime",
    "/health",
    "/metrics",
    "/v1/audio/transcriptions",
    "/flush_cache",
    "/nothing",
)
BODIES: tuple[dict[str, object], ...] = (
    {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5},
    {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "n": 2},
    {"model": "m", "prompt": "hello", "stream": False, "temperature": 0.5},
    {"model": "m", "prompt": [[1, 2, 3], [4]], "max_tokens": 1},
    {"model": "m", "input": "hello", "max_output_tokens": 3},
    {"model": "m", "input": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "name": "f"}]},
    {"text": "hello", "sampling_params": {"max_new_tokens": 3, "n": 1}},
    {"input_ids": [1, 2, 3], "rid": "x"},
)
VALUES: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    1e20,
    -0.5,
    "",
    "x",
    "\ud83d\ude00",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    [[1]] * 50,
    {"a": {"b": [1]}},
    ["a", 1],
)
HEADERS = (
    b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n",
    b"Expect: 100-continue\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Content-Encoding: zstd\r\n",
    b"x-slo-ttft-ms: nan\r\n",
    b"x-priority: 99999999999\r\n",
    b"x-request-id: \xff\xfe\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Authorization: \xe9\r\n",
    b"Origin: http://[\r\n",
    b"Cookie: a\r\n",
    b"traceparent: 00-0-0-0\r\n",
    b"Content-Type: multipart/form-data; boundary=x\r\n",
    b"Accept: text/event-stream\r\n",
)
WORDS = (
    b"\r\n",
    b"\n",
    b"\0",
    b" ",
    b'"',
    b"{",
    b"[",
    b"]",
    b"}",
    b"\\u0000",
    b"\\ud800",
    b"-",
    b"e999",
    b"NaN",
    b"\xff",
    b"[" * 300,
    b'{"a":' * 200,
    b"0\r\n\r\n",
    b"9" * 50,
    b"%00",
    b"%2f..",
    b"//",
    b"?a=%zz&&=",
)


def request(rng: random.Random) -> bytes:
    """Return a request with changes in its body's fields, its headers or its bytes."""
    body = dict(rng.choice(BODIES))
    if rng.random() < 0.6:
        field = rng.choice([*body, "stream", "stop", "logprobs", "best_of", "max_tokens", "user"])
        body[field] = rng.choice(VALUES)
    raw = orjson.dumps(body, option=orjson.OPT_PASSTHROUGH_SUBCLASS, default=str) if _sound(body) else b"{}"
    if rng.random() < 0.3:
        raw = _changed(raw, rng)
    method = rng.choice(("POST",) * 24 + ("GET", "PUT", "OPTIONS", "DELETE"))
    head = f"{method} {rng.choice(PATHS)} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n".encode()
    if rng.random() < 0.3:
        head += rng.choice(HEADERS)
    if rng.random() < 0.2:
        pieces = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in _parts(raw, rng))
        data = head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
    else:
        data = head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw
    return _changed(data, rng) if rng.random() < 0.3 else data


def _sound(body: dict[str, object]) -> bool:
    """Return whether orjson can write it: no surrogates, no integer beyond 64 bits."""
    try:
        orjson.dumps(body)
    except TypeError:
        return False
    return True


def _parts(raw: bytes, rng: random.Random) -> list[bytes]:
    size = rng.randint(1, 40)
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def _changed(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(data))
        match rng.randrange(4):
            case 0:
                data[at:at] = rng.choice(WORDS)
            case 1:
                del data[at : at + rng.randint(1, 20)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 100)]
            case _:
                data[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(data)


class _Engine(asyncio.Protocol):
    """Answer every request at once, whatever it is."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        if not end:
            return
        lengths = [line[15:] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        if len(body) >= (int(lengths[0]) if lengths else 0):
            self._data = b""
            answer = MODELS if head.startswith(b"GET /v1/models") else ANSWER
            kind = b"Content-Type: application/json\r\n"
            self._transport.write(
                b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (kind, len(answer), answer)
            )


class Watched:
    """A gateway in a thread of its own. `longest_s`: CPU time of its longest turn of the loop."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.ready = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()))

    def __enter__(self) -> "Watched":
        self._thread.start()
        if not self.ready.wait(30.0):
            raise SystemExit("the gateway did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        engine = await self._loop.create_server(_Engine, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{engine.sockets[0].getsockname()[1]}"
        data = {
            "server": {"port": 0, "drain_timeout_s": 0.1},
            "instances": [{"name": "engine", "url": url}],
            "policy": {"cluster": "round-robin"},
            "limits": {"header_timeout_s": 0.1, "body_timeout_s": 0.1, "queue_timeout_s": 1.0},
            "logs": {"access": False},
        }
        async with Gateway(GatewayConfig.parse(data)) as gateway:
            self.port = int(gateway.url.rpartition(":")[2])
            self.lag = gateway.scheduler.loop_lag
            self._tick(time.thread_time())
            self.ready.set()
            await self._over.wait()
        engine.close()

    def _tick(self, then_s: float) -> None:
        """Note the CPU time since the last tick: what ran between two ticks ran in one or two turns."""
        now_s = time.thread_time()
        self.longest_s = max(self.longest_s, now_s - then_s)
        self._loop.call_later(STEP_S, self._tick, now_s)


class _Client(asyncio.Protocol):
    """Send one request and keep the status of its first answer."""

    def __init__(self, data: bytes, over: asyncio.Future[str]) -> None:
        self._data = data
        self._over = over
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._data)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._answer = self._answer or data

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._over.done():
            self._over.set_result(self._answer[9:12].decode("latin-1") or "none")


async def send(port: int, data: bytes) -> str:
    """Send a request and return the status it got; "open" when the connection was still open in the end."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[str] = loop.create_future()
    transport, client = await loop.create_connection(lambda: _Client(data, over), "127.0.0.1", port)
    timer = loop.call_later(ANSWER_S, transport.abort)
    try:
        return await over
    finally:
        timer.cancel()
        transport.abort()
        del client


async def fuzz(watched: Watched, given: argparse.Namespace, seen: Counter[str]) -> None:
    """Send all requests, many at once."""
    rng = random.Random(given.seed)
    left = given.requests

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            data = request(rng)
            status = await send(watched.port, data)
            seen[status] += 1
            if status == "500":
                print(f"500: {data!r}"[:2000], file=sys.stderr, flush=True)
            if seen.total() % PROGRESS == 0:
                line = f"{seen.total():,} requests, longest turn {watched.longest_s * 1e3:.1f} ms"
                print(line, file=sys.stderr, flush=True)

    await asyncio.gather(*(work() for _ in range(given.clients)))
    sound = orjson.dumps(BODIES[0])
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
    seen["last"] = int(
        await send(watched.port, head + b"Content-Length: %d\r\n\r\n" % len(sound) + sound) == "200"
    )


class _Faults(logging.Handler):
    """Keep what was logged as an error: a fault of the gateway's own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(logging.Formatter().format(record))


def report(watched: Watched, seen: Counter[str], faults: _Faults, given: argparse.Namespace) -> list[str]:
    """Print what was seen and return what is wrong."""
    answers = Counter({status: n for status, n in seen.items() if status != "last"})
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(
        f"{answers.total():,} requests:", ", ".join(f"{n:,} × {s}" for s, n in answers.most_common())
    )
    console.print(f"longest turn of the event loop: {watched.longest_s * 1e3:.1f} ms of CPU time")
    console.print(f"longest lag in the last minute: {watched.lag.longest_s() * 1e3:.1f} ms")
    wrong: list[str] = []
    checks: list[tuple[Callable[[], bool], str]] = [
        (lambda: answers["500"] > 0, f"{answers['500']} answers were 500"),
        (lambda: bool(faults.records), f"faults were logged, the first: {(faults.records or [''])[0]}"),
        (lambda: not seen["last"], "a sound request is answered no more"),
        (lambda: watched.longest_s > given.stall, f"a turn of the loop took {watched.longest_s:.3f} s"),
    ]
    wrong += [text for is_wrong, text in checks if is_wrong()]
    return wrong


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz_requests", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=256, help="connections at once")
    parser.add_argument(
        "--stall", type=float, default=0.05, help="longest turn of the event loop, in seconds"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Run it."""
    given = options()
    faults, seen = _Faults(), Counter[str]()
    logging.getLogger().addHandler(faults)
    with Watched() as watched:
        uvloop.run(fuzz(watched, given, seen))
        wrong = report(watched, seen, faults, given)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
