"""Accepts clients' connections on one address, ends those on which nothing comes, and stops kindly."""

import asyncio
import os
import resource
import socket
import ssl
import sys
from collections.abc import Callable
from email.utils import formatdate
from time import time

from headway.core.errors import ConfigError
from headway.front.buffer import ByteBudget
from headway.front.errors import Refusal
from headway.front.protocol import Connection, Handler

__all__ = ["Listener"]

#: Connections that the kernel keeps until they are accepted.
BACKLOG = 4096
#: An idle connection is kept so long: longer than the pools of usual clients keep theirs (15 to 60 s), so
#: that it is they who close, and no request crosses with our end.
KEEP_ALIVE_S = 75.0
#: Of the files this process may have open, so many are for clients' connections. The rest is for those to
#: engines, of which a held request needs none.
CONNECTIONS_SHARE = 0.8
#: Handlers have so long to end by themselves when the gateway stops.
STOP_S = 0.2


def most_connections() -> int:
    """Return how many clients may be connected: a share of the files this process may have open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if files == resource.RLIM_INFINITY else int(CONNECTIONS_SHARE * files)


class Listener:
    """One address. `draining`: every answer is the last of its connection.

    `on_refused` hears of what was refused before there was a request to handle. `budget` counts the bytes of
    all bodies; several listeners may share one.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        header_timeout_s: float,
        most_body_bytes: int,
        budget: ByteBudget | None = None,
        on_refused: Callable[[Refusal], None] = lambda refusal: None,
    ) -> None:
        self.handler = handler
        self.on_refused = on_refused
        self.header_timeout_s = header_timeout_s
        self.keep_alive_s = KEEP_ALIVE_S
        self.most_body_bytes = most_body_bytes
        self.budget = budget or ByteBudget(sys.maxsize)
        self.most_connections = most_connections()
        self.connections: set[Connection] = set()
        self.draining = False
        self.date = formatdate(time(), usegmt=True)
        self._loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None) -> str:
        """Accept connections; return the URL. Raises ConfigError when the address cannot be bound."""
        try:
            self._server = await self._loop.create_server(
                lambda: Connection(self),
                host,
                port,
                ssl=tls,
                backlog=BACKLOG,
                ssl_handshake_timeout=None if tls is None else self.header_timeout_s,
            )
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {_reason(error)}") from None
        self._sweep()
        bound = self._server.sockets[0].getsockname()[1]
        return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{bound}"

    def drain(self) -> None:
        """Accept nothing more, and end each connection when its request is answered."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            if connection.idle:
                connection.close()

    async def close(self) -> None:
        """End everything: what is handled has a moment, then it is cancelled."""
        self.drain()
        if self._sweeper is not None:
            self._sweeper.cancel()
        deadline_s = self._loop.time() + STOP_S
        while self.connections and self._loop.time() < deadline_s:
            await asyncio.sleep(STOP_S / 20)
        tasks = [connection.task for connection in self.connections if connection.task is not None]
        for connection in list(self.connections):
            connection.abort()
        if tasks:
            await asyncio.wait(tasks)
        while self.connections:
            await asyncio.sleep(0)

    def _sweep(self) -> None:
        """Look once a second at all connections: a timer for each would cost every request one."""
        now = self._loop.time()
        self.date = formatdate(time(), usegmt=True)
        for connection in [c for c in self.connections if c.deadline_s < now and c.idle]:
            connection.expire()
        self._sweeper = self._loop.call_later(min(1.0, self.header_timeout_s / 4), self._sweep)


def _reason(error: OSError) -> str:
    """Return why an address cannot be bound, without asyncio's words around it."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    return os.strerror(error.errno).lower()
