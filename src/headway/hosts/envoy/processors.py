"""Serves Envoy's streams in several processes, which ask the one that decides over a Unix socket.

Speaking gRPC and reading bodies is most of what a pick costs, deciding is little: so many processes do the
former, one the latter. They share Envoy's port; the kernel gives each connection to one of them.

Rule 1. A process that ends is started again. What it held ends with its sockets and is withdrawn; what it had
        placed is Envoy's, and its end is told by another one's access log.
Rule 2. A process lives as long as the socket: without the picker nothing could be decided.
"""

import asyncio
import json
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from headway.core.errors import ConfigError
from headway.front.errors import Refusal
from headway.hosts.envoy import wire
from headway.hosts.envoy.config import EppConfig
from headway.hosts.envoy.desk import Answer, Desk, Served
from headway.hosts.envoy.processor import address
from headway.hosts.envoy.secure import Pem

__all__ = ["Child", "Processors"]

log = logging.getLogger("headway.picker")

#: What a processor has to know of the configuration: nothing of engines or policies.
TABLES = {"server", "picker", "accounting", "slo", "limits", "objectives", "logs", "disaggregated"}
#: A process that does not listen by then will not.
START_TIMEOUT_S = 30.0
#: One that ends is started again after this long, so that one that cannot start does not do so all the time.
START_AGAIN_S = 1.0
#: How often it is looked whether they should tell something else of their health.
LOOK_S = 0.1


