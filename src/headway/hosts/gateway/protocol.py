"""The client's side of HTTP: aiohttp's low-level server, with the two things it lacks at a front door.

A connection that sends its headers a byte at a time is ended after `header_timeout_s`; and what is no
HTTP gets an answer in the same shape as everything else. `ClientSink` is where answers go.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from headway.hosts.gateway.errors import Refusal

__all__ = ["ClientSink", "Handler", "make_server"]

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

#: Bytes of one header field, and fields of one request.
MOST_FIELD_BYTES, MOST_FIELDS = 16_384, 100


class Connection(RequestHandler):
    """One client's connection."""

    __slots__ = ("_header_timeout_s", "_header_timer", "answered")

    def __init__(self, *args: Any, header_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timeout_s = header_timeout_s
        self._header_timer: asyncio.TimerHandle | None = None
        self.answered = 0

    @property
    def idle(self) -> bool:
        """Whether no request is being read, waits or is served."""
        return self.answered == self._request_count

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Expect headers from the start."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Expect the rest of headers that have begun."""
        super().data_received(data)
        if not self.idle:
            self._stop_timer()
        elif self._header_timer is None:
            self._expect_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Expect nothing more."""
        self._stop_timer()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        loop = asyncio.get_running_loop()
        self._header_timer = loop.call_later(self._header_timeout_s, self._too_slow)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        self._header_timer = None
        if self.idle and self.transport is not None:
            refusal = Refusal(408, "header_timeout", f"No complete headers in {self._header_timeout_s:g} s.")
            self.transport.write(_raw(refusal))
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be parsed, and what our own code failed at."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun")
        if status >= 500:
            self.log_exception("a request failed inside the gateway", exc_info=exc)
            refusal = Refusal(500, "internal_error", "The gateway failed; this is a bug.")
        else:
            refusal = Refusal(status, "bad_http", f"Not an HTTP request: {(message or '').strip()[:200]}")
        response = web.Response(status=refusal.status, body=refusal.body(), headers=refusal.headers())
        response.force_close()
        return response


class _Server(web.Server):
    def __init__(
        self, handler: Handler, *, header_timeout_s: float, most_body_bytes: int, **kwargs: Any
    ) -> None:
        super().__init__(handler, request_factory=self._request, handler_cancellation=True, **kwargs)
        self._header_timeout_s = header_timeout_s
        self._most_body_bytes = most_body_bytes

    def _request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(
            message, payload, protocol, writer, task, self._loop, client_max_size=self._most_body_bytes
        )

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, header_timeout_s=self._header_timeout_s, **self._kwargs)


def make_server(handler: Handler, *, header_timeout_s: float, most_body_bytes: int) -> web.Server:
    """Return a server for `web.ServerRunner`. A client that goes away cancels its handler."""

    async def counted(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handler(request)
        finally:
            if isinstance(request.protocol, Connection):
                request.protocol.answered += 1

    return _Server(
        counted,
        header_timeout_s=header_timeout_s,
        most_body_bytes=most_body_bytes,
        access_log=None,
        keepalive_timeout=75.0,
        lingering_time=1.0,
        max_line_size=MOST_FIELD_BYTES,
        max_field_size=MOST_FIELD_BYTES,
        max_headers=MOST_FIELDS,
        auto_decompress=False,
    )


class ClientSink:
    """A client that waits for its answer."""

    __slots__ = ("_headers", "_request", "response", "started")

    def __init__(self, request: web.BaseRequest, headers: Mapping[str, str]) -> None:
        self._request = request
        self._headers = headers
        self.started = False
        self.response: web.StreamResponse | None = None

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """See `Sink.start`."""
        self.started = True
        self.response = web.StreamResponse(
            status=status, headers={**headers, **self._headers, "Cache-Control": "no-cache"}
        )
        await self.response.prepare(self._request)

    async def write(self, chunk: bytes) -> None:
        """See `Sink.write`."""
        assert self.response is not None
        await self.response.write(chunk)

    async def end(self) -> None:
        """See `Sink.end`."""
        assert self.response is not None
        await self.response.write_eof()

    async def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """See `Sink.answer`."""
        self.started = True
        self.response = web.Response(status=status, body=body, headers={**headers, **self._headers})

    async def fail(self, refusal: Refusal) -> web.StreamResponse:
        """Say why there is no answer; or, in a stream that has begun, why it ends, and cut the connection."""
        if not self.started:
            headers = {**refusal.headers(), **self._headers}
            return web.Response(status=refusal.status, body=refusal.body(), headers=headers)
        assert self.response is not None
        transport = self._request.transport
        try:
            await self.response.write(refusal.sse())
        except ConnectionError:
            return self.response
        if transport is not None:
            transport.close()  # sends what is buffered, then ends without the last chunk: not a whole answer
        return self.response


def _raw(refusal: Refusal) -> bytes:
    body = refusal.body()
    status = HTTPStatus(refusal.status)
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
