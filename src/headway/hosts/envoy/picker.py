"""The endpoint picker as a whole: builds its parts, starts and stops them, and drains.

async with Picker(EppConfig.from_toml("epp.toml")) as picker:
    print(picker.grpc_port)
"""

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from prometheus_client import Counter, Gauge

from headway.front.admin import metrics_page
from headway.front.body_reader import BodyReader
from headway.front.driver import Observer
from headway.front.errors import Refusal
from headway.front.lengths import Lengths
from headway.front.listener import Listener
from headway.front.logs import AccessLog
from headway.front.metrics import Metrics
from headway.front.over import Over
from headway.front.process import run
from headway.front.protocol import Handler, HttpRequest, HttpResponse, json_answer, refused
from headway.front.scheduler import Scheduler
from headway.hosts.envoy.config import EppConfig
from headway.hosts.envoy.health import Health, HealthServer
from headway.hosts.envoy.picks import Picks
from headway.hosts.envoy.processor import Processor, address
from headway.hosts.envoy.processors import Processors
from headway.hosts.envoy.secure import pem_of
from headway.hosts.envoy.stream import Tools

__all__ = ["Picker", "serve"]

#: How often the drain looks whether the last held request is answered.
DRAIN_LOOK_S = 0.02


class Picker:
    """Envoy's endpoint picker. An async context manager; also `start`, `drain` and `stop`.

    `observers` see every event with what the policy did about it, `on_done` every request that is over.
    Raises ConfigError before anything starts when the configuration cannot be used.
    """

    def __init__(
        self,
        config: EppConfig,
        *,
        observers: Iterable[Observer] = (),
        on_done: Iterable[Callable[[Over, int], None]] = (),
    ) -> None:
        self.config = config
        self.metrics = Metrics()
        self._access_log = AccessLog()
        self._observers = [self.metrics.observe, *observers]
        self._on_done = [self.metrics.done, self._access_log.done, *on_done]
        self._pem = pem_of(config.tls)
        self._lengths = Lengths()
        self._reader = BodyReader(config.server.tokenizer)
        engine_key = config.secret(config.engine_api_key_env, "engine_api_key_env")
        self.scheduler = Scheduler(config, engine_key=engine_key)
        self.elector = self.scheduler.elector
        self._health_server: HealthServer | None = None
        self._listeners: list[Listener] = []
        self.draining = False
        self.grpc_port = 0
        self.health_port: int | None = None
        self.metrics_url: str | None = None
        self.admin_url: str | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Check every engine once, and listen. Raises ConfigError when an address cannot be bound."""
        self._build()
        server = self.config.server
        try:
            await self.scheduler.start()
            await self.health.start()
            self.grpc_port = await self.processor.start(server.grpc_port)
            await self.health.look()  # it is ready by now, if its engines are
            if server.grpc_health_port is not None:
                where = address(self.config, server.grpc_health_port)
                self._health_server = HealthServer(self.health, where)
                self.health_port = self._health_server.port
            for name, bind, handler in (
                ("metrics_url", self.config.metrics, self._numbers),
                ("admin_url", self.config.admin, self.admin),
            ):
                if bind.port is not None:
                    setattr(self, name, await self._listen(handler, bind.host, bind.port))
        except BaseException:
            await self.stop()
            raise

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Say that it is not ready, take nothing new and answer what is held; whether all of it was."""
        self.draining = True
        await self.health.look()
        patience_s = self.config.server.drain_timeout_s if timeout_s is None else timeout_s
        ending = asyncio.ensure_future(self.processor.drain(patience_s))
        while self.picks.buffer.requests and not ending.done():
            await asyncio.sleep(DRAIN_LOOK_S)
        await self.elector.release()  # answers may take long; another replica need not wait for them
        return await ending

    async def stop(self) -> None:
        """End everything at once; `drain` first to be kind."""
        await self.processor.stop()
        await self._reader.close()
        if self._health_server is not None:
            await self._health_server.stop()
        for listener in self._listeners:
            await listener.close()
        self._listeners = []
        self.picks.stop()
        await self.health.stop()
        await self.scheduler.stop()

    def ready(self) -> bool:
        """Whether to be sent requests."""
        return self.workers.ready() and self.elector.leads() and self.processor.serves and not self.draining

    async def reload(self, config: EppConfig) -> None:
        """See `Scheduler.reload`."""
        await self.scheduler.reload(config)

    def _build(self) -> None:
        config, self._loop = self.config, asyncio.get_running_loop()
        observers = list(self._observers)
        if config.accounting.by == "events":
            observers.append(lambda now, event, actions: self.picks.reported(now, event, actions))
        self.scheduler.build(observers)
        self.workers, self.driver = self.scheduler.workers, self.scheduler.driver
        oddities = Counter(
            "headway_picker_oddities",
            "What did not go as it should, by a word (docs/epp.md)",
            ["what"],
            registry=self.metrics.registry,
        )
        self.picks = Picks(
            config,
            self.driver,
            self.workers,
            elector=self.elector,
            clock=self._loop.time,
            call_at=self._loop.call_at,
            on_done=self._done,
            count_as=lambda what: oddities.labels(what).inc(),
        )
        self.health = Health(self.ready)
        self.processor = self._create_processor()
        self.metrics.watch(self.picks.buffer, self.workers, self.elector)
        self.metrics.watch_loop(self.scheduler.loop_lag)
        self.metrics.watch_estimates(lambda: self._lengths.error)
        self._gauge("headway_picker_streams", "ext_proc streams that are open", lambda: self.processor.open)
        self._gauge("headway_picker_under_way", "Requests Envoy has", lambda: self.picks.under_way)
        self.admin = self.scheduler.admin(self.metrics)

    def _create_processor(self) -> Processor | Processors:
        """Build what speaks with Envoy."""
        config, reads_prefixes = self.config, self.driver.reads_prefixes
        if config.server.processors > 1:
            return Processors(
                config,
                self.picks,
                self._pem,
                reads_prefixes=reads_prefixes,
                ready=self.ready,
                refused=self._access_log.refused,
            )
        tools = Tools(
            config, self.picks, self._lengths, self._reader, self._loop.time, self._refused, reads_prefixes
        )
        return Processor(tools, self.health, self._pem)

    def _gauge(self, name: str, doc: str, read: Callable[[], float]) -> None:
        Gauge(name, doc, registry=self.metrics.registry).set_function(read)

    def _done(self, over: Over, status: int) -> None:
        for hear in self._on_done:
            hear(over, status)

    def _refused(self, path: str, request_id: str, refusal: Refusal) -> None:
        """Count and log what was refused. The policy's refusals are counted when they are over."""
        self._access_log.refused(path, request_id, refusal.status, refusal.code)

    # Listening

    async def _listen(self, handler: Handler, host: str, port: int) -> str:
        limits = self.config.limits
        listener = Listener(
            handler,
            header_timeout_s=limits.header_timeout_s,
            most_body_bytes=limits.max_body_bytes,
            budget=self.picks.buffer.budget,
        )
        self._listeners.append(listener)
        return await listener.listen(host, port, None)

    async def _numbers(self, request: HttpRequest) -> HttpResponse | None:
        """Answer on the bind for metrics."""
        if request.path == "/metrics":
            try:
                return metrics_page(self.scheduler.metrics_gate, self.metrics, request)
            except Refusal as refusal:
                return refused(refusal)
        if request.path == "/health":
            return json_answer({"status": "ok"})
        return HttpResponse(404)


async def serve(picker: Picker, on_ready: Callable[[], None] = lambda: None) -> None:
    """Run a picker until SIGTERM or SIGINT, then drain it. A second signal ends it at once."""
    config = picker.config
    await run(picker, config.logs, config.server.drain_timeout_s, on_ready)
