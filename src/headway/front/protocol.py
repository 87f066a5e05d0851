"""One client's connection: HTTP/1.1 on an asyncio protocol with httptools' parser.

aiohttp's server took a third of the gateway's time per request, and lacked what a front door needs: an end
to headers that come a byte at a time, and errors in one shape. The rules:

Rule 1. Requests of a connection are handled one after the other; a client that goes away (or only shuts
        its sending side) cancels the one that is handled, and those behind it.
Rule 2. Every size is bounded: a header field, their number, the head, the trailer, the body. A client that
        sends its next request without waiting for the answer is read no further until it has it.
Rule 3. An answer that cannot be whole ends the connection, so that nobody takes it for the whole.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, NoReturn, cast
from urllib.parse import parse_qsl, unquote

import httptools
import orjson

from headway.front.errors import Refusal

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

#: Bytes of one header field, and fields of one request; of all together with the request line.
MOST_FIELD_BYTES, MOST_FIELDS, MOST_HEAD_BYTES = 16_384, 100, 65_536
#: Whoever is refused before its body is read whole may go on sending for so long, or it would see a reset
#: connection in place of the answer.
LINGER_S = 1.0

_log = logging.getLogger(__name__)
_NO_BODY = (204, 304)
_STATUS_LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n" for each in HTTPStatus}


@lru_cache(maxsize=256)
def _split(url: bytes) -> tuple[str, str, str]:
    """Split a target into path, decoded, query, and both as they came. Raises HttpParserInvalidURLError."""
    parts = httptools.parse_url(url)
    path = (parts.path or b"/").decode("latin-1")
    query = "" if parts.query is None else parts.query.decode("latin-1")
    return unquote(path) if "%" in path else path, query, f"{path}?{query}" if query else path


@lru_cache(maxsize=256)
def _lower(name: bytes) -> str:
    """Return a header's name in lower case."""
    return name.decode("latin-1").lower()


