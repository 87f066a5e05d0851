"""One client's connection: answer its HTTP/1.1 requests in order, on an asyncio protocol.

aiohttp's server took a third of the gateway's time per request, and lacks an end to headers that come a
byte at a time and errors in one shape. `framing.py` finds the requests in the bytes. The rules here:

Rule 1. Requests of a connection are handled one after the other; a client that goes away (or only shuts
        its sending side) cancels the one that is handled, and those behind it.
Rule 2. Every size is bounded, and every byte of a body counts against the budget of all connections as soon
        as it is there. A client that sends its next request without waiting for the answer is read no
        further until it has it.
Rule 3. An answer that cannot be whole ends the connection, so that no client takes it for the whole.
Rule 4. Nothing waits for the cycle collector: what refers to each other is taken apart when a request or a
        connection ends, since a body that lives a little longer is megabytes.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qsl

import orjson

from headway.front.buffer import ReceivedBytes
from headway.front.errors import Refusal, release_frames
from headway.front.framing import RequestReader, Target

if TYPE_CHECKING:
    from headway.front.listener import Listener

__all__ = [
    "ClientSink",
    "Connection",
    "Handler",
    "HttpRequest",
    "HttpResponse",
    "Routes",
    "json_answer",
    "refused",
]

#: Whoever is refused before its body is read whole may go on sending for so long, or it would see a reset
#: connection in place of the answer.
LINGER_S = 1.0
#: After so much at once reading waits for the next turn of the loop: libuv reads up to 32 times in a row.
LARGE_READ_BYTES = 1 << 16
#: Larger bodies are not copied.
MOST_COPIED_BYTES = 1 << 20

_log = logging.getLogger(__name__)
_NO_BODY = (204, 304)
_STATUS_LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n" for each in HTTPStatus}


class HttpResponse:
    """A whole answer. The body's length is told by the connection."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.body = body
        self.headers = dict(headers or {})


def refused(refusal: Refusal, path: str = "") -> HttpResponse:
    """Return a refusal as an answer, in the format of the API that the path belongs to."""
    release_frames(refusal)
    return HttpResponse(refusal.status, refusal.body(path), refusal.headers())


def json_answer(value: object, status: int = 200) -> HttpResponse:
    """Return a value as JSON."""
    return HttpResponse(status, orjson.dumps(value), {"Content-Type": "application/json"})


class HttpRequest:
    """A client's request, whose head is read; names of headers are in lower case.

    `path` is decoded; `target` is path and query as they came. `complete`: the body is there.
    `answer_headers` go with the answer, whatever it is. `received`: the bytes counted for the body.
    `upgrades`: the client offers another protocol, in its `Upgrade` header.
    """

    __slots__ = (
        "__weakref__",
        "_body",
        "_problem",
        "_waiter",
        "answer_headers",
        "complete",
        "connection",
        "headers",
        "keep_alive",
        "method",
        "old",
        "path",
        "query_string",
        "received",
        "target",
        "upgrades",
    )

    def __init__(
        self,
        connection: "Connection",
        received: ReceivedBytes,
        method: str,
        target: Target,
        headers: dict[str, str],
        keep_alive: bool,
        old: bool,
        upgrades: bool,
    ) -> None:
        self.connection = connection
        self.received = received
        self.method = method
        self.headers = headers
        self.path, self.query_string, self.target, _ = target
        self.keep_alive = keep_alive
        self.old = old
        self.upgrades = upgrades
        self.answer_headers: Mapping[str, str] = {}
        self.complete = False
        self._body: bytes | bytearray = b""
        self._problem: Refusal | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def query(self) -> dict[str, str]:
        """The query's fields; of equal names the last."""
        return dict(parse_qsl(self.query_string, keep_blank_values=True))

    async def read(self, within_s: float | None = None) -> bytes:
        """Return the whole body. Raises Refusal: 413 when it is too large, 429 when there is no room for it,
        400 when it is malformed, 408 when it is not complete within `within_s`.
        """
        if not self.complete and self._problem is None:
            await self._wait(within_s)
        if self._problem is not None:
            raise self._problem
        if type(self._body) is not bytes and len(self._body) < MOST_COPIED_BYTES:
            self._body = bytes(self._body)
        return cast(bytes, self._body)  # a large one stays the bytearray it is: copying stops the event loop

    async def _wait(self, within_s: float | None) -> None:
        """Wait until the body is complete or has a problem."""
        if self.headers.get("expect", "").lower() == "100-continue" and not self.old:
            self.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        loop = asyncio.get_running_loop()
        timer = None
        if within_s is not None:
            late = Refusal(408, "body_timeout", f"No complete body in {within_s:g} s.")
            timer = loop.call_later(within_s, self.fail, late)
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            if timer is not None:
                timer.cancel()

    # What the connection calls

    def receive(self, piece: bytes, most_bytes: int) -> None:
        """Take a piece of the body."""
        if self._problem is not None:
            return
        received = self.received
        try:
            if received.size + len(piece) > most_bytes:
                raise Refusal(413, "body_too_large", f"The body is larger than {most_bytes} bytes.")
            received.add(len(piece))
        except Refusal as problem:
            self.release()
            self.fail(problem.with_traceback(None))
            return
        # One object, however small the pieces are: each would weigh some 50 bytes more than it counts.
        if not self._body:
            self._body = piece
        elif type(self._body) is bytes:
            self._body = bytearray(self._body)
            self._body += piece
        else:
            self._body += piece

    def end(self) -> None:
        """The body is whole."""
        self.complete = True
        self._wake()

    def fail(self, problem: Refusal) -> None:
        """The body will not be whole."""
        if not self.complete:
            self._problem = problem
        self._wake()

    def release(self) -> None:
        """Drop the body, and the problem, whose traceback refers to those who read."""
        self._body = b""
        self._problem = None
        self.received.release()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


