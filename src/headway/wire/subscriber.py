"""Decides when a scheduler asks an engine how it stands: at the start, after a gap, and when it is silent.

Rule 1. What is done about an event is `order.py`'s to say; garbage is counted and dropped, and never ends the
        subscription.
Rule 2. Silence of `silence_s` is a reason to ask: an idle engine that restarted says nothing by itself.
Rule 3. A request is repeated every `retry_s` until answered. ZeroMQ connects again by itself.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio

from headway.core.errors import ConfigError, EngineError
from headway.wire.order import Order
from headway.wire.publisher import REQUEST
from headway.wire.schema import PassEvent, decode

__all__ = ["Subscriber"]

#: Any version: one this side cannot read shall be counted as garbage rather than never be seen.
_TOPIC = b"headway.pass/"

_MAX_MESSAGE_BYTES = 1 << 20


class Subscriber:
    """Listens to one publisher, hands its events to `on_event` inside the event loop. Async context manager.

    Without `snapshot_connect` nothing can be asked for: events of instances nobody introduced are handed on
    as they come. `gaps`, `stale`, `garbage`, `snapshots` count since the start. Raises ConfigError for an
    endpoint that cannot be.
    """

    def __init__(
        self,
        connect: str,
        snapshot_connect: str | None,
        on_event: Callable[[PassEvent], None],
        *,
        silence_s: float = 1.0,
        retry_s: float = 0.25,
        high_water_mark: int = 4096,
        context: zmq.asyncio.Context | None = None,
    ) -> None:
        self.garbage = self.snapshots = 0
        self._connect, self._snapshot_connect = connect, snapshot_connect
        self._on_event = on_event
        self._silence_s, self._retry_s = silence_s, retry_s
        self._high_water_mark = high_water_mark
        self._context = context or zmq.asyncio.Context.instance()
        self._order = Order(can_ask=snapshot_connect is not None)
        self._asked = False
        self._heard_s = 0.0
        self._wake = asyncio.Event()
        self._sockets: list[zmq.asyncio.Socket] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def gaps(self) -> int:
        """How often numbers were left out."""
        return self._order.gaps

    @property
    def stale(self) -> int:
        """How many events came too late, or twice."""
        return self._order.stale

    def request_snapshot(self) -> None:
        """Ask the engine for `InstanceUp` and `Snapshot` (`Poll`); repeated until it answers."""
        if self._snapshot_connect is not None and not self._asked:
            self._asked = True
            self._wake.set()

    async def __aenter__(self) -> Self:
        try:
            events = self._open(zmq.SUB, self._connect)
            events.setsockopt(zmq.SUBSCRIBE, _TOPIC)
            self._tasks.append(asyncio.create_task(self._listen(events)))
            if self._snapshot_connect is not None:
                asking = self._open(zmq.DEALER, self._snapshot_connect)
                self._tasks.append(asyncio.create_task(self._ask(asking)))
                self._tasks.append(asyncio.create_task(self._hear_answers(asking)))
        except BaseException:
            await self.close()
            raise
        self.request_snapshot()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop listening."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for socket in self._sockets:
            socket.close(linger=0)
        self._tasks, self._sockets = [], []

    def _open(self, kind: int, endpoint: str) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.setsockopt(zmq.RCVHWM, self._high_water_mark)
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if kind == zmq.DEALER:  # one request on its way is enough, also to an engine that is down
            socket.setsockopt(zmq.SNDHWM, 1)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot connect to pass events at {endpoint!r}: {error.strerror}") from None
        return socket

    # The sockets

    async def _listen(self, events: zmq.asyncio.Socket) -> None:
        while True:
            _, *messages = await events.recv_multipart()
            self._take(messages)

    async def _hear_answers(self, asking: zmq.asyncio.Socket) -> None:
        while True:
            messages = await asking.recv_multipart()
            self.snapshots += 1
            self._asked = False
            self._take(messages)

    async def _ask(self, asking: zmq.asyncio.Socket) -> None:
        """Send requests when they are due: asked for, unanswered, or it has been too quiet."""
        clock = asyncio.get_running_loop().time
        while True:
            quiet_s = clock() - self._heard_s
            if self._asked or quiet_s >= self._silence_s:
                self._asked = True
                await _send_if_possible(asking)
            pause_s = self._retry_s if self._asked else self._silence_s - quiet_s
            with suppress(TimeoutError):
                # Not `wait_for`: until Python 3.12 it swallows a cancellation that comes as it is woken, and
                # `close` would wait for this task for ever.
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            self._wake.clear()

    # The events

    def _take(self, messages: list[bytes]) -> None:
        self._heard_s = asyncio.get_running_loop().time()
        for message in messages:
            try:
                event = decode(message)
            except EngineError:
                self.garbage += 1
                continue
            hand_on, ask = self._order.take(event)
            if hand_on:
                self._hand_on(event)
            if ask:
                self.request_snapshot()

    def _hand_on(self, event: PassEvent) -> None:
        """A listener that breaks is reported, and hears the next event all the same."""
        try:
            self._on_event(event)
        except Exception as error:
            context = {"message": f"listener of {self._connect} failed on {event}", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)


async def _send_if_possible(asking: zmq.asyncio.Socket) -> None:
    with suppress(zmq.Again):  # the last request has not left yet: the engine is not there
        await asking.send(REQUEST, zmq.NOBLOCK)
