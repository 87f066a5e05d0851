"""The client's side of HTTP, on real sockets: one listener, and a handler that the test writes."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from standins import run, until

from headway.front.errors import Refusal
from headway.front.listener import Listener
from headway.front.protocol import ClientSink, Connection, HttpResponse, refused

GET = b"GET /a?x=1&y=%202 HTTP/1.1\r\nHost: here\r\n\r\n"
POST = b"POST /b HTTP/1.1\r\nHost: here\r\nContent-Length: 4\r\n\r\n"


@asynccontextmanager
async def listening(handler, *, header_timeout_s=5.0, most_body_bytes=1000):
    listener = Listener(handler, header_timeout_s=header_timeout_s, most_body_bytes=most_body_bytes)
    url = await listener.listen("127.0.0.1", 0, None)
    host, _, port = url.removeprefix("http://").partition(":")

    writers = []

    async def connect():
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        return reader, writer

    try:
        yield listener, connect
    finally:
        await listener.close()
        for writer in writers:
            writer.transport.abort()


async def echo(request):
    """Answer with what was asked."""
    try:
        body = await request.read()
    except Refusal as refusal:
        return refused(refusal)
    said = f"{request.method} {request.path} {sorted(request.query.items())} {body.decode()}"
    return HttpResponse(200, said.encode(), {"X-A": "b"})


async def stream(request):
    sink = ClientSink(request, {"x-request-id": "r"})
    await sink.start(200, {"Content-Type": "text/event-stream"})
    await sink.write(b"one")
    await sink.write(b"")
    await sink.write(b"twenty-six characters long")
    await sink.end()


def exchange(handler, sent, **limits):
    """Send bytes, then read until the connection ends: the last request says `Connection: close`."""

    async def check():
        async with listening(handler, **limits) as (_, connect):
            reader, writer = await connect()
            writer.write(sent)
            answer = await reader.read()
            answers.append(answer)

    answers = []
    run(check())
    return answers[0]


def closing(request):
    return request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)


def test_requests_sent_ahead_are_answered_in_their_order_on_one_connection():
    answer = exchange(echo, GET + POST + b"body" + closing(GET))
    heads = [part for part in answer.split(b"HTTP/1.1 200 OK\r\n") if part]
    assert [head.partition(b"\r\n\r\n")[2] for head in heads] == [
        b"GET /a [('x', '1'), ('y', ' 2')] ",
        b"POST /b [] body",
        b"GET /a [('x', '1'), ('y', ' 2')] ",
    ]
    assert [b"Connection: close" in head for head in heads] == [False, False, True]
    assert all(b"X-A: b\r\n" in head and b"\r\nDate: " in head for head in heads)


def test_a_stream_is_sent_in_chunks_and_to_an_old_client_without():
    answer = exchange(stream, closing(GET))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head and b"x-request-id: r" in head
    assert body == b"3\r\none\r\n1a\r\ntwenty-six characters long\r\n0\r\n\r\n"
    answer = exchange(stream, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head and b"Connection: close" in head
    assert body == b"onetwenty-six characters long"


def test_head_gets_the_head_alone():
    answer = exchange(echo, closing(GET.replace(b"GET", b"HEAD")))
    assert answer.endswith(b"\r\n\r\n") and b"Content-Length: 34\r\n" in answer
    answer = exchange(stream, closing(GET.replace(b"GET", b"HEAD")))
    assert answer.endswith(b"\r\n\r\n") and b"chunked" not in answer


def test_a_client_that_waits_to_be_told_to_go_on_is_told_when_somebody_reads():
    async def check():
        async with listening(echo) as (_, connect):
            reader, writer = await connect()
            writer.write(POST.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"late")
            assert (await reader.readuntil(b"late")).endswith(b"POST /b [] late")

    run(check())


def test_an_offer_of_another_protocol_is_not_taken():
    offer = GET.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n")
    answer = exchange(echo, offer + closing(GET))
    assert answer.count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize("length", [b"Content-Length: 2000", b"Transfer-Encoding: chunked"])
def test_a_body_too_large_is_refused_at_once_and_the_refusal_can_be_read(length):
    """Though the client goes on sending: a reset in place of the answer would tell it nothing."""

    async def check():
        async with listening(echo) as (_, connect):
            reader, writer = await connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\n" + length + b"\r\n\r\n")
            piece = b"%x\r\n" % 1500 + b"x" * 1500 + b"\r\n" if b"chunked" in length else b"x" * 1500
            writer.write(piece)
            answer = await reader.readuntil(b"}}")
            assert answer.startswith(b"HTTP/1.1 413 ") and b"Connection: close" in answer
            writer.write(piece)
            assert await reader.read() == b""

    run(check())


def test_an_answer_before_the_body_has_come_is_the_last_of_its_connection():
    async def refuse(request):
        return refused(Refusal(401, "invalid_api_key", "No."))

    async def check():
        async with listening(refuse) as (_, connect):
            reader, writer = await connect()
            writer.write(POST)
            answer = await reader.readuntil(b"}}")
            assert answer.startswith(b"HTTP/1.1 401 ") and b"Connection: close" in answer
            writer.write(b"bodyGET / HTTP/1.1\r\n\r\n")
            assert await reader.read() == b""

    run(check())


def test_a_malformed_body_is_the_readers_problem():
    answer = exchange(echo, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and b'"bad_http"' in answer


@pytest.mark.parametrize("how", ["closes", "closes its half", "resets"])
def test_a_client_that_goes_cancels_what_is_handled_for_it(how):
    async def check():
        began, gone = asyncio.Event(), asyncio.Event()

        async def wait(request):
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                gone.set()

        async with listening(wait) as (listener, connect):
            _, writer = await connect()
            writer.write(GET)
            await began.wait()
            if how == "closes":
                writer.close()
            elif how == "resets":
                writer.transport.abort()
            else:
                writer.write_eof()
            await gone.wait()
            await until(lambda: not listener.connections)

    run(check())


def test_a_failed_stream_ends_the_connection_without_its_last_chunk():
    async def fail(request):
        sink = ClientSink(request, {})
        await sink.start(200, {})
        await sink.write(b"half")
        await sink.fail(Refusal(502, "engine_error", "The engine failed."))

    answer = exchange(fail, GET)
    assert b"4\r\nhalf\r\n" in answer and b'data: {"error"' in answer and not answer.endswith(b"0\r\n\r\n")


def test_our_own_fault_is_a_500_or_a_cut_stream(caplog):
    async def broken(request):
        if request.method == "POST":
            await ClientSink(request, {}).start(200, {})
        raise ValueError("a bug")

    assert exchange(broken, closing(GET)).startswith(b"HTTP/1.1 500 ")
    answer = exchange(broken, POST + b"body")
    assert b"0\r\n\r\n" not in answer and b"500" not in answer
    assert [record.message for record in caplog.records] == ["a request failed inside the gateway"] * 2


def test_a_client_that_does_not_read_holds_up_only_the_one_who_writes_to_it():
    async def check():
        ended = asyncio.Event()

        async def flood(request):
            sink = ClientSink(request, {})
            await sink.start(200, {})
            try:
                while True:
                    await sink.write(b"x" * 65_536)
            finally:
                ended.set()

        async with listening(flood) as (listener, connect):
            _, writer = await connect()
            writer.write(GET)
            await until(lambda: any(c._writable is not None for c in listener.connections))
            assert not ended.is_set()
            writer.transport.abort()
            await ended.wait()

    run(check())


def test_draining_closes_idle_connections_and_lets_the_others_have_their_answer():
    async def check():
        go = asyncio.Event()

        async def wait(request):
            if request.method == "POST":
                await go.wait()
            return HttpResponse(200, b"done")

        async with listening(wait) as (listener, connect):
            idle, busy = await connect(), await connect()
            idle[1].write(GET)
            await idle[0].readuntil(b"done")
            busy[1].write(POST + b"body")
            await until(lambda: sum(not c.idle for c in listener.connections) == 1)
            listener.drain()
            assert await idle[0].read() == b""
            with pytest.raises(OSError):
                await connect()
            go.set()
            answer = await busy[0].read()
            assert b"Connection: close" in answer and answer.endswith(b"done")

    run(check())


def test_stopping_ends_what_is_handled():
    async def check():
        cancelled = asyncio.Event()

        async def wait(request):
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with listening(wait) as (listener, connect):
            reader, writer = await connect()
            writer.write(GET)
            await until(lambda: any(not c.idle for c in listener.connections))
        assert cancelled.is_set() and not listener.connections
        assert await reader.read() == b""

    run(check())


def test_one_connection_too_many_is_told_so_and_the_others_go_on():
    async def check():
        async with listening(echo) as (listener, connect):
            listener.most_connections = 1
            reader, writer = await connect()
            writer.write(GET)
            await reader.readuntil(b"[('x', '1'), ('y', ' 2')] ")
            other, _ = await connect()
            answer = await other.read()
            assert answer.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in answer
            writer.write(GET)
            assert (await reader.readuntil(b"\r\n")) == b"HTTP/1.1 200 OK\r\n"

    run(check())


def test_a_client_that_asks_and_asks_and_never_reads_is_owed_one_answer_at_a_time():
    """Neither its answers nor the bodies it sends ahead pile up."""

    async def check():
        handled = 0

        async def large(request):
            nonlocal handled
            handled += 1
            await request.read()
            return HttpResponse(200, b"x" * 5_000_000)

        async with listening(large) as (listener, connect):
            _, writer = await connect()
            request = POST.replace(b"Content-Length: 4", b"Content-Length: 900") + b"y" * 900
            writer.write(request * 2000)
            await until(lambda: any(c._writable is not None and c._unread for c in listener.connections))
            (connection,) = listener.connections
            assert handled == 1
            # What one read of the socket brought, at most.
            assert len(connection._queue) * len(request) <= 1 << 18

    run(check())


def test_a_trailer_is_no_header_and_is_bounded():
    seen = []

    async def note(request):
        try:
            await request.read()
        except Refusal as refusal:
            return refused(refusal)
        seen.append(dict(request.headers))
        return HttpResponse(200, b"ok")

    head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = exchange(note, head + b"2\r\nhi\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ") and "authorization" not in seen[0]

    async def check():
        async with listening(note) as (_, connect):
            reader, writer = await connect()
            writer.write(head + b"2\r\nhi\r\n0\r\nX: ")
            for _ in range(100):
                writer.write(b"y" * 4096)
                await asyncio.sleep(0)
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 431 ")

    run(check())


def test_a_long_body_before_the_next_head_does_not_count_as_head():
    body = b"z" * 100_000
    request = POST.replace(b"Content-Length: 4", b"Content-Length: 100000") + body
    answer = exchange(echo, request + closing(GET), most_body_bytes=200_000)
    assert answer.count(b"HTTP/1.1 200 OK") == 2


def test_what_is_refused_before_it_is_a_request_is_heard_of():
    async def check():
        async with listening(echo) as (listener, connect):
            heard = []
            listener.on_refused = heard.append
            reader, writer = await connect()
            writer.write(b"nonsense\r\n\r\n")
            await reader.read()
            assert [refusal.status for refusal in heard] == [400]

    run(check())


def test_a_connection_on_which_nothing_ever_comes_is_closed():
    async def check():
        async with listening(echo, header_timeout_s=0.05) as (_, connect):
            reader, _ = await connect()
            assert await reader.read() == b""

    run(check())


def test_reading_waits_a_turn_of_the_loop_after_a_large_piece():
    class Pipe(asyncio.Transport):
        reads = True

        def pause_reading(self):
            self.reads = False

        def resume_reading(self):
            self.reads = True

        def is_closing(self):
            return False

        def write(self, data):
            pass

        def abort(self):
            pass

        close = abort

    async def check():
        taken = []

        async def take(request):
            taken.append(await request.read())
            return HttpResponse(200)

        pipe, piece = Pipe(), b"x" * 70_000
        connection = Connection(Listener(take, header_timeout_s=5.0, most_body_bytes=1 << 20))
        connection.connection_made(pipe)
        connection.data_received(b"POST /b HTTP/1.1\r\nHost: here\r\nContent-Length: 140000\r\n\r\n")
        assert pipe.reads
        for _ in range(2):
            connection.data_received(piece)
            assert not pipe.reads
            await asyncio.sleep(0)
            assert pipe.reads
        await until(lambda: taken)
        assert taken == [piece + piece]

    run(check())
