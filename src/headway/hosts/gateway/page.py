"""Serves the page at `/` and the data it lives on at `/admin/live`, as server-sent events.

The page itself is three files that say nothing about the cluster; a gate decides who gets the data. The page
is always on the admin bind. Without an admin bind it is on the public one, if operators can use it there
(`posture.py`).
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from headway.front.access import Access, Gate
from headway.front.errors import Refusal, unavailable
from headway.front.protocol import ClientSink, HttpRequest, HttpResponse, Routes, refused
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.live import Cursor, Live
from headway.hosts.gateway.posture import posture_of

__all__ = ["Page", "page_is_public"]

_FILES = {"/": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript")} | {
    "/style.css": ("style.css", "text/css")
}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
#: Between two tellings.
PERIOD_S = 0.25
#: A page left open on every screen of a floor must not slow the door.
MOST_VIEWERS = 32


def page_is_public(config: GatewayConfig) -> bool:
    """Return whether the page is on the public bind."""
    return config.admin.port is None and posture_of(config).page is not Access.NOBODY


class Page:
    """Handles the page's requests. `routes`: all of it; `open_routes`: what needs no token."""

    def __init__(self, live: Live, gate: Gate, *, clock: Callable[[], float]) -> None:
        self._live = live
        self._gate = gate
        self._clock = clock
        self._viewers = 0
        self._closing = asyncio.Event()
        files = Path(__file__).parent / "page"
        self._bodies = {path: (files / name).read_bytes() for path, (name, _) in _FILES.items()}
        if gate.access is Access.OPERATORS:  # so that the page asks for it before it is refused
            self._bodies["/"] = self._bodies["/"].replace(b"<html ", b'<html data-token="needed" ', 1)
        self.open_routes: Routes = {("GET", path): self._file for path in _FILES}
        self.routes: Routes = self.open_routes | {("GET", "/admin/live"): self._stream}

    def close(self) -> None:
        """End all streams."""
        self._closing.set()

    async def _file(self, request: HttpRequest) -> HttpResponse | None:
        kind = _FILES[request.path][1]
        headers = _HEADERS | {"Content-Type": f"{kind}; charset=utf-8"}
        return HttpResponse(200, self._bodies[request.path], headers)

    async def _stream(self, request: HttpRequest) -> HttpResponse | None:
        try:
            self._gate.check(request.headers)
            if self._viewers >= MOST_VIEWERS:
                raise unavailable("too_many_viewers", f"{MOST_VIEWERS} pages are open already.", 10.0)
        except Refusal as refusal:
            return refused(refusal)
        sink = ClientSink(request, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._viewers += 1
        try:
            await sink.start(200, {"Content-Type": "text/event-stream"})
            await self._tell(sink)
        finally:
            self._viewers -= 1
        return None

    async def _tell(self, sink: ClientSink) -> None:
        """Tell until the viewer goes or the gateway closes. A slow viewer waits for himself only."""
        cursor = Cursor()
        while not self._closing.is_set():
            told, cursor = self._live.tell(cursor, self._clock())
            await sink.write(b"data: " + told + b"\n\n")
            try:
                async with asyncio.timeout(PERIOD_S):
                    await self._closing.wait()
            except TimeoutError:
                continue
        await sink.end()
