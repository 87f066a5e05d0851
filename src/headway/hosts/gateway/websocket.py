"""Tunnel WebSockets (`/v1/realtime`) to an engine: after the handshake bytes are piped both ways, unread.

Rule 1. Keys, limits and origin are checked like those of any request before an engine hears of it. A browser
        lets any site open a WebSocket and read it, so an `Origin` must be one that `[cors]` allows.
Rule 2. A side that does not read holds up the other: at most `HIGH_WATER_BYTES` wait in either direction.
Rule 3. A tunnel ends with either side, when nothing moved for `idle_timeout_s`, when its engine is gone, and
        when the gateway drains.
"""

import asyncio
import base64
import binascii
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

from headway.front.buffer import Buffer
from headway.front.config import LimitsSpec
from headway.front.errors import Refusal, bad_request, engine_failed
from headway.front.protocol import HttpRequest
from headway.front.request_fields import RESERVED
from headway.front.transport import default_tls
from headway.front.worker import Worker
from headway.hosts.gateway.endpoints import Endpoint
from headway.hosts.gateway.passthrough import Passthrough, check_query

__all__ = ["Tunnels"]

HIGH_WATER_BYTES, MOST_HEAD_BYTES = 1 << 18, 1 << 16
#: An engine has so long to take what a client sent before it went.
LINGER_S = 5.0
#: Of an engine's answer to the handshake, what the client needs.
_ANSWERED = ("sec-websocket-accept", "sec-websocket-protocol", "sec-websocket-extensions")


class Tunnels:
    """All tunnels of the gateway. `end_all` when it drains."""

    def __init__(self, passthrough: Passthrough, buffer: Buffer, limits: LimitsSpec) -> None:
        self._passthrough = passthrough
        self._buffer = buffer
        self._limits = limits
        self._open: set[_Tunnel] = set()

    def end_all(self) -> None:
        """End every tunnel."""
        for tunnel in list(self._open):
            tunnel.end()

    async def serve(
        self, endpoint: Endpoint, request: HttpRequest, request_id: str, *, origin_allowed: bool
    ) -> int:
        """Tunnel until either side ends; return 101. Raises Refusal before that, and ConnectionError."""
        _check(request, origin_allowed=origin_allowed)
        model = request.query.get("model")
        worker = await self._passthrough.choose(endpoint, await self._passthrough.model(model))
        headers = self._passthrough.headers(request.headers, request_id)
        self._buffer.admit(0, 0)
        self._buffer.leave(0, 0)  # it does not wait
        try:
            return await self._tunnel(worker, endpoint, request, headers)
        finally:
            self._buffer.done()

    async def _tunnel(
        self, worker: Worker, endpoint: Endpoint, request: HttpRequest, headers: Mapping[str, str]
    ) -> int:
        tunnel = _Tunnel(request, self._limits)
        self._open.add(tunnel)
        worker.legs.add(tunnel)
        try:
            query = f"?{request.query_string}" if request.query_string else ""
            await tunnel.connect(worker.spec.url + endpoint.path + query, headers)
            await tunnel.pipe()
        finally:
            tunnel.close()
            worker.legs.discard(tunnel)
            self._open.discard(tunnel)
        return 101


