"""All of the HTTP towards engines, behind three small interfaces, so that it can be made leaner in one place.

`Transport` sends and gives an `Answer`; a `Sink` is where an answer goes. Nothing here looks into a body.
The client below is HTTP/1.1 on an asyncio protocol with httptools' parser: aiohttp's client took a third
of the gateway's time per request. asyncio and uvloop set TCP_NODELAY on every TCP socket, which is what
keeps first tokens from waiting 40 ms for an ACK; a test holds us to it.
"""

import asyncio
import errno
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from headway.core.errors import EngineError

__all__ = [
    "Answer",
    "Body",
    "ExhaustedError",
    "HttpTransport",
    "Sink",
    "Transport",
    "TransportError",
    "default_tls",
    "pieces_of",
]

#: Larger answers that are no stream are refused: they are kept whole, so that they can be asked for again.
MOST_ANSWER_BYTES = 256 << 20
#: An engine's headers are not longer than this.
MOST_HEAD_BYTES = 1 << 16
#: An engine is read no further while this much waits for the client.
HIGH_WATER_BYTES = 1 << 18
#: What the kernel says when it is not the other side that fails.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)
#: uvicorn, before vLLM and SGLang, closes idle connections after 5 s: ours must not be older.
IDLE_S = 4.0
#: A reused connection that ends this soon after a request was sent, without a byte of an answer, had been
#: closed by the engine before: the request is sent once more. Later, the engine may have worked on it.
STALE_S = 1.0


#: A request's body, whole or in pieces: what is put into a large one must not cost a copy of it.
Body = bytes | tuple[bytes | memoryview, ...]


def pieces_of(body: Body) -> tuple[bytes | memoryview, ...]:
    """Return the pieces of a body."""
    return body if isinstance(body, tuple) else (body,)


class TransportError(EngineError):
    """The connection failed. `refused`: nobody listens there, so nothing was computed either."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class _StaleError(TransportError):
    """A reused connection had been closed by the engine: nothing of an answer came."""


class ExhaustedError(TransportError):
    """This machine has no file or port left for a connection, which says nothing about the engine."""


class Answer(Protocol):
    """An engine's answer, whose head is read; names of headers are in lower case.

    `close` it whatever happens: not read to its end, the engine is told to stop.
    """

    status: int
    headers: Mapping[str, str]

    async def read(self) -> bytes:
        """Return the whole body. Raises TransportError."""

    async def next(self) -> bytes:
        """Return what has come of the body; empty at its end. Raises TransportError."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Iterate over the body as it comes. Raises TransportError."""

    async def pour(self, push: Callable[[bytes], bool], caught_up: Callable[[], Awaitable[None]]) -> None:
        """Hand over the rest of the body as it comes, in the very call that brings it.

        After a `push` that returns False the next waits for `caught_up`. Raises TransportError, and what
        they raise.
        """

    def close(self) -> None:
        """Give the connection back, or cut it when the body was not read to its end."""


class Transport(Protocol):
    """Sends requests to engines."""

    async def send(self, method: str, url: str, headers: Mapping[str, str], body: Body | None) -> Answer:
        """Send a request and return the answer when its head is there. Raises TransportError."""

    async def close(self) -> None:
        """Close all connections."""


class Sink(Protocol):
    """Where an answer goes: the client. `started`: a byte has gone out, nothing can be taken back."""

    started: bool

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Begin a stream."""

    def push(self, chunk: bytes) -> bool:
        """Send a piece; whether the client keeps up. Raises ConnectionError when it is gone."""

    async def written(self) -> None:
        """Wait while the client is behind. Raises ConnectionError."""

    async def write(self, chunk: bytes) -> None:
        """Send a piece, and wait while the client is behind."""

    async def end(self) -> None:
        """End the stream well."""

    async def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a whole answer."""


