"""The HTTP client towards engines, against servers that send literal bytes."""

import asyncio
import errno
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from standins import StandIn, chat, error_of, gateway, run, until

from headway.front.transport import HIGH_WATER_BYTES, HttpTransport, TransportError
from headway.front.worker import State


class Server:
    """Answers each request with the next of `answers`: bytes, sent piece by piece; None closes."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.heads = []
        self.accepted = 0
        self.writers = []

    async def handle(self, reader, writer):
        self.accepted += 1
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                await reader.readexactly(length)
                for piece in self.answers.pop(0):
                    if piece is None:
                        return
                    writer.write(piece)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def served(*answers):
    server = Server(*answers)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    transport = HttpTransport(connect_timeout_s=1.0)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield server, transport, f"http://127.0.0.1:{port}"
    finally:
        await transport.close()
        listening.close()
        for writer in server.writers:
            writer.close()
        await listening.wait_closed()
        await until(lambda: not transport.connections)


async def get(transport, url, method="GET", body=None):
    answer = await transport.send(method, url, {}, body)
    try:
        return answer.status, answer.headers, await answer.read()
    finally:
        answer.close()


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: 1\r\nX-A: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n3\r\nyou\r\n0\r\n\r\n"


def test_a_connection_is_used_again_when_its_answer_was_whole():
    async def check():
        async with served([PLAIN], [bytes([b]) for b in CHUNKED], [PLAIN]) as (server, transport, url):
            status, headers, body = await get(transport, url + "/a?b=c", "POST", b"{}")
            assert (status, headers["x-a"], body) == (200, "1, 2", b"hi")
            assert (await get(transport, url))[2] == b"hiyou"
            assert (await get(transport, url))[2] == b"hi"
            assert server.accepted == 1
            assert server.heads[0].startswith(b"POST /a?b=c HTTP/1.1\r\nHost: 127.0.0.1:")

    run(check())


def test_what_nobody_asked_for_ends_the_connection():
    async def check():
        async with served([PLAIN, PLAIN], [PLAIN]) as (server, transport, url):
            assert (await get(transport, url))[2] == b"hi"
            await asyncio.sleep(0.01)
            assert (await get(transport, url))[2] == b"hi"
            assert server.accepted == 2

    run(check())


def test_an_answer_that_was_not_read_to_its_end_costs_the_connection():
    async def check():
        async with served([CHUNKED[:60]], [PLAIN]) as (server, transport, url):
            answer = await transport.send("GET", url, {}, None)
            answer.close()
            assert (await get(transport, url))[2] == b"hi"
            assert server.accepted == 2

    run(check())


def test_interim_answers_are_skipped_and_the_end_may_be_the_connections():
    async def check():
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        to_the_end = b"HTTP/1.1 200 OK\r\n\r\nuntil it closes"
        async with served([interim + to_the_end, None]) as (_, transport, url):
            assert (await get(transport, url))[2] == b"until it closes"

    run(check())


def test_a_head_has_no_body():
    async def check():
        async with served([b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"]) as (_, transport, url):
            assert (await get(transport, url, "HEAD"))[2] == b""

    run(check())


@pytest.mark.parametrize(
    "answer",
    [
        [None],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", None],
        [CHUNKED[:-5], None],
        [b"SSH-2.0-OpenSSH\r\n", None],
        [b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n", None],
        [b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nrest", None],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", None],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhi", None],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n", None],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi!", None],
    ],
)
def test_what_is_broken_or_no_http_is_an_error_and_not_a_whole_answer(answer):
    async def check():
        async with served(answer) as (_, transport, url):
            with pytest.raises(TransportError) as caught:
                await get(transport, url)
            assert not caught.value.refused

    run(check())


def test_an_offer_of_another_protocol_in_an_answer_changes_nothing():
    answer = b"HTTP/1.1 200 OK\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nhi"

    async def check():
        async with served([answer]) as (_, transport, url):
            assert (await get(transport, url))[2] == b"hi"

    run(check())


def test_nobody_there_is_told_apart():
    async def check():
        async with served() as (_, transport, url):
            pass
        with pytest.raises(TransportError) as caught:
            await get(transport, url)
        assert caught.value.refused

    run(check())


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_what_is_no_host_is_an_error_of_the_connection(host):
    async def check():
        async with served() as (_, transport, _):
            with pytest.raises(TransportError, match="is no host"):
                await get(transport, f"http://{host}:80")

    run(check())


def test_a_slow_reader_holds_back_the_engine():
    async def check():
        size = 40 * HIGH_WATER_BYTES
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode()
        async with served([head, bytes(size)]) as (_, transport, url):
            answer = await transport.send("GET", url, {}, None)
            await until(lambda: answer._paused)
            assert answer._waiting_bytes < 8 * HIGH_WATER_BYTES
            assert len(await answer.read()) == size
            answer.close()

    run(check())


def test_a_cancelled_request_cuts_its_connection():
    async def check():
        async with served([]) as (server, transport, url):
            task = asyncio.create_task(get(transport, url))
            await until(lambda: server.heads)
            task.cancel()
            await until(lambda: not transport.connections)
            await until(lambda: server.writers[0].is_closing(), "the engine hears of it")

    run(check())


def test_no_file_left_to_connect_with_is_not_the_engines_fault(monkeypatch):
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            assert (await chat(client))[0] == 200

            async def none_left(*args, **kwargs):
                raise OSError(errno.EMFILE, "Too many open files")

            monkeypatch.setattr(front.scheduler.transport, "_reuse", lambda origin: None)
            loop = SimpleNamespace(create_connection=none_left, time=time.monotonic)
            monkeypatch.setattr(front.scheduler.transport, "_loop", loop)
            status, headers, body = await chat(client)
            assert (status, error_of(body)) == (503, "engine_unavailable") and "Retry-After" in headers
            async with client.post("/v1/embeddings", json={}) as answer:
                assert (answer.status, error_of(await answer.read())) == (503, "exhausted")
            await front.workers._check(front.workers.get("engine-0"))
            assert front.workers.get("engine-0").state is State.UP

    run(check())


def test_pouring_hands_every_piece_on_and_waits_for_one_who_is_behind():
    head, pieces = CHUNKED[:47], [b"1\r\n%d\r\n" % n for n in range(8)]

    async def check():
        async with served([head, *pieces, b"0\r\n\r\n"]) as (_, transport, url):
            answer = await transport.send("GET", url, {}, None)
            told = []

            def push(piece):
                told.append(piece)
                return b"3" not in piece

            async def caught_up():
                told.append("caught up")

            await answer.pour(push, caught_up)
            answer.close()
            assert b"".join(piece for piece in told if piece != "caught up") == b"01234567"
            behind = next(n for n, piece in enumerate(told) if b"3" in piece)
            assert told[behind + 1] == "caught up"

    run(check())


def test_what_is_thrown_by_the_one_who_takes_comes_out_of_the_pouring():
    async def check():
        async with served([CHUNKED[:47], b"1\r\na\r\n"]) as (_, transport, url):
            answer = await transport.send("GET", url, {}, None)

            def gone(piece):
                raise ConnectionResetError("the client is gone")

            with pytest.raises(ConnectionResetError):
                await answer.pour(gone, asyncio.Event().wait)
            answer.close()

    run(check())


class ResettingServer(Server):
    """Resets a connection when its second request arrives, as a server whose idle time-out is over."""

    async def handle(self, reader, writer):
        self.accepted += 1
        try:
            for answer in (PLAIN, self.begins):
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                await reader.readexactly(2 if head.startswith(b"POST") else 0)
                writer.write(answer)
                await writer.drain()
            await asyncio.sleep(0.01)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.transport.abort()

    begins = b""


@asynccontextmanager
async def resetting(begins=b""):
    server = ResettingServer()
    server.begins = begins
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    transport = HttpTransport(connect_timeout_s=1.0)
    try:
        yield server, transport, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        await transport.close()
        listening.close()
        await listening.wait_closed()
        await until(lambda: not transport.connections)


def test_a_request_that_meets_a_stale_connection_is_sent_once_more_on_a_new_one():
    async def check():
        async with resetting() as (server, transport, url):
            for _ in range(3):
                assert (await get(transport, url, "POST", b"{}"))[2] == b"hi"
            assert server.accepted == 3 and len(server.heads) == 5

    run(check())


def test_a_request_whose_answer_had_begun_is_not_sent_again():
    async def check():
        async with resetting(b"HTTP/1.1 200 OK\r\n") as (server, transport, url):
            await get(transport, url)
            with pytest.raises(TransportError, match="broke"):
                await get(transport, url)
            assert server.accepted == 1

    run(check())


def test_a_request_an_engine_has_worked_on_is_not_sent_again(monkeypatch):
    monkeypatch.setattr("headway.front.transport.STALE_S", 0.0)

    async def check():
        async with resetting() as (server, transport, url):
            await get(transport, url)
            with pytest.raises(TransportError, match="broke"):
                await get(transport, url)
            assert server.accepted == 1

    run(check())


def test_a_new_connection_that_breaks_is_the_engines_failure():
    async def check():
        async with served([None]) as (server, transport, url):
            with pytest.raises(TransportError, match="broke"):
                await get(transport, url)
            assert server.accepted == 1

    run(check())
