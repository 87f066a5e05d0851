"""An HTTP client that costs the load generator little: one protocol a connection, idle ones used again."""

import asyncio
from collections import deque
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools


class Answer(NamedTuple):
    """What came back. `whole`: it came to its end, the connection did not break."""

    status: int
    body: bytes
    whole: bool


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._ended: asyncio.Future[bool] | None = None
        self._begun: asyncio.Future[None] | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._end(False)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._body.append(data)
        if self._begun is not None and not self._begun.done():
            self._begun.set_result(None)

    def on_message_complete(self) -> None:
        self._end(True)

    def _end(self, whole: bool) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(whole)
        if self._begun is not None and not self._begun.done():
            self._begun.set_result(None)

    def send(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._ended, self._begun = loop.create_future(), loop.create_future()
        self._transport.write(request)

    async def answer(self) -> Answer:
        assert self._ended is not None
        whole = await self._ended
        return Answer(self._parser.get_status_code() or 0, b"".join(self._body), whole)

    async def begun(self) -> None:
        assert self._begun is not None
        await self._begun

    def close(self) -> None:
        self._transport.abort()


class Client:
    """Connections to one server, as many as there are requests at once."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._idle: deque[_Connection] = deque()
        self._opening = asyncio.Semaphore(256)  # a backlog is finite

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Return a request as it goes over the wire."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
        kind = "Content-Type: application/json\r\n" if body else ""
        return f"{head}{kind}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def ask(self, request: bytes) -> Answer:
        """Send a request and return its answer."""
        connection = await self._send(request)
        try:
            answer = await connection.answer()
        except BaseException:
            connection.close()
            raise
        if answer.whole and not connection.lost:
            self._idle.append(connection)
        return answer

    async def ask_and_leave(self, request: bytes, after_s: float) -> None:
        """Send a request and go away with the first byte of its answer, or after so long."""
        connection = await self._send(request)
        try:
            async with asyncio.timeout(after_s):
                await connection.begun()
        except TimeoutError:
            pass
        finally:
            connection.close()

    async def cut(self, part: bytes, after_s: float) -> None:
        """Send a part of a request on a connection of its own, and go away after so long."""
        _, connection = await self._open()
        connection.send(part)
        await asyncio.sleep(after_s)
        connection.close()

    async def get(self, path: str) -> Answer:
        """Get a page."""
        return await self.ask(self.request("GET", path))

    async def _send(self, request: bytes) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost:
                break
        else:
            _, connection = await self._open()
        connection.send(request)
        return connection

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _open(self) -> tuple[asyncio.BaseTransport, _Connection]:
        async with self._opening:
            loop = asyncio.get_running_loop()
            return await loop.create_connection(_Connection, self._host, self._port)
