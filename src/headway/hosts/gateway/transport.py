"""All of the HTTP towards engines, behind three small interfaces, so that it can be made leaner in one place.

`Transport` sends and gives an `Answer`; a `Sink` is where an answer goes. Nothing here looks into a body.
asyncio and uvloop set TCP_NODELAY on every TCP socket, which is what keeps first tokens from waiting 40
ms for an ACK; a test holds us to it.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import aiohttp

from headway.core.errors import EngineError

__all__ = ["AiohttpTransport", "Answer", "Sink", "Transport", "TransportError"]

#: Larger answers that are no stream are refused: they are kept whole, so that they can be asked for again.
MOST_ANSWER_BYTES = 256 << 20


class TransportError(EngineError):
    """The connection failed. `refused`: nobody listens there, so nothing was computed either."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class Answer(Protocol):
    """An engine's answer, whose head is read. `close` it whatever happens: unread, the engine is told to
    stop.
    """

    status: int
    headers: Mapping[str, str]

    async def read(self) -> bytes:
        """Return the whole body. Raises TransportError."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Iterate over the body as it comes, undivided and unjoined. Raises TransportError."""

    def close(self) -> None:
        """Give the connection back, or cut it when the body was not read to its end."""


class Transport(Protocol):
    """Sends requests to engines."""

    async def send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        """Send a request and return the answer when its head is there. Raises TransportError."""

    async def close(self) -> None:
        """Close all connections."""


class Sink(Protocol):
    """Where an answer goes: the client. `started`: a byte has gone out, nothing can be taken back."""

    started: bool

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Begin a stream."""

    async def write(self, chunk: bytes) -> None:
        """Send a piece, and wait while the client is behind."""

    async def end(self) -> None:
        """End the stream well."""

    async def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a whole answer."""


class AiohttpAnswer:
    """An answer that aiohttp reads."""

    __slots__ = ("_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def read(self) -> bytes:
        """See `Answer.read`."""
        if (self._response.content_length or 0) > MOST_ANSWER_BYTES:
            raise TransportError(f"an answer of {self._response.content_length} bytes")
        try:
            return await self._response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise TransportError(_say(error)) from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """See `Answer.chunks`."""
        content = self._response.content
        try:
            while chunk := await content.readany():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise TransportError(_say(error)) from error

    def close(self) -> None:
        """See `Answer.close`."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class AiohttpTransport:
    """One pool of connections for all engines, without a bound: the buffer is the bound."""

    def __init__(self, *, connect_timeout_s: float, tls: ssl.SSLContext | bool = True) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=30, ssl=tls, keepalive_timeout=30.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=1 << 18,
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept", "Content-Type"),
        )

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> AiohttpAnswer:
        """See `Transport.send`."""
        try:
            return AiohttpAnswer(
                await self._session.request(method, url, headers=headers, data=body, allow_redirects=False)
            )
        except aiohttp.ClientConnectorError as error:
            raise TransportError(_say(error), refused=True) from error
        except TimeoutError as error:
            raise TransportError("connecting took too long", refused=True) from error
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            raise TransportError(_say(error)) from error

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._session.close()


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
