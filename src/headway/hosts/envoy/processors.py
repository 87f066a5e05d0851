"""Serves Envoy's streams in several processes, which ask the one that decides over a socket.

Speaking gRPC and reading bodies is most of what a pick costs, deciding is little: so many processes do the
former, one the latter. They share Envoy's port; the kernel gives each connection to one of them.

Rule 1. A process that ends is started again. What it held ends with its sockets and is withdrawn. What Envoy
        has an answer for goes on, and its log tells of the end; where answers pass by, they are cut.
Rule 2. A process lives as long as the socket: without the picker nothing could be decided.
"""

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
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
TABLES = {"server", "metrics", "picker", "accounting", "slo", "limits", "objectives", "logs"}
#: A process that does not listen by then will not.
START_TIMEOUT_S = 30.0
#: So much longer than the drain one may take to end.
DRAIN_MARGIN_S = 2.0
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
        self._pem = pem
        self._reads_prefixes = reads_prefixes
        self._ready = ready
        self._told_ready = False
        by_response = config.accounting.by == "response"
        self._children = [Child(desk, refused, by_response) for _ in range(config.server.processors)]
        self._tasks: list[asyncio.Task[None]] = []
        self._reserved: socket.socket | None = None

    @property
    def open(self) -> int:
        """How many ext_proc streams are open."""
        return sum(child.open for child in self._children)

    @property
    def serves(self) -> bool:
        """Whether some process listens."""
        return any(child.serves for child in self._children)

    async def start(self, port: int) -> int:
        """Start the processes; return the port once all listen. Raises ConfigError when they cannot."""
        self._reserved = _reserve(self._config, port)
        self._port = int(self._reserved.getsockname()[1])
        await asyncio.gather(*map(self._begin, self._children))
        self._tasks = [asyncio.create_task(self._keep(child)) for child in self._children]
        self._tasks.append(asyncio.create_task(self._tell_ready()))
        return self._port

    async def drain(self, patience_s: float) -> bool:
        """Let the open streams come to their end, and take no further ones; whether all did in time."""
        await self._leave_them()
        for child in self._children:
            if child.serves:
                child.send(wire.Drain(patience_s))
            else:
                child.kill()
        ends = asyncio.gather(*(child.ended() for child in self._children))
        with suppress(TimeoutError):
            await asyncio.wait_for(ends, patience_s + DRAIN_MARGIN_S)
        return all(child.whole for child in self._children)

    async def stop(self) -> None:
        """End everything at once."""
        await self._leave_them()
        for child in self._children:
            child.kill()
            child.forget()
        await asyncio.gather(*(child.ended() for child in self._children))
        if self._reserved is not None:
            self._reserved.close()

    async def _leave_them(self) -> None:
        """Start none again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _begin(self, child: "Child") -> None:
        """Start a process and wait until it listens. Raises ConfigError when it does not."""
        try:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            await asyncio.get_running_loop().create_unix_connection(child.connect, sock=ours)
            with theirs:
                child.process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "headway.hosts.envoy.remote", str(theirs.fileno())),
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # a terminal's Ctrl-C is the picker's, which drains
                )
        except OSError as error:
            raise ConfigError(f"an ext_proc process did not start: {error}") from None
        pem = self._pem or (b"", b"", b"")
        config = json.dumps(self._config.model_dump(mode="json", exclude_unset=True, include=TABLES)).encode()
        child.send(wire.Start(config, self._port, *pem, self._reads_prefixes, self._told_ready))
        ended = asyncio.ensure_future(child.ended())
        done, _ = await asyncio.wait(
            (child.up, ended), timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if child.up in done:
            error_text = child.up.result()
        else:
            error_text = f"it ended with {child.process.returncode}" if done else "it does not listen"
        if error_text:
            child.kill()
            raise ConfigError(f"an ext_proc process did not start: {error_text}")

    async def _keep(self, child: "Child") -> None:
        """Start a process again whenever it ends."""
        while True:
            code = await child.ended()
            child.forget()
            log.error("an ext_proc process ended and is started again", extra={"code": code})
            await asyncio.sleep(START_AGAIN_S)
            try:
                await self._begin(child)
            except ConfigError as error:
                log.error("%s", error)

    async def _tell_ready(self) -> None:
        while True:
            ready = self._ready()
            if ready is not self._told_ready:
                self._told_ready = ready
                for child in self._children:
                    child.send(wire.Ready(ready))
            await asyncio.sleep(LOOK_S)


class Child:
    """A process, as the picker sees it. `by_response`: answers pass by it; nobody else tells their end.

    `up`: comes to an error, or to "" when it listens. `whole`: whether it was over before it ended.
    """

    def __init__(self, desk: Desk, refused: Callable[[str, str, int, str], None], by_response: bool) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.open = 0
        self.whole = False
        self._desk = desk
        self._refused = refused
        self._by_response = by_response
        self._link: wire.Link | None = None
        self._asked: dict[int, asyncio.Task[None]] = {}
        self._entrusted: set[str] = set()  # keys whose end nobody but it could tell

    @property
    def serves(self) -> bool:
        """Whether it listens."""
        return self._link is not None and self.up.done() and not self.up.result()

    def connect(self) -> wire.Link:
        """Return this end of a new socket."""
        self.up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.whole = False
        link = self._link = wire.Link(self._hear, lambda: self._lost(link))
        return link

    def send(self, message: wire.Message) -> None:
        """Tell it something."""
        if self._link is not None:
            self._link.send(message)

    def kill(self) -> None:
        """End it."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.kill()

    async def ended(self) -> int | None:
        """Wait for its end; return its exit status."""
        return None if self.process is None else await self.process.wait()

    def forget(self) -> None:
        """Withdraw all that it held, and end what only it would tell of: its sockets are gone."""
        if self._link is not None:
            self._link.close()
            self._link = None
        self.open = 0
        for task in list(self._asked.values()):
            task.cancel()
        entrusted, self._entrusted = self._entrusted, set()
        for key in entrusted:
            self._desk.over(key, Served(0))

    def _lost(self, link: wire.Link) -> None:
        if link is self._link:
            self.forget()

    def _hear(self, message: Any) -> None:
        desk = self._desk
        match message:
            case wire.Place():
                self._ask(message.number, lambda: desk.place(message.asked))
            case wire.Second():
                self._ask(message.number, lambda: desk.second(message.request_id, message.subset))
            case wire.Aside():
                self._ask(message.number, lambda: desk.aside(message.role, message.subset))
            case wire.Withdraw():
                if (task := self._asked.get(message.number)) is not None:
                    task.cancel()
            case wire.Told():
                if not self._by_response:  # Envoy knows its key by now, and will log it
                    self._entrusted.discard(message.key)
                desk.told(message.key, message.envoy_id, message.peer)
            case wire.FirstByte():
                desk.first_byte(message.key)
            case wire.Tokens():
                desk.tokens(message.key, message.prompt_tokens, message.output_tokens)
            case wire.Over():
                self._entrusted.discard(message.key)
                desk.over(message.key, message.served, message.peer)
            case wire.BrokeOff():
                desk.broke_off(message.envoy_id, message.served, message.peer)
            case wire.Broke():
                desk.broke(message.peer)
            case wire.Refused():
                self._refused(message.path, message.request_id, message.status, message.code)
            case wire.Open():
                self.open = message.streams
            case wire.Drained():
                self.whole = message.whole
            case wire.Up():
                if not self.up.done():
                    self.up.set_result(message.error)

    def _ask(self, number: int, ask: Callable[[], Coroutine[Any, Any, Answer]]) -> None:
        task = self._asked[number] = asyncio.create_task(self._answer(number, ask))
        task.add_done_callback(lambda _: self._asked.pop(number, None))

    async def _answer(self, number: int, ask: Callable[[], Coroutine[Any, Any, Answer]]) -> None:
        """Send what is answered; withdrawn, nothing."""
        try:
            placed = await ask()
        except Refusal as refusal:
            self.send(wire.Denied.of(number, refusal))
        except Exception:
            log.exception("a request could not be placed")
            self.send(wire.Denied.of(number, Refusal(500, "internal_error", "The picker failed.")))
        else:
            if self._link is None:  # it ended in this very turn
                self._desk.over(placed.key, Served(0))
                return
            self._entrusted.add(placed.key)
            self.send(wire.Placed(number, placed))


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