class Processors:
    """As `Processor`, in `server.processors` processes.

    `refused(path, request_id, status, code)` hears of requests refused at the door. `ready()`: whether to be
    sent requests.
    """

    def __init__(
        self,
        config: EppConfig,
        desk: Desk,
        pem: Pem | None,
        *,
        reads_prefixes: bool,
        ready: Callable[[], bool],
        refused: Callable[[str, str, int, str], None],
    ) -> None:
        self._config = config
        self._desk = desk
        self._pem = pem
        self._reads_prefixes = reads_prefixes
        self._ready = ready
        self._refused = refused
        self._told_ready = False
        self._stopping = False
        self._seed = str(secrets.randbelow(1 << 32))
        self._children: list[Child] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def open(self) -> int:
        """How many ext_proc streams are open."""
        return sum(child.open for child in self._children)

    async def start(self, port: int) -> int:
        """Start the processes; return the port once all listen. Raises ConfigError when they cannot."""
        self._place = _reserve(self._config, port)
        self._port = self._place.getsockname()[1]
        self._told_ready = self._ready()
        self._folder = tempfile.TemporaryDirectory(prefix="headway-epp-")
        by_response = self._config.accounting.by == "response"
        self._children = [
            Child(self._desk, self._refused, by_response) for _ in range(self._config.server.processors)
        ]
        await asyncio.gather(*map(self._begin, self._children))
        self._tasks = [asyncio.create_task(self._keep(child)) for child in self._children]
        self._tasks.append(asyncio.create_task(self._tell_ready()))
        return int(self._port)

    async def drain(self, patience_s: float) -> None:
        """Let the open streams come to their end, and take no further ones."""
        self._stopping = True
        for child in self._children:
            child.send(wire.Drain(patience_s))
        await asyncio.gather(*(child.ended() for child in self._children))

    async def stop(self) -> None:
        """End everything at once."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for child in self._children:
            child.kill()
        await asyncio.gather(*(child.ended() for child in self._children))
        if self._children:
            self._place.close()
            self._folder.cleanup()
        self._children = []

    async def _begin(self, child: "Child") -> None:
        """Start a process and wait until it listens."""
        path = Path(self._folder.name) / f"{secrets.token_hex(4)}.sock"
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        server = await asyncio.get_running_loop().create_unix_server(lambda: child.link(came), path)
        # Prefixes are compared over all of them: their hashes must agree.
        environment = {**os.environ, "PYTHONHASHSEED": self._seed}
        command = (sys.executable, "-m", "headway.hosts.envoy.remote", str(path))
        process = await asyncio.create_subprocess_exec(*command, env=environment)
        child.process = process
        ended = asyncio.ensure_future(process.wait())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.wait((came, ended), return_when=asyncio.FIRST_COMPLETED)
                if came.done():
                    certificate, key = self._pem or (b"", b"")
                    tables = self._config.model_dump(mode="json", exclude_unset=True, include=TABLES)
                    config = json.dumps(tables).encode()
                    child.send(
                        wire.Start(
                            config, self._port, certificate, key, self._reads_prefixes, self._told_ready
                        )
                    )
                    await asyncio.wait((child.up, ended), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise ConfigError(f"an ext_proc process does not listen after {START_TIMEOUT_S:g} s") from None
        finally:
            server.close()
            path.unlink(missing_ok=True)
        error = child.up.result() if child.up.done() else f"it ended with {process.returncode}"
        if error:
            raise ConfigError(f"an ext_proc process did not start: {error}")

    async def _keep(self, child: "Child") -> None:
        """Start a process again whenever it ends."""
        while not self._stopping:
            await child.ended()
            child.forget()
            if self._stopping:
                return
            code = child.process.returncode if child.process is not None else None
            log.error("an ext_proc process ended and is started again", extra={"code": code})
            await asyncio.sleep(START_AGAIN_S)
            try:
                await self._begin(child)
            except ConfigError as error:
                log.error("%s", error)
                child.kill()

    async def _tell_ready(self) -> None:
        while True:
            ready = self._ready()
            if ready is not self._told_ready:
                self._told_ready = ready
                for child in self._children:
                    child.send(wire.Ready(ready))
            await asyncio.sleep(LOOK_S)


class Child:
    """A process, as the picker sees it. `by_response`: answers pass by it; nobody else tells their end."""

    def __init__(self, desk: Desk, refused: Callable[[str, str, int, str], None], by_response: bool) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.open = 0
        self.up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._desk = desk
        self._refused = refused
        self._link: wire.Link | None = None
        self._asked: dict[int, asyncio.Task[None]] = {}
        self._by_response = by_response
        self._passing: set[str] = set()  # keys of answers that pass by it

    def link(self, came: asyncio.Future[None]) -> wire.Link:
        """Return this end of the socket."""
        self._link = wire.Link(self._hear, self.forget)
        if not came.done():
            came.set_result(None)
        return self._link

    def send(self, message: wire.Message) -> None:
        """Tell it something."""
        if self._link is not None:
            self._link.send(message)

    def kill(self) -> None:
        """End it."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.kill()

    async def ended(self) -> None:
        """Wait for its end."""
        if self.process is not None:
            await self.process.wait()

    def forget(self) -> None:
        """Withdraw all that it held, and let go of what passes by it: its sockets are gone."""
        self._link = None
        self.open = 0
        if self.up.done():
            self.up = asyncio.get_running_loop().create_future()
        for task in list(self._asked.values()):
            task.cancel()
        passing, self._passing = self._passing, set()
        for key in passing:
            self._desk.over(key, Served(0))

    def _hear(self, message: Any) -> None:
        desk = self._desk
        match message:
            case wire.Place():
                self._ask(message.number, desk.place(message.asked))
            case wire.Second():
                self._ask(message.number, desk.second(message.request_id, message.subset))
            case wire.Aside():
                self._ask(message.number, desk.aside(message.role, message.subset))
            case wire.Withdraw():
                if (task := self._asked.get(message.number)) is not None:
                    task.cancel()
            case wire.Told():
                desk.told(message.key, message.envoy_id)
            case wire.FirstByte():
                desk.first_byte(message.key)
            case wire.Tokens():
                desk.tokens(message.key, message.prompt_tokens, message.output_tokens)
            case wire.Over():
                self._passing.discard(message.key)
                desk.over(message.key, message.served)
            case wire.BrokeOff():
                desk.broke_off(message.envoy_id, message.served)
            case wire.Refused():
                self._refused(message.path, message.request_id, message.status, message.code)
            case wire.Open():
                self.open = message.streams
            case wire.Up():
                if not self.up.done():
                    self.up.set_result(message.error)

    def _ask(self, number: int, answer: Coroutine[Any, Any, Answer]) -> None:
        self._asked[number] = asyncio.create_task(self._answer(number, answer))

    async def _answer(self, number: int, answer: Coroutine[Any, Any, Answer]) -> None:
        """Send what is answered; withdrawn, nothing."""
        try:
            placed = await answer
        except Refusal as refusal:
            self.send(wire.Denied.of(number, refusal))
        except Exception:
            log.exception("a request could not be placed")
            self.send(wire.Denied.of(number, Refusal(500, "internal_error", "The picker failed.")))
        else:
            if self._link is None:  # it ended in this very turn
                self._desk.over(placed.key, Served(0))
                return
            if self._by_response:
                self._passing.add(placed.key)
            self.send(wire.Placed(number, placed))
        finally:
            del self._asked[number]


def _reserve(config: EppConfig, port: int) -> socket.socket:
    """Take the port for all processes, without listening. Raises ConfigError when it is not free."""
    host = config.server.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as alone:  # by itself, so that nobody's is shared
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            alone.bind((host, port))
        except OSError:
            raise ConfigError(f"cannot listen on {address(config, port)}: it is taken, or not ours") from None
        port = alone.getsockname()[1]
    place = socket.socket(family)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    place.bind((host, port))
    return place
