"""The gateway as a whole: builds its parts, starts and stops them, and drains.

async with Gateway(GatewayConfig.from_toml("gateway.toml")) as gateway:
    print(gateway.url)
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from headway.front.access import Access, Gate
from headway.front.admin import metrics_page
from headway.front.body_reader import BodyReader
from headway.front.driver import Observer
from headway.front.errors import Refusal
from headway.front.keys import ClientKeys
from headway.front.lengths import Lengths
from headway.front.listener import Listener
from headway.front.logs import AccessLog
from headway.front.metrics import Metrics
from headway.front.process import run
from headway.front.protocol import Handler, HttpRequest, HttpResponse, refused
from headway.front.scheduler import Scheduler
from headway.front.tls import tls_context
from headway.hosts.gateway.broadcast import Broadcast
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.flight import Flight
from headway.hosts.gateway.live import Live
from headway.hosts.gateway.observer import Observer as PageObserver
from headway.hosts.gateway.page import Page, page_is_public
from headway.hosts.gateway.passthrough import Passthrough
from headway.hosts.gateway.posture import posture_of, warnings
from headway.hosts.gateway.server import PublicSide
from headway.hosts.gateway.serving import Done, Serving
from headway.hosts.gateway.tracing import Tracing, make_tracing
from headway.hosts.gateway.worker_api import CLOSED, WorkerApi

__all__ = ["Gateway", "serve"]

log = logging.getLogger("headway.gateway")

#: How often the drain looks whether the last request is over.
DRAIN_LOOK_S = 0.02


class Gateway:
    """The OpenAI-compatible front door. An async context manager; also `start`, `drain` and `stop`.

    `observers` see every event with what the policy did about it, `on_done` every request that is over.
    Raises ConfigError before anything starts when the configuration cannot be used.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        observers: Iterable[Observer] = (),
        on_done: Iterable[Done] = (),
        tracing: Tracing | None = None,
    ) -> None:
        self.config = config
        self.metrics = Metrics()
        self._seen, self._access_log = PageObserver(), AccessLog()
        self._tracing = tracing or make_tracing(config.traces, lambda: self._loop.time())
        self._observers = [self.metrics.observe, self._seen.observe, *observers]
        self._on_done = [
            self.metrics.done,
            self._seen.done,
            self._access_log.done,
            self._tracing.done,
            *on_done,
        ]
        keys = config.secret(config.auth.api_keys_env, "auth.api_keys_env")
        self._keys = ClientKeys(keys, config.auth.keys_file, time.monotonic)
        self._tls = None if config.tls is None else tls_context(config.tls)
        self._lengths = Lengths()
        self._reader = BodyReader(config.server.tokenizer)
        engine_key = config.secret(config.auth.engine_api_key_env, "auth.engine_api_key_env")
        self.scheduler = Scheduler(config, engine_key=engine_key)
        self.elector = self.scheduler.elector
        self._listeners: list[Listener] = []
        self.url = ""
        self.admin_url: str | None = None
        self.metrics_url: str | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, and check every engine once. Raises ConfigError when an address cannot be bound."""
        self._build()
        for warning in warnings(self.config):
            log.warning(warning)
        try:
            await self.scheduler.start()
            server = self.config.server
            self.url = await self._listen(self.public, server.host, server.port, self._tls)
            admin = self.config.admin
            if admin.port is not None:
                self.admin_url = await self._listen(self.admin, admin.host, admin.port, None)
            metrics = self.config.metrics
            if metrics.port is not None:
                self.metrics_url = await self._listen(self._numbers, metrics.host, metrics.port, None)
        except BaseException:
            await self.stop()
            raise

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Accept nothing more and wait for what is under way; whether all of it came to its end."""
        self.public.draining = True
        patience_s = self.config.server.drain_timeout_s if timeout_s is None else timeout_s
        deadline_s = self._loop.time() + patience_s
        self._page.close()
        self.public.tunnels.end_all()
        listener = self._listeners[0]
        listener.drain()  # each connection ends when its answer has gone out
        while (self.serving.buffer.in_flight or listener.connections) and self._loop.time() < deadline_s:
            if not self.serving.undecided():
                await self.elector.release()  # streams may take long; another replica need not wait for them
            await asyncio.sleep(DRAIN_LOOK_S)
        return not (self.serving.buffer.in_flight or listener.connections)

    async def stop(self) -> None:
        """End everything at once; `drain` first to be kind."""
        self._page.close()
        for listener in self._listeners:
            await listener.close()
        self._listeners = []
        await self._reader.close()
        await self.scheduler.stop()
        await self._tracing.close()

    @property
    def page_url(self) -> str | None:
        """Where the page is; None when there is neither an admin bind nor a safe public one."""
        base = self.admin_url or (self.url if page_is_public(self.config) else None)
        return None if base is None else f"{base}/"

    async def reload(self, config: GatewayConfig) -> None:
        """Read the keys file again, and see `Scheduler.reload`. Raises ConfigError."""
        self._keys.reload()
        await self.scheduler.reload(config)

    def _build(self) -> None:
        config, self._loop = self.config, asyncio.get_running_loop()
        clock = self._loop.time
        scheduler = self.scheduler
        scheduler.build(self._observers)
        self.workers, self.driver = scheduler.workers, scheduler.driver
        self.serving = Serving(
            config,
            self.driver,
            self.workers,
            scheduler.transport,
            self._lengths,
            elector=self.elector,
            clock=clock,
            engine_headers=scheduler.engine_headers,
            on_done=self._done,
            on_retry=self.metrics.retried,
            tracing=self._tracing,
        )
        passthrough = Passthrough(
            self.workers,
            scheduler.transport,
            self.serving.buffer,
            config.limits,
            reader=self._reader,
            engine_headers=scheduler.engine_headers,
            keep_authorization=not config.auth.checks_keys,
        )
        broadcast = Broadcast(
            self.workers,
            scheduler.transport,
            self.serving.buffer,
            reader=self._reader,
            engine_headers=scheduler.engine_headers,
            patience_s=config.limits.first_byte_timeout_s,
            body_timeout_s=config.limits.body_timeout_s,
        )
        self.metrics.watch(self.serving.buffer, self.workers, self.elector)
        posture = posture_of(config)
        operators_gate = Gate(posture.worker_api, tokens=scheduler.tokens, clients=self._keys, closed=CLOSED)
        self.metrics.watch_loop(self.scheduler.loop_lag)
        self.metrics.watch_estimates(lambda: self._lengths.error)
        self.public = PublicSide(
            config,
            self.serving,
            passthrough,
            broadcast,
            self.workers,
            self.elector,
            self.metrics,
            self._keys,
            Gate(
                posture.metrics,
                tokens=scheduler.metrics_tokens,
                clients=self._keys,
                closed="Metrics are served at the address of [metrics], or with [metrics] token_env.",
                public_names=posture.metrics is Access.ANYONE,
            ),
            operators_gate,
            self._access_log,
            self._reader,
        )
        if config.worker_api.enabled:
            self.public.operator_routes |= WorkerApi(config, self.workers, operators_gate).routes
        self.admin = scheduler.admin(self.metrics)
        self.admin.routes |= broadcast.operations()
        live = Live(config, self._seen, self.driver, self.workers, self.serving.buffer, self.elector)
        self._page = Page(live, scheduler.admin_gate, clock=clock)
        self.admin.routes |= self._page.routes
        self.admin.open_routes |= self._page.open_routes
        if page_is_public(config):
            self.public.operator_routes |= self._page.routes

    async def _numbers(self, request: HttpRequest) -> HttpResponse | None:
        """Answer on the bind for metrics, which serves nothing else."""
        if request.path == "/metrics":
            try:
                return metrics_page(self.scheduler.metrics_gate, self.metrics, request)
            except Refusal as refusal:
                return refused(refusal)
        if request.path == "/health":
            return await self.public(request)
        return HttpResponse(404)

    def _refused_at_the_door(self, refusal: Refusal) -> None:
        """Count and log what was refused before it was a request."""
        self.metrics.refused(refusal.status)
        self._access_log.refused("", "", refusal.status, refusal.code)

    def _done(self, flight: Flight, status: int) -> None:
        for hear in self._on_done:
            hear(flight, status)

    async def _listen(self, handler: Handler, host: str, port: int, tls: ssl.SSLContext | None) -> str:
        """Serve on an address; return its URL."""
        limits = self.config.limits
        listener = Listener(
            handler,
            header_timeout_s=limits.header_timeout_s,
            most_body_bytes=limits.max_body_bytes,
            budget=self.serving.buffer.budget,
            on_refused=self._refused_at_the_door,
        )
        self._listeners.append(listener)
        return await listener.listen(host, port, tls)


async def serve(gateway: Gateway, on_ready: Callable[[], None] = lambda: None) -> None:
    """Run a gateway until SIGTERM or SIGINT, then drain it. A second signal ends it at once."""
    config = gateway.config
    await run(gateway, config.logs, config.server.drain_timeout_s, on_ready)