class HttpResponse:
    """A whole answer. The body's length is told by the connection."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.body = body
        self.headers = dict(headers or {})


def refused(refusal: Refusal) -> HttpResponse:
    """Return the answer that tells a client no."""
    return HttpResponse(refusal.status, refusal.body(), refusal.headers())


def json_answer(value: object, status: int = 200) -> HttpResponse:
    """Return a value as JSON."""
    return HttpResponse(status, orjson.dumps(value), {"Content-Type": "application/json"})


class HttpRequest:
    """A client's request, whose head is read; names of headers are in lower case.

    `path` is decoded; `target` is path and query as they came. `complete`: the body is there.
    `answer_headers` go with the answer, whatever it is.
    """

    __slots__ = (
        "_body",
        "_problem",
        "_size",
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
        "target",
    )

    def __init__(self, connection: "Connection", method: str, url: bytes, headers: dict[str, str]) -> None:
        self.connection = connection
        self.method = method
        self.headers = headers
        self.answer_headers: Mapping[str, str] = {}
        self.path, self.query_string, self.target = _split(url)
        self.complete = False
        self.keep_alive = False
        self.old = False
        self._body: list[bytes] = []
        self._size = 0
        self._problem: Refusal | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def query(self) -> dict[str, str]:
        """The query's fields; of equal names the last."""
        return dict(parse_qsl(self.query_string, keep_blank_values=True))

    async def read(self) -> bytes:
        """Return the whole body. Raises Refusal: 413 when it is too large, 400 when it is malformed."""
        if not self.complete and self._problem is None:
            if self.headers.get("expect", "").lower() == "100-continue":
                self.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._problem is not None:
            raise self._problem
        return self._body[0] if len(self._body) == 1 else b"".join(self._body)

    # What the connection calls

    def receive(self, piece: bytes, most_bytes: int) -> None:
        """Take a piece of the body."""
        self._size += len(piece)
        if self._size <= most_bytes:
            self._body.append(piece)
        elif self._problem is None:
            self._body.clear()
            self.fail(Refusal(413, "body_too_large", f"The body is larger than {most_bytes} bytes."))

    def end(self) -> None:
        """The body is whole."""
        self.complete = True
        self._wake()

    def fail(self, problem: Refusal) -> None:
        """The body will not be whole."""
        self._problem = problem
        self._wake()

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
        self._parser = httptools.HttpRequestParser(self)
        self.task: asyncio.Task[None] | None = None
        self._queue: deque[HttpRequest | Refusal] = deque()
        self._reading: HttpRequest | None = None  # whose body is under way
        self._current: HttpRequest | None = None  # that is handled
        # What is being read, and whether the bytes that came last held something else too
        self._in_head = self._in_trailer = self._mixed = False
        self._url = b""
        self._fields: dict[str, str] = {}
        self._field_count = self._head_bytes = 0
        self._problem: Refusal | None = None
        self._deaf = False  # whatever comes is dropped
        self._unread = False  # reading is paused
        self._writable: asyncio.Future[None] | None = None  # while the client is behind

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
        self._mixed = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:  # to HTTP/2 or a socket: we stay with what we are
            self._parser = httptools.HttpRequestParser(self)
            if rest := data[upgrade.args[0] :]:
                self.data_received(rest)
        except httptools.HttpParserError as error:
            self._broken(self._problem or Refusal(400, "bad_http", f"Not an HTTP request: {error}."))
        else:
            self._measure(len(data))
            ahead = len(self._queue) - (self._current is None)
            if ahead > 0 and not self._unread and self._transport is not None:
                self._unread = True
                self._transport.pause_reading()

    def _measure(self, size: int) -> None:
        """Bound what the parser keeps of a field that is not whole: bytes that came while no end was seen."""
        if (self._in_head or self._in_trailer) and not self._mixed:
            self._head_bytes += size
        if self._head_bytes > MOST_HEAD_BYTES:
            self._broken(_head_too_large())

    def eof_received(self) -> None:
        """Take a client that shuts its side for gone: nothing else tells of one that does not read."""
        if self.task is not None:
            self.task.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever waited for answers is gone."""
        self.lost = True
        self._listener.connections.discard(self)
        self._queue.clear()
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

    # What the parser calls

    def on_message_begin(self) -> None:
        """Expect a whole head, soon."""
        self._in_head = True
        self._url, self._fields = b"", {}
        self._field_count = self._head_bytes = 0
        self.deadline_s = self._loop.time() + self._listener.header_timeout_s

    def on_url(self, url: bytes) -> None:
        """Keep the target, or a piece of it."""
        self._url += url
        if len(self._url) > MOST_FIELD_BYTES:
            self._stop(_head_too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; of equal ones, all. What comes after a body in chunks is a trailer, and not kept."""
        if not self._in_head:
            return
        self._field_count += 1
        if len(name) + len(value) > MOST_FIELD_BYTES or self._field_count > MOST_FIELDS:
            self._stop(_head_too_large())
        key, text = _lower(name), value.decode("latin-1")
        known = self._fields.get(key)
        self._fields[key] = text if known is None else f"{known}, {text}"

    def on_headers_complete(self) -> None:
        """Handle the request, in its turn."""
        self._in_head = False
        parser = self._parser
        try:
            request = HttpRequest(self, parser.get_method().decode("latin-1"), self._url, self._fields)
        except httptools.HttpParserInvalidURLError:
            self._stop(Refusal(400, "bad_http", "The request's target is no path."))
        request.keep_alive = parser.should_keep_alive()
        request.old = parser.get_http_version() == "1.0"
        self._reading = request
        self._queue.append(request)
        self._kick()

    def on_chunk_header(self) -> None:
        """Expect a chunk, or after the last one a trailer."""
        self._in_trailer = self._mixed = True
        self._head_bytes = 0

    def on_body(self, piece: bytes) -> None:
        """Give the request a piece of its body."""
        self._in_trailer = False
        if self._reading is not None:
            self._reading.receive(piece, self._listener.most_body_bytes)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._in_trailer, self._mixed = False, True
        if self._reading is not None:
            self._reading.end()
            self._reading = None

    def _stop(self, problem: Refusal) -> NoReturn:
        """Stop parsing: what is raised in a callback comes out of `feed_data`."""
        self._problem = problem
        raise problem

    def _broken(self, problem: Refusal) -> None:
        """Say why nothing more is read, after the answers that are owed."""
        self._deaf = True
        self._in_head = False
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
        if self._in_head and not self._deaf:
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

    def _kick(self) -> None:
        if self.task is None:
            self.task = self._loop.create_task(self._serve())

    async def _serve(self) -> None:
        """Answer what waits, one request after the other."""
        try:
            while self._queue and not self.lost:
                item = self._queue.popleft()
                if self._unread and not self._queue and self._transport is not None:
                    self._unread = False
                    self._transport.resume_reading()
                if isinstance(item, Refusal):
                    self._answer(item.status, item.headers(), item.body(), keep=False)
                    self._end_kindly()
                elif not await self._handle(item):
                    break
                await self.written()  # a client that asks and does not read is owed one answer at a time
        except ConnectionError:
            self.abort()
        finally:
            self.task = self._current = None
            if not self._in_head:
                self.deadline_s = self._loop.time() + self._listener.keep_alive_s

    async def _handle(self, request: HttpRequest) -> bool:
        """Answer a request; return whether the connection can take another."""
        self.began = self.ended = False
        self._current = request
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
        self._current = None
        if not keep:
            self._end_kindly()
        return keep

    def _keeps(self, request: HttpRequest) -> bool:
        """Whether the connection goes on after the answer to this request."""
        return request.keep_alive and request.complete and not self._deaf and not self._listener.draining

    def _end_kindly(self) -> None:
        """End the connection so that a client that still sends gets to read the answer."""
        self._queue.clear()
        if self._transport is None or self._transport.is_closing():
            return
        if (self._reading is None and not self._deaf) or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._deaf = True
        self._transport.write_eof()
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
        headers = {**headers, **request.answer_headers}
        self._answer(status, headers, body, keep=self._keeps(request), bodiless=request.method == "HEAD")

    def begin(self, request: HttpRequest, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of a stream. Raises ConnectionResetError."""
        self.began = True
        headers = {**headers, **request.answer_headers}
        self.write(_head(status, headers, self._listener.date, keep=self._keeps(request)))

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
        if not self.started:
            await self.answer(refusal.status, refusal.headers(), refusal.body())
            return
        if not self._connection.lost:
            self._connection.write(self._framed(refusal.sse()))  # without waiting for one who does not read
        self._connection.close()  # after what is buffered, and without the last chunk: not a whole answer


def _head(status: int, headers: Mapping[str, str], date: str, *, keep: bool) -> bytes:
    lines = [_STATUS_LINES.get(status) or f"HTTP/1.1 {status} Unknown\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
    lines.append(f"Date: {date}\r\n\r\n" if keep else f"Date: {date}\r\nConnection: close\r\n\r\n")
    return "".join(lines).encode("latin-1", "replace")


def _head_too_large() -> Refusal:
    message = f"The headers are too large: {MOST_FIELDS} fields of {MOST_FIELD_BYTES} bytes, 64 KiB in all."
    return Refusal(431, "headers_too_large", message)