class _Tunnel:
    """One client's tunnel to one engine."""

    scheduled = False

    def __init__(self, request: HttpRequest, limits: LimitsSpec) -> None:
        self._request = request
        self._limits = limits
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._from_client = bytearray()
        self._news = asyncio.Event()  # bytes of the client's, or the end
        self._moved = False
        self._ended = False

    def abandon(self, worker: Worker) -> None:
        """End the tunnel: its engine is gone."""
        self.end()

    def end(self) -> None:
        """End the tunnel, after what has been written to the client."""
        self._ended = True
        self._news.set()
        self._request.connection.close()

    def close(self) -> None:
        """Close the connection to the engine, after what is left to be sent, in a bounded time."""
        if self._writer is not None:
            transport = self._writer.transport
            if not transport.is_closing():
                self._writer.write(bytes(self._from_client))
                transport.close()
                asyncio.get_running_loop().call_later(LINGER_S, transport.abort)
        self._reader = self._writer = None

    async def connect(self, url: str, headers: Mapping[str, str]) -> None:
        """Make the handshake with the engine and pass its answer on. Raises Refusal when it says no."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        lines = [f"GET {parts.path}{f'?{parts.query}' if parts.query else ''} HTTP/1.1\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in {"Host": parts.netloc, **headers}.items()]
        lines += ["Connection: Upgrade\r\n", "Upgrade: websocket\r\n\r\n"]
        try:
            async with asyncio.timeout(self._limits.connect_timeout_s):
                self._reader, self._writer = await asyncio.open_connection(
                    parts.hostname,
                    parts.port or (443 if secure else 80),
                    ssl=default_tls() if secure else None,
                    limit=MOST_HEAD_BYTES,
                )
            async with asyncio.timeout(self._limits.first_byte_timeout_s):
                self._writer.write("".join(lines).encode("latin-1"))
                head = await self._reader.readuntil(b"\r\n\r\n")
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise engine_failed(502) from None
        status, answered = _read_head(head)
        if status != 101:
            raise _refusal(status)
        passed = {name: value for name, value in answered.items() if name in _ANSWERED}
        self._request.connection.switch(
            self._request, {"Connection": "Upgrade", "Upgrade": "websocket", **passed}, self._take
        )

    async def pipe(self) -> None:
        """Pipe both ways until one side ends, or nothing moves for too long."""
        ways = [asyncio.create_task(way) for way in (self._to_engine(), self._to_client(), self._watch())]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.exception()  # an end, whatever it was
        finally:
            for each in ways:
                each.cancel()
            await asyncio.wait(ways)
        self._request.connection.close()

    def _take(self, data: bytes) -> None:
        """Take what the client sends; read no further while too much of it waits."""
        self._from_client += data
        self._news.set()
        self._request.connection.pause_reading(len(self._from_client) > HIGH_WATER_BYTES)

    async def _to_engine(self) -> None:
        assert self._writer is not None
        while not self._ended:
            await self._news.wait()
            self._news.clear()
            data = bytes(self._from_client)
            self._from_client.clear()
            self._request.connection.pause_reading(False)
            self._moved = True
            self._writer.write(data)
            await self._writer.drain()

    async def _to_client(self) -> None:
        assert self._reader is not None
        connection = self._request.connection
        while data := await self._reader.read(MOST_HEAD_BYTES):
            self._moved = True
            connection.write(data)
            await connection.written()

    async def _watch(self) -> None:
        """Return when nothing moved for `idle_timeout_s` to twice that."""
        self._moved = True
        while self._moved:
            self._moved = False
            await asyncio.sleep(self._limits.idle_timeout_s)


def _check(request: HttpRequest, *, origin_allowed: bool) -> None:
    """Raise Refusal unless a request is a sound WebSocket handshake of a site that may."""
    headers = request.headers
    offered = [each.strip().lower() for each in headers.get("upgrade", "").split(",")]
    if not request.upgrades or "websocket" not in offered or request.old:
        raise Refusal(426, "upgrade_required", f"{request.path} is a WebSocket: send Upgrade: websocket.")
    try:
        key = base64.b64decode(headers.get("sec-websocket-key", ""), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 16 or headers.get("sec-websocket-version") != "13":
        raise bad_request("The WebSocket handshake needs Sec-WebSocket-Key and Sec-WebSocket-Version: 13.")
    if "origin" in headers and not origin_allowed:
        raise Refusal(403, "origin_not_allowed", "This origin is not in cors.allowed_origins.")
    check_query(request.query_string)
    for name, _ in parse_qsl(request.query_string, keep_blank_values=True):
        if name.lower() in RESERVED:
            raise bad_request(f"The field {name!r} is the gateway's to set.", param=name)


def _read_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Return status and headers of an engine's answer. Raises Refusal (502) when it is no HTTP."""
    line, *lines = head.decode("latin-1").split("\r\n")
    words = line.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
        raise engine_failed(502)
    pairs = (each.partition(":") for each in lines if each)
    return int(words[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


def _refusal(status: int) -> Refusal:
    if 400 <= status < 500:
        return Refusal(status, "websocket_refused", f"The engine refuses the WebSocket with {status}.")
    return engine_failed(503 if status == 503 else 502)
