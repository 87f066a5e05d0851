"""What a request held is freed when it ends, at whatever stage, by reference counting alone."""

import asyncio
import gc
import sys
from collections import Counter

import orjson
import pytest
from standins import CHAT, StandIn, error_of, gateway, run, until

from headway.front.protocol import Connection, HttpRequest
from headway.front.transport import _Connection as EngineConnection
from headway.hosts.gateway.flight import Flight

BODY, STREAM = orjson.dumps(CHAT), orjson.dumps(CHAT | {"stream": True})
KEPT = (Connection, HttpRequest, Flight, EngineConnection)


def post(body, path="/v1/chat/completions", length=None):
    head = b"POST %b HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n"
    return head % (path.encode(), length or len(body)) + body


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"

#: What a client sends before it goes, what the engine does meanwhile, and the bytes the client waits for.
STAGES = {
    "in the head": (post(BODY)[:30], "", b""),
    "in the body": (post(BODY)[:-3], "", b""),
    "in a chunked body": (CHUNKED + b"5\r\nhello\r\n", "", b""),
    "in a body that is malformed": (CHUNKED + b"zzz\r\n", "", b"400 "),
    "in a body that is too large": (CHUNKED + b"2001\r\n" + b"x" * 0x2001, "", b"413 "),
    "in a body that is too slow": (post(BODY)[:-3], "slow", b"408 "),
    "with a body that is no JSON": (post(b"{"), "", b"400 "),
    "while its request is held": (post(BODY), "drained", b""),
    "while its request waited too long": (post(BODY), "queue", b"503 "),
    "while the engine works": (post(BODY), "hangs", b""),
    "while the engine works, with requests behind it": (post(BODY) * 3, "answers late", b""),
    "while the engine works on a stream": (post(STREAM), "hangs", b""),
    "while the engine works on what is passed on": (post(BODY, "/v1/embeddings"), "hangs", b""),
    "while it streams": (post(STREAM), "pauses", b"tok"),
    "while a stream breaks": (post(STREAM), "breaks", b"error"),
    "after an answer": (post(BODY), "", b"200 OK"),
    "after a stream": (post(STREAM), "", b"[DONE]"),
    "after an engine's refusal": (post(BODY), "400", b"400 "),
    "after an engine's failure": (post(BODY), "500", b"50"),
}


def alive(before=frozenset()):
    return Counter(
        type(each).__name__ for each in gc.get_objects() if isinstance(each, KEPT) and id(each) not in before
    )


def set_up(engine, front, what):
    if what in ("hangs", "answers late"):
        engine.go.clear()
    elif what == "pauses":
        engine.more.clear()
    elif what in ("drained", "queue"):
        front.workers.drain("engine-0")
    elif what == "breaks":
        engine.break_after = 1
    elif what.isdigit():
        engine.status = int(what)


async def cut(front, data, wanted, gone=bool):
    """Send, wait for an answer's bytes (or until they are read), and go."""
    host, _, port = front.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    if wanted:
        await reader.readuntil(wanted)
    else:
        await until(lambda: any(not c.idle or c._in_head() for c in front._listeners[0].connections))
        await asyncio.sleep(0.02)
    writer.transport.abort()
    gone()
    await until(lambda: not front._listeners[0].connections)


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_goes_leaves_nothing_for_the_cycle_collector(stage):
    data, what, wanted = STAGES[stage]
    limits = {"max_body_bytes": 8000}
    limits |= {"slow": {"body_timeout_s": 0.05}, "queue": {"queue_timeout_s": 0.05}}.get(what, {})

    async def check():
        async with StandIn() as engine, gateway([engine], limits=limits) as (front, _):
            others = [each for each in gc.get_objects() if isinstance(each, KEPT)]  # of tests that failed
            before = frozenset(map(id, others))
            gc.disable()
            try:
                for _ in range(2):
                    set_up(engine, front, what)
                    # A client that sends ahead is not read, so that its end is seen when it has an answer.
                    await cut(front, data, wanted, engine.go.set if what == "answers late" else bool)
                gone = [HttpRequest.__name__, Flight.__name__, Connection.__name__]
                await until(lambda: not any(alive(before)[name] for name in gone), "no object is left")
                # The engine's checks have a connection of their own.
                await until(lambda: alive(before)[EngineConnection.__name__] <= 2, "checks alone")
                assert front.serving.buffer.budget.used == 0
            finally:
                gc.enable()
                engine.go.set()
                engine.more.set()

    gc.collect()  # what other tests left, whose finalizers may take long
    run(check())


def test_every_byte_of_a_body_counts_as_soon_as_it_is_there():
    limits = {"buffer_bytes": 10_000}

    async def check():
        async with StandIn() as engine, gateway([engine], limits=limits) as (front, _):
            budget = front.serving.buffer.budget
            host, _, port = front.url.removeprefix("http://").partition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(post(b"x" * 6000, length=9000))
            await until(lambda: budget.used == 6000)
            other_reader, other = await asyncio.open_connection(host, int(port))
            other.write(post(b"y" * 5000, length=9000))
            answer = await other_reader.readuntil(b"}}")
            assert answer.startswith(b"HTTP/1.1 429 ") and b"Connection: close" in answer
            assert error_of(answer.partition(b"\r\n\r\n")[2]) == "buffer_bytes"
            assert b"Retry-After: " in answer
            other.write(b"y" * 4000)  # still read, or the answer could be lost to a reset
            assert await other_reader.read() == b""
            assert budget.used == 6000
            writer.transport.abort()
            await until(lambda: budget.used == 0)
            other.close()

    run(check())


def test_a_body_is_counted_once_while_it_arrives_while_it_is_held_and_no_more_when_dispatched():
    body = orjson.dumps({"prompt": "x" * 6000})

    async def check():
        async with StandIn() as engine, gateway([engine], limits={"buffer_bytes": 8000}) as (front, client):
            budget = front.serving.buffer.budget
            front.workers.drain("engine-0")
            engine.go.clear()
            asking = asyncio.create_task(client.post("/v1/completions", data=body))
            await until(lambda: front.driver.held())
            assert budget.used == len(body)
            front.workers.undrain("engine-0")
            await until(lambda: engine.requests)
            assert budget.used == 0
            engine.go.set()
            assert (await asking).status == 200
            assert budget.used == 0

    run(check())


def test_a_body_in_small_pieces_weighs_what_it_counts():
    """A list of two-byte pieces would weigh some twenty times as much."""

    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, _):
            host, _, port = front.url.removeprefix("http://").partition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(CHUNKED + b"2\r\nxy\r\n" * 20_000)
            await until(lambda: front.serving.buffer.budget.used == 40_000)
            (connection,) = front._listeners[0].connections
            assert sys.getsizeof(connection._current._body) < 2 * 40_000
            writer.transport.abort()
            await until(lambda: front.serving.buffer.budget.used == 0)

    run(check())