#: Answers a request: with a whole answer, or with None when it wrote one to a `ClientSink`.
Handler = Callable[[HttpRequest], Awaitable[HttpResponse | None]]
#: By method and path.
Routes = dict[tuple[str, str], Handler]


class Connection(asyncio.Protocol):
    """One client's connection. `deadline_s`: when it ends while nothing is handled. `task`: handles."""

    def __init__(self, listener: "Listener") -> None:
        self.deadline_s = 0.0
        self.lost = False
        self.began = self.ended = False  # the answer to the request that is handled
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader: RequestReader | None = RequestReader(self)
        self.task: asyncio.Task[None] | None = None
        self._queue: deque[HttpRequest | Refusal] = deque()
        self._reading: HttpRequest | None = None  # whose body is under way
        self._current: HttpRequest | None = None  # that is handled
        self._deaf = False  # whatever comes is dropped
        self._unread = False  # reading is paused
        self._parked = b""  # came, and is not parsed yet
        self._writable: asyncio.Future[None] | None = None  # while the client is behind
        self._tunnel: Callable[[bytes], None] | None = None  # takes what comes, after `switch`

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Expect a request."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it
        if self._listener.draining:
            self._transport.abort()
        self.deadline_s = self._loop.time() + self._listener.header_timeout_s
        self._listener.connections.add(self)
        if len(self._listener.connections) > self._listener.most_connections:
            self._broken(Refusal(503, "too_many_connections", "Too many connections.", retry_after_s=1.0))

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if self._deaf:
            return
        if self._tunnel is not None:
            self._tunnel(data)
        elif self._parked:
            self._parked += data
        else:
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        """Parse what one turn of the loop allows, and read no further before the rest is parsed too."""
        assert self._reader is not None
        try:
            self._parked = self._reader.feed(data)
        except Refusal as problem:
            self._broken(problem.with_traceback(None))
            return
        full = self.is_full()
        large = len(data) >= LARGE_READ_BYTES
        if full or large or self._parked or self._unread:
            if self._parked and not full:
                self._loop.call_soon(self._parse_on)
            elif large:
                self._loop.call_soon(self._read_on)
            self._pause(full or large or bool(self._parked))

    def _read_on(self) -> None:
        """Read again, in another turn of the loop than the last large piece."""
        if not self.lost and not self._parked and not self.is_full():
            self._pause(False)

    def _parse_on(self) -> None:
        """Go on with what is parked, unless requests before it still wait."""
        if not self.lost and not self._deaf and not self.is_full():
            parked, self._parked = self._parked, b""
            self._parse(parked)

    def _pause(self, pause: bool) -> None:
        if pause is not self._unread and self._transport is not None:
            self._unread = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def eof_received(self) -> None:
        """Take a client that shuts its side for gone: nothing else tells of one that does not read."""
        if self.task is not None:
            self.task.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever waited for answers is gone."""
        self.lost = True
        self._listener.connections.discard(self)
        self._drop_queue()
        self._reading = self._transport = self._tunnel = None
        self._parked = b""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self.task is not None:
            self.task.cancel()
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(ConnectionResetError("the client is gone"))
            self._writable.exception()  # nobody may be waiting

    def pause_writing(self) -> None:
        """The client is behind."""
        if self._writable is None:
            self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """The client has caught up."""
        waiter, self._writable = self._writable, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # What the reader calls

    def is_full(self) -> bool:
        """Return whether a request waits for the one that is handled: no more are read."""
        return len(self._queue) > (self._current is None)

    def on_head_begins(self) -> None:
        """Expect a complete head, soon."""
        self.deadline_s = self._loop.time() + self._listener.header_timeout_s

    def on_head(
        self, method: str, target: Target, fields: dict[str, str], keep_alive: bool, old: bool, upgrades: bool
    ) -> None:
        """Handle the request, in its turn."""
        received = ReceivedBytes(self._listener.budget)
        request = HttpRequest(self, received, method, target, fields, keep_alive, old, upgrades)
        self._reading = request
        self._queue.append(request)
        self._kick()

    def on_piece(self, piece: bytes) -> None:
        """Give the request a piece of its body."""
        if self._reading is not None:
            self._reading.receive(piece, self._listener.most_body_bytes)

    def on_end(self) -> None:
        """The request is whole."""
        if self._reading is not None:
            self._reading.end()
            self._reading = None

    def _broken(self, problem: Refusal) -> None:
        """Say why nothing more is read, after the answers that are owed."""
        self._deaf = True
        self._parked = b""
        self._listener.on_refused(problem)
        if self._reading is not None:
            self._reading.fail(problem)
        else:
            self._queue.append(problem)
            self._kick()

    # Handling

    @property
    def idle(self) -> bool:
        """Whether no request waits or is served. A head may be on its way."""
        return self.task is None

    def expire(self) -> None:
        """End a connection on which nothing came, or went, in time."""
        if self._in_head() and not self._deaf:
            wait_s = self._listener.header_timeout_s
            self._broken(Refusal(408, "header_timeout", f"No complete headers in {wait_s:g} s."))
        else:
            self.abort()

    def close(self) -> None:
        """End the connection when what is written has gone out."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once, and with it what is handled."""
        if self._transport is not None:
            self._transport.abort()

    def _in_head(self) -> bool:
        return self._reader is not None and self._reader.in_head and not self._deaf

    def _drop_queue(self) -> None:
        """Drop the requests that wait for their turn."""
        for item in self._queue:
            if isinstance(item, HttpRequest):
                item.release()
        self._queue.clear()

    def _kick(self) -> None:
        if self.task is None:
            self.task = self._loop.create_task(self._serve())

    async def _serve(self) -> None:
        """Answer what waits, one request after the other."""
        try:
            while self._queue and not self.lost:
                item = self._queue.popleft()
                if isinstance(item, Refusal):
                    self._answer(item.status, item.headers(), item.body(), keep=False)
                    self._end_kindly()
                elif not await self._handle(item):
                    break
                await self.written()  # a client that asks and does not read is owed one answer at a time
        except ConnectionError as error:
            release_frames(error)
            self.abort()
        except BaseException as error:
            release_frames(error)
            raise
        finally:
            self.task = self._current = None
            if not self._in_head():
                self.deadline_s = self._loop.time() + self._listener.keep_alive_s

    async def _handle(self, request: HttpRequest) -> bool:
        """Answer a request; return whether the connection can take another."""
        self.began = self.ended = False
        self._current = request
        if self._unread and not self._queue:
            self._parse_on()
        try:
            try:
                response = await self._listener.handler(request)
            except ConnectionError:
                raise
            except Exception:
                _log.exception("a request failed inside the gateway")
                if self.began:
                    self.abort()
                    return False
                response = refused(Refusal(500, "internal_error", "The gateway failed; this is a bug."))
            if response is not None:
                self.answer(request, response.status, response.headers, response.body)
            elif not self.ended:
                self.close()
                return False
            keep = self._keeps(request)
            if not keep:
                self._end_kindly()
            return keep
        finally:
            self._current = None
            if self._reading is request:
                self._reading = None
            request.release()

    def _keeps(self, request: HttpRequest) -> bool:
        """Whether the connection goes on after the answer to this request."""
        return request.keep_alive and request.complete and not self._deaf and not self._listener.draining

    def _end_kindly(self) -> None:
        """End the connection so that a client that still sends gets to read the answer."""
        self._drop_queue()
        if self._transport is None or self._transport.is_closing():
            return
        read_all = self._reading is None and not self._deaf and not self._unread
        if read_all or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._deaf, self._parked = True, b""
        self._pause(False)
        try:
            self._transport.write_eof()
        except OSError:  # the client is gone
            self._transport.abort()
            return
        self._loop.call_later(LINGER_S, self._transport.close)

    # Writing

    def write(self, data: bytes) -> bool:
        """Send; whether the client keeps up. Raises ConnectionResetError when nobody is there."""
        if self.lost or self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the client is gone")
        self._transport.write(data)
        return self._writable is None

    async def written(self) -> None:
        """Wait while the client is behind. Raises ConnectionResetError when it goes."""
        if self._writable is not None:
            await asyncio.shield(self._writable)  # shared with `resume_writing`, whoever is cancelled here

    def answer(self, request: HttpRequest, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a whole answer. Raises ConnectionResetError."""
        self.began = self.ended = True
        if request.answer_headers:
            headers = {**headers, **request.answer_headers}
        self._answer(status, headers, body, keep=self._keeps(request), bodiless=request.method == "HEAD")

    def begin(self, request: HttpRequest, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of a stream. Raises ConnectionResetError."""
        self.began = True
        if request.answer_headers:
            headers = {**headers, **request.answer_headers}
        self.write(_head(status, headers, self._listener.date, keep=self._keeps(request)))

    def switch(self, request: HttpRequest, headers: Mapping[str, str], take: Callable[[bytes], None]) -> None:
        """Agree to another protocol: from now on what the client sends goes to `take`.

        Raises ConnectionResetError when the client is gone, or did not wait for this answer.
        """
        if self._queue or self._deaf or not request.complete:
            raise ConnectionResetError("the client did not wait for the new protocol")
        self.began = True
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.write(f"HTTP/1.1 101 Switching Protocols\r\n{lines}\r\n".encode("latin-1"))
        self._tunnel = take

    def pause_reading(self, pause: bool) -> None:
        """Read no further, or go on, while in a tunnel."""
        self._pause(pause)

    def _answer(
        self, status: int, headers: Mapping[str, str], body: bytes, *, keep: bool, bodiless: bool = False
    ) -> None:
        if status not in _NO_BODY:
            headers = {**headers, "Content-Length": str(len(body))}
        head = _head(status, headers, self._listener.date, keep=keep)
        self.write(head if bodiless or status in _NO_BODY else head + body)


class ClientSink:
    """A client that waits for its answer. `headers` go with every answer."""

    __slots__ = ("_bodiless", "_chunked", "_connection", "_headers", "_request", "started")

    def __init__(self, request: HttpRequest, headers: Mapping[str, str]) -> None:
        self._request = request
        self._connection = request.connection
        self._headers = headers
        self._chunked = self._bodiless = False
        self.started = False

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """See `Sink.start`."""
        self.started = True
        request = self._request
        self._bodiless = request.method == "HEAD" or status in _NO_BODY
        self._chunked = not self._bodiless and not request.old
        if request.old and not self._bodiless:
            request.keep_alive = False  # the end of the connection is the end of the stream
        framing = {"Transfer-Encoding": "chunked"} if self._chunked else {}
        headers = {"Cache-Control": "no-cache", **headers, **self._headers, **framing}
        self._connection.begin(request, status, headers)

    async def write(self, chunk: bytes) -> None:
        """See `Sink.write`."""
        if not self.push(chunk):
            await self._connection.written()

    def push(self, chunk: bytes) -> bool:
        """See `Sink.push`."""
        if not chunk or self._bodiless:
            return True
        return self._connection.write(self._framed(chunk))

    async def written(self) -> None:
        """See `Sink.written`."""
        await self._connection.written()

    async def end(self) -> None:
        """See `Sink.end`."""
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")
        self._connection.ended = True

    async def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """See `Sink.answer`."""
        self.started = True
        self._connection.answer(self._request, status, {**headers, **self._headers}, body)

    def _framed(self, chunk: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(chunk), chunk) if self._chunked else chunk

    async def fail(self, refusal: Refusal) -> None:
        """Say why there is no answer; or, in a stream that has begun, why it ends, and cut the connection."""
        release_frames(refusal)
        if not self.started:
            await self.answer(refusal.status, refusal.headers(), refusal.body(self._request.path))
            return
        if not self._connection.lost:
            event = refusal.sse(self._request.path)
            self._connection.write(self._framed(event))  # without waiting for one who does not read
        self._connection.close()  # after what is buffered, and without the last chunk: not a whole answer


def _head(status: int, headers: Mapping[str, str], date: str, *, keep: bool) -> bytes:
    lines = [_STATUS_LINES.get(status) or f"HTTP/1.1 {status} Unknown\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
    lines.append(f"Date: {date}\r\n\r\n" if keep else f"Date: {date}\r\nConnection: close\r\n\r\n")
    return "".join(lines).encode("latin-1", "replace")
