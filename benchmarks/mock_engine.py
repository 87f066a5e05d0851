"""A stand-in engine that computes nothing, so that what is measured before it is the gateway.

    python -m benchmarks.mock_engine --errors 0.01 --gap-ms 2

asyncio.Protocol and httptools on uvloop. It prints its port. What it answers follows from the request alone
(`answer`), so that a client can tell a whole answer from a broken one:

POST with "stream": true   `max_tokens` events, one every `gap_ms` (0: back to back), then [DONE]
other POST                 a JSON answer
GET /load                  {"posts", "errors", "aborted", "under_way"} since the start
other GET                  200
"""

import argparse
import asyncio
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import httptools
import orjson
import uvloop

_DONE = b"data: [DONE]\n\n"
_JSON = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_MODELS = orjson.dumps({"object": "list", "data": [{"id": "mock", "object": "model"}]})
_FAILED = orjson.dumps({"error": {"message": "injected", "type": "server_error", "param": None, "code": 500}})


def event(number: int) -> bytes:
    """Return the event of one token."""
    delta = {"index": 0, "delta": {"content": f"tok{number} "}, "finish_reason": None}
    return b"data: %b\n\n" % orjson.dumps({"id": "mock", "model": "mock", "choices": [delta]})


def answer(tokens: int, *, stream: bool) -> bytes:
    """Return the whole body for a request of so many tokens."""
    if stream:
        return b"".join([event(number) for number in range(tokens)]) + _DONE
    usage = {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}
    message = {"role": "assistant", "content": "tok " * tokens}
    return orjson.dumps({"id": "mock", "choices": [{"index": 0, "message": message}], "usage": usage})


@dataclass
class Engine:
    """What all connections share. Counters are of POSTs. `gap_s`: between two events of a stream."""

    gap_s: float
    errors_share: float
    rng: random.Random
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("posts", "errors", "aborted", "under_way"), 0)
    )


class Connection(asyncio.Protocol):
    """One request after the other; none is pipelined."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self._write: Callable[[bytes], None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what writes."""
        self._write = transport.write  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a stream that nobody reads to its end."""
        if self._timer is not None:
            self._timer.cancel()
            self._engine.counts["aborted"] += 1
            self._engine.counts["under_way"] -= 1

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        """Keep the path."""
        self._url = url

    def on_body(self, data: bytes) -> None:
        """Keep a piece."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """Answer."""
        body = b"".join(self._body)
        self._body.clear()
        if self._parser.get_method() == b"POST":
            self._generate(orjson.loads(body))
        elif self._url == b"/load":
            self._whole(orjson.dumps(self._engine.counts))
        else:
            self._whole(_MODELS)

    def _generate(self, asked: dict[str, object]) -> None:
        engine, tokens = self._engine, int(str(asked.get("max_tokens", 16)))
        engine.counts["posts"] += 1
        if engine.rng.random() < engine.errors_share:
            engine.counts["errors"] += 1
            self._whole(_FAILED, 500)
        elif not asked.get("stream"):
            self._whole(answer(tokens, stream=False))
        else:
            engine.counts["under_way"] += 1
            self._write(_STREAM)
            self._step(0, tokens)

    def _whole(self, body: bytes, status: int = 200) -> None:
        self._write(_JSON % (status, len(body), body))

    def _step(self, number: int, tokens: int) -> None:
        """Send the next event, and see to the one after it."""
        self._timer = None
        while number < tokens:
            self._chunk(event(number))
            number += 1
            if self._engine.gap_s:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._engine.gap_s, self._step, number, tokens)
                return
        self._chunk(_DONE)
        self._write(b"0\r\n\r\n")
        self._engine.counts["under_way"] -= 1

    def _chunk(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data))


async def serve(engine: Engine) -> None:
    """Listen on a free port, print it, and run until SIGTERM."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await stop.wait()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mock_engine")
    parser.add_argument("--errors", type=float, default=0.0, help="share of POSTs answered with 500")
    parser.add_argument("--gap-ms", type=float, default=0.0, help="between two events of a stream")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    uvloop.run(serve(Engine(given.gap_ms / 1000, given.errors, random.Random(given.seed))))


if __name__ == "__main__":
    main()
