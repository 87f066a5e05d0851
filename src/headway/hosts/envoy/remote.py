"""An ext_proc process: serves Envoy's streams, and has them decided by the picker at the end of a socket.

    python -m headway.hosts.envoy.remote DESCRIPTOR

A picker starts it (`processors.py`) with its end of a socket; nobody else should. It lives as long as the
socket: with the picker gone nothing could be decided.
"""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import orjson
import uvloop

from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.front.body_reader import BodyReader
from headway.front.errors import Refusal
from headway.front.lengths import Lengths
from headway.front.logs import logging_as_json
from headway.front.process import raise_file_limit
from headway.hosts.envoy import wire
from headway.hosts.envoy.config import EppConfig
from headway.hosts.envoy.desk import Answer, Asked, Served
from headway.hosts.envoy.health import Health
from headway.hosts.envoy.processor import Processor
from headway.hosts.envoy.secure import Pem
from headway.hosts.envoy.stream import Tools

__all__ = ["RemoteDesk", "main"]

#: How often the picker is told how many streams are open, when that has changed.
TELL_OPEN_S = 0.1


class RemoteDesk:
    """The picker's desk, as seen from here: see `Desk`."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        self._send = send
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}

    async def place(self, asked: Asked) -> Answer:
        """See `Desk.place`."""
        return await self._ask(lambda number: wire.Place(number, asked))

    async def second(self, request_id: str, subset: frozenset[str] | None) -> Answer:
        """See `Desk.second`."""
        return await self._ask(lambda number: wire.Second(number, request_id, subset))

    async def aside(self, role: Role | None, subset: frozenset[str] | None) -> Answer:
        """See `Desk.aside`."""
        return await self._ask(lambda number: wire.Aside(number, role, subset))

    def told(self, key: str, envoy_id: str, peer: str = "") -> None:
        """See `Desk.told`."""
        self._send(wire.Told(key, envoy_id, peer))

    def first_byte(self, key: str) -> None:
        """See `Desk.first_byte`."""
        self._send(wire.FirstByte(key))

    def tokens(self, key: str, prompt_tokens: int | None, output_tokens: int | None) -> None:
        """See `Desk.tokens`."""
        self._send(wire.Tokens(key, prompt_tokens, output_tokens))

    def over(self, key: str, served: Served, peer: str = "") -> None:
        """See `Desk.over`."""
        self._send(wire.Over(key, served, peer))

    def broke_off(self, envoy_id: str, served: Served, peer: str = "") -> None:
        """See `Desk.broke_off`."""
        self._send(wire.BrokeOff(envoy_id, served, peer))

    def broke(self, peer: str) -> None:
        """See `Desk.broke`."""
        self._send(wire.Broke(peer))

    def hear(self, message: wire.Placed | wire.Denied) -> None:
        """Take in an answer."""
        waiting = self._waiting.pop(message.number, None)
        if isinstance(message, wire.Placed):
            if waiting is None or waiting.done():  # its client went away while the answer was on its way
                self.over(message.answer.key, Served(0))
            else:
                waiting.set_result(message.answer)
        elif waiting is not None and not waiting.done():
            waiting.set_exception(message.refusal())

    async def _ask(self, message: Callable[[int], Any]) -> Answer:
        number = next(self._numbers)
        waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            self._send(message(number))
            return await waiting
        except asyncio.CancelledError:
            if number in self._waiting:
                self._send(wire.Withdraw(number))
            elif waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self.over(waiting.result().key, Served(0))  # it came in this very turn
            raise
        finally:
            self._waiting.pop(number, None)


class _Process:
    """The process: from the picker's first message to its end."""

    def __init__(self) -> None:
        self.link = wire.Link(self._hear, self._lost)
        self.over = asyncio.Event()
        self.start: asyncio.Future[wire.Start] = asyncio.get_running_loop().create_future()
        self.drain: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._desk = RemoteDesk(self.link.send)
        self._ready = False

    async def run(self) -> None:
        """Serve until the picker is gone, or all is drained."""
        start = await self.start
        try:
            config = EppConfig.parse(orjson.loads(start.config), where="picker")
            reader = BodyReader(config.server.tokenizer)
        except ConfigError as error:
            self._fail(error)
            return
        with logging_as_json(config.logs):
            await self._serve(start, config, reader)

    async def _serve(self, start: wire.Start, config: EppConfig, reader: BodyReader) -> None:
        health = Health(lambda: self._ready)
        clock = asyncio.get_running_loop().time
        tools = Tools(config, self._desk, Lengths(), reader, clock, self._refused, start.reads_prefixes)
        pem = Pem(start.certificate, start.key, start.client_ca) if start.certificate else None
        processor = Processor(tools, health, pem, shared=True)
        await health.start()
        try:
            await processor.start(start.port)
        except ConfigError as error:
            self._fail(error)
            return
        self.link.send(wire.Up())
        telling = asyncio.create_task(self._tell_open(processor))
        ending = asyncio.create_task(self._drained(processor, health))
        gone = asyncio.create_task(self.over.wait())
        await asyncio.wait((ending, gone), return_when=asyncio.FIRST_COMPLETED)
        for task in (telling, ending, gone):
            task.cancel()
        await health.stop()
        await processor.stop()
        await reader.close()
        self.link.close()

    def _fail(self, error: ConfigError) -> None:
        self.link.send(wire.Up(str(error)))
        self.link.close()

    def _hear(self, message: Any) -> None:
        match message:
            case wire.Placed() | wire.Denied():
                self._desk.hear(message)
            case wire.Ready():
                self._ready = message.ready
            case wire.Start():
                self._ready = message.ready
                self.start.set_result(message)
            case wire.Drain():
                self._ready = False
                if not self.drain.done():
                    self.drain.set_result(message.patience_s)

    def _lost(self) -> None:
        self.over.set()
        if not self.start.done():
            self.start.cancel()

    async def _drained(self, processor: Processor, health: Health) -> None:
        patience_s = await self.drain
        await health.look()
        self.link.send(wire.Drained(await processor.drain(patience_s)))

    async def _tell_open(self, processor: Processor) -> None:
        told = 0
        while True:
            if processor.open != told:
                told = processor.open
                self.link.send(wire.Open(told))
            await asyncio.sleep(TELL_OPEN_S)

    def _refused(self, path: str, request_id: str, refusal: Refusal) -> None:
        self.link.send(wire.Refused(path, request_id, refusal.status, refusal.code))


async def _run(descriptor: int) -> None:
    process = _Process()
    end = socket.socket(fileno=descriptor)
    end.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: process.link, sock=end)
    await process.run()


def main() -> None:
    """Run it; the argument is the descriptor of the socket. What ends the picker is none of its business."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise_file_limit()
    with suppress(asyncio.CancelledError):  # the picker was gone before it said anything
        uvloop.run(_run(int(sys.argv[1])))


if __name__ == "__main__":
    main()
