"""Decides how an engine tells what its passes do: a PUB socket that never blocks, a ROUTER that answers.

Rule 1. An engine is never held up by who listens. PUB drops for a subscriber that lags more than
        `high_water_mark` messages behind; it finds the gap in the sequence and asks for a snapshot.
Rule 2. The answer to a snapshot request goes to who asked, and out on PUB as well: a snapshot takes a number
        of the sequence, and without it everybody else would see a gap, ask in turn, and never come to rest.
Rule 3. What cannot be answered (`on_snapshot` returns nothing: the engine is down) is not answered.
"""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import zmq

from headway.core.errors import ConfigError
from headway.wire.schema import SCHEMA, PassEvent, encode

__all__ = ["REQUEST", "Publisher", "has_sound_port"]

#: The one request there is: "send me what you are and how you stand".
REQUEST = f"{SCHEMA} snapshot".encode()

_TOPIC = f"{SCHEMA}/".encode()

#: Longest request looked at; no valid one comes near.
_MAX_REQUEST_BYTES = 1024


class Publisher:
    """Publishes the pass events of one engine (or of a few, each with its own sequence).

    `bind` and `snapshot_bind` are ZeroMQ endpoints; port 0 or `*` takes a free one, `endpoint` and
    `snapshot_endpoint` say which. `on_snapshot` returns the `InstanceUp` and `Snapshot` of every engine
    behind it. Inside asyncio, use it as an async context manager, which answers requests by itself;
    elsewhere call `answer()` now and then from the thread that publishes, and `close()` in the end.

    Raises ConfigError when an endpoint cannot be bound.
    """

    def __init__(
        self,
        bind: str,
        snapshot_bind: str | None = None,
        on_snapshot: Callable[[], Sequence[PassEvent]] = tuple,
        *,
        high_water_mark: int = 4096,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self._on_snapshot = on_snapshot
        self._context = context or zmq.Context.instance()
        self._loop: asyncio.AbstractEventLoop | None = None  # that watches the router
        self._router: zmq.Socket[bytes] | None = None
        self._events = self._context.socket(zmq.PUB)
        try:
            self._events.setsockopt(zmq.SNDHWM, high_water_mark)
            self.endpoint = _bind(self._events, bind)
            self.snapshot_endpoint: str | None = None
            if snapshot_bind is not None:
                self._router = self._context.socket(zmq.ROUTER)
                self._router.setsockopt(zmq.MAXMSGSIZE, _MAX_REQUEST_BYTES)
                self.snapshot_endpoint = _bind(self._router, snapshot_bind)
        except BaseException:
            self.close()
            raise

    def publish(self, event: PassEvent) -> None:
        """Send an event to all who listen, without ever waiting."""
        self._send(event.instance, encode(event))

    def answer(self) -> int:
        """Answer the snapshot requests that have come in; return how many."""
        answered = 0
        # Until a look finds nothing: the descriptor asyncio watches tells of a request once, and sending an
        # answer may use that up.
        while askers := self._askers():
            answered += self._answer(askers)
        return answered

    def close(self) -> None:
        """Close the sockets, once. What was published just now has 0.1 s to leave."""
        if self._loop is not None and self._router is not None:
            self._loop.remove_reader(self._router)
        self._loop = None
        self._events.close(linger=100)
        if self._router is not None:
            self._router.close(linger=0)

    async def __aenter__(self) -> Self:
        if self._router is not None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._router, self.answer)
            self.answer()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, instance: str, message: bytes) -> None:
        # PUB never says EAGAIN: beyond the high water mark it drops.
        self._events.send_multipart([_TOPIC + instance.encode(), message], zmq.NOBLOCK)

    def _askers(self) -> list[bytes]:
        """Who asked since the last look, each once."""
        askers: dict[bytes, None] = {}
        while self._router is not None and self._router.poll(0):
            asker, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            if frames == [REQUEST]:
                askers[asker] = None
        return list(askers)

    def _answer(self, askers: list[bytes]) -> int:
        events = self._on_snapshot()
        if not events or self._router is None:
            return 0
        messages = [encode(event) for event in events]
        for event, message in zip(events, messages, strict=True):
            self._send(event.instance, message)
        for asker in askers:
            self._router.send_multipart([asker, *messages], zmq.NOBLOCK)
        return len(askers)


def has_sound_port(address: str) -> bool:
    """Return whether a TCP address ends in a port that can be. ZeroMQ itself takes 99999 for another port.

    Addresses of other kinds have none.
    """
    if not address.startswith("tcp://"):
        return True
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not host:
        return False
    return port == "*" or (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535)


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    """Bind and return the endpoint that came of it, a free port filled in."""
    wanted = endpoint.removesuffix(":0") + ":*" if endpoint.endswith(":0") else endpoint
    if not has_sound_port(endpoint):
        raise ConfigError(f"cannot bind pass events to {endpoint!r}: the port must be from 0 to 65535")
    try:
        socket.bind(wanted)
    except zmq.ZMQError as error:
        raise ConfigError(f"cannot bind pass events to {endpoint!r}: {error.strerror}") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