class _Connection(asyncio.Protocol):
    """One connection to an engine; one request at a time. It is its own answer."""

    def __init__(self, pool: "HttpTransport", origin: tuple[str, int, bool]) -> None:
        self.origin = origin
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self._fields: dict[str, str] = {}
        self.idle_since_s = 0.0
        self.lost = False
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._body: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._problem = ""  # what broke the connection
        self._headed = self._complete = self._paused = self._bodiless = self._keeps = False
        self._used = self._reused = False  # it was asked; it had been asked before the present request
        self._answered = False  # a byte of the present answer came
        self._stale = False  # it ended without one, as soon as it was asked
        self._asked_s = 0.0
        self._push: Callable[[bytes], bool] | None = None  # takes what comes, while somebody pours
        self._behind = False  # whoever takes it is
        self._thrown: Exception | None = None  # by whoever takes it

    # What asyncio and the parser call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        """Parse what came; what nobody asked for ends the connection."""
        if self._parser is None:
            self.cut()
            return
        self._answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # no request offers an upgrade
            self._fail("the engine's answer is no HTTP")
            return
        if not self._headed and self._head_bytes > MOST_HEAD_BYTES:
            self._fail("the engine's headers are too long")
            return
        if self._waiting_bytes > HIGH_WATER_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        if self._push is None or not self._body or self._pass_on(self._push):
            self._wake()

    def _pass_on(self, push: Callable[[bytes], bool]) -> bool:
        """Hand over what came; whether the one who pours has to see to something."""
        try:
            keeps_up = push(self._take())
        except Exception as error:
            keeps_up, self._thrown = False, error
        if not keeps_up:
            self._push, self._behind = None, True
        return self._complete or not keeps_up

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end; of an answer without a length it is the good end."""
        self.lost = True
        by_length = "content-length" in self.headers or "transfer-encoding" in self.headers
        if self._headed and not by_length and exc is None:
            self._complete = True
        elif not self._complete and not self._problem:
            self._stale = self._reused and not self._answered and self._loop.time() - self._asked_s < STALE_S
            self._problem = f"the connection broke{f': {exc}' if exc else ''}"
        self._parser = None  # it and the connection refer to each other
        self._wake()

    def on_message_begin(self) -> None:
        """One answer is what was asked for; the parser makes an error of this one."""
        if self._complete:
            raise EngineError("a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; of equal ones, all."""
        self._head_bytes += len(name) + len(value)
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        known = self._fields.get(key)
        self._fields[key] = text if known is None else f"{known}, {text}"

    def on_headers_complete(self) -> None:
        """The head is there, unless it is only an interim one."""
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        if self.status < 200:
            self._fields.clear()
            return
        if self._fields.get("transfer-encoding", "chunked").strip().lower() != "chunked":
            raise EngineError("a transfer coding that is not chunked")
        self._headed = True
        self._complete = self._bodiless

    def on_body(self, data: bytes) -> None:
        """Keep a piece."""
        self._body.append(data)
        self._waiting_bytes += len(data)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if self.status >= 200 and self._parser is not None:
            self._complete = True
            self._keeps = self._parser.should_keep_alive()

    # What the gateway calls

    async def ask(self, head: bytes, body: Body, *, bodiless: bool) -> None:
        """Send a request and wait for the head of its answer. Raises TransportError."""
        assert self._transport is not None
        if self.lost:
            raise _StaleError("the connection broke")
        self._reused, self._answered, self._asked_s = self._used, False, self._loop.time()
        self._used = True
        self._parser = httptools.HttpResponseParser(self)
        self._headed = self._complete = False
        self._bodiless = bodiless
        self._head_bytes = 0
        self.headers = self._fields = {}
        if isinstance(body, bytes) and len(body) < HIGH_WATER_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            await self._write_on(body)
        while not self._headed:
            await self._more()

    async def _write_on(self, body: Body) -> None:
        """Send a large body over several turns of the loop: one write of it can take tens of milliseconds."""
        for piece in pieces_of(body):
            for at in range(0, len(piece), HIGH_WATER_BYTES):
                if self.lost or self._transport is None:
                    return
                self._transport.write(memoryview(piece)[at : at + HIGH_WATER_BYTES])
                await asyncio.sleep(0)

    async def read(self) -> bytes:
        """See `Answer.read`."""
        pieces: list[bytes] = []
        size = 0
        async for chunk in self.chunks():
            pieces.append(chunk)
            size += len(chunk)
            if size > MOST_ANSWER_BYTES:
                raise TransportError(f"an answer of more than {MOST_ANSWER_BYTES} bytes")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def chunks(self) -> AsyncIterator[bytes]:
        """See `Answer.chunks`."""
        while chunk := await self.next():
            yield chunk

    async def next(self) -> bytes:
        """See `Answer.next`."""
        while not self._body:
            if self._complete:
                return b""
            await self._more()
        return self._take()

    async def pour(self, push: Callable[[bytes], bool], caught_up: Callable[[], Awaitable[None]]) -> None:
        """See `Answer.pour`."""
        self._behind = False
        try:
            while True:
                if self._body:
                    self._behind = not push(self._take())
                if self._behind:
                    self._behind = False
                    await caught_up()
                elif self._complete:
                    return
                else:
                    self._push = push
                    await self._more()
                    self._push = None
                    if self._thrown is not None:
                        raise self._thrown
        finally:
            self._push = self._thrown = None

    def close(self) -> None:
        """See `Answer.close`."""
        self._pool.connections.discard(self)
        reusable = self._complete and not self._body and not self.lost and not self._problem
        if reusable and not self._bodiless and self._keeps:
            self._resume()
            self._parser = None
            self._pool.take_back(self)
        else:
            self.cut()

    def cut(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _take(self) -> bytes:
        whole = self._body.popleft() if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._waiting_bytes = 0
        self._resume()
        return whole

    def _resume(self) -> None:
        if self._paused and self._transport is not None and not self.lost:
            self._paused = False
            self._transport.resume_reading()

    async def _more(self) -> None:
        """Wait until something has come, or raise what went wrong."""
        if self._problem:
            raise (_StaleError if self._stale else TransportError)(self._problem)
        if self.lost:
            raise TransportError("the connection broke")
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, problem: str) -> None:
        self._problem = problem
        self.cut()
        self._wake()


class HttpTransport:
    """Connections to all engines, kept alive while idle for a little, and without a bound: the buffer is
    it.
    """

    def __init__(self, *, connect_timeout_s: float, tls: ssl.SSLContext | None = None) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._idle: dict[tuple[str, int, bool], deque[_Connection]] = {}
        self.connections: set[_Connection] = set()

    async def send(self, method: str, url: str, headers: Mapping[str, str], body: Body | None) -> Answer:
        """See `Transport.send`. A request that meets a stale connection is sent once more, on a new one."""
        origin, host, path = _parts(url)
        lines = [f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
        if body is not None:
            lines.append(f"Content-Length: {sum(map(len, pieces_of(body)))}\r\n")
        lines.append("\r\n")
        head = "".join(lines).encode("latin-1", "replace")
        bodiless = method == "HEAD"
        connection = self._reuse(origin)
        if connection is not None:
            with suppress(_StaleError):
                return await self._ask(connection, head, body or b"", bodiless=bodiless)
        return await self._ask(await self._connect(origin), head, body or b"", bodiless=bodiless)

    async def _ask(self, connection: _Connection, head: bytes, body: Body, *, bodiless: bool) -> Answer:
        self.connections.add(connection)
        try:
            await connection.ask(head, body, bodiless=bodiless)
        except BaseException:
            connection.close()
            raise
        return connection

    def take_back(self, connection: _Connection) -> None:
        """Keep a connection for the next request."""
        connection.idle_since_s = self._loop.time()
        self._idle.setdefault(connection.origin, deque()).append(connection)

    async def close(self) -> None:
        """See `Transport.close`."""
        for connection in [c for idle in self._idle.values() for c in idle] + list(self.connections):
            connection.cut()
        self._idle.clear()
        await asyncio.sleep(0)  # lets the transports close

    def _reuse(self, origin: tuple[str, int, bool]) -> _Connection | None:
        """Return the connection that was used last; older ones that are stale go."""
        idle = self._idle.get(origin)
        oldest_s = self._loop.time() - IDLE_S
        while idle and (idle[0].lost or idle[0].idle_since_s < oldest_s):
            idle.popleft().cut()
        while idle:
            connection = idle.pop()
            if not connection.lost:
                return connection
        return None

    async def _connect(self, origin: tuple[str, int, bool]) -> _Connection:
        host, port, secure = origin
        tls = (self._tls or default_tls()) if secure else None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self, origin), host, port, ssl=tls
                )
        except TimeoutError:
            raise TransportError("connecting took too long", refused=True) from None
        except UnicodeError:  # no name of a host: IDNA's labels have 1 to 63 characters
            raise TransportError(f"cannot connect: {host[:100]!r} is no host", refused=True) from None
        except (OSError, ssl.SSLError) as error:
            if error.errno in _EXHAUSTED:
                raise ExhaustedError(f"the gateway cannot connect: {error.strerror}") from error
            raise TransportError(f"cannot connect: {_why(error)}", refused=True) from error
        return connection


def _why(error: OSError) -> str:
    """Say in few words why a connection could not be made."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, socket.gaierror):
        return "host name not found"
    return error.strerror or str(error)


@lru_cache(maxsize=1)
def default_tls() -> ssl.SSLContext:
    """Return what connections to engines over TLS are made with. Reading the authorities takes long: once."""
    return ssl.create_default_context()


@lru_cache(maxsize=4096)
def _parts(url: str) -> tuple[tuple[str, int, bool], str, str]:
    """Split a URL into (host, port, secure), the Host header and the path."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    origin = (parts.hostname or "", parts.port or (443 if secure else 80), secure)
    return origin, parts.netloc, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
