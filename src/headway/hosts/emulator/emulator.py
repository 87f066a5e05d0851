"""Decides what a running emulator is made of: per instance a driver, an HTTP server, a publisher of events.

The epoch of an instance begins at the wall clock's millisecond, so that an emulator that is killed and
started again comes back in a higher one.
"""

import asyncio
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, get_args

from headway.core.errors import ConfigError, unknown_name
from headway.core.events import InstanceDown, InstanceUp, PassEnded, Role, Snapshot
from headway.hosts.emulator.asks import Limits
from headway.hosts.emulator.clock import Clock
from headway.hosts.emulator.driver import Driver, batch_maker
from headway.hosts.emulator.faults import Fault
from headway.hosts.emulator.handover import KvStore, Rooms
from headway.hosts.emulator.metrics import Dialect
from headway.hosts.emulator.server import Server
from headway.model.cluster import ClusterSpec, PoolSpec
from headway.wire.publisher import Publisher

__all__ = ["Emulated", "Emulator", "Endpoint", "RankBy", "run_emulator"]

RankBy = Literal["header", "port"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an instance is.

    `urls`: one, or one per rank when `rank_by` is "port"; `url` is the first. `events`, `snapshots`: ZeroMQ
    endpoints of its pass events. `bootstrap_port`: of an SGLang prefill instance.
    """

    instance: str
    role: Role
    url: str
    ranks: int
    rank_by: RankBy
    events: str
    snapshots: str
    bootstrap_port: int | None
    urls: tuple[str, ...]


class Emulated:
    """One instance that runs. Set `fault` to break it, to None to mend it."""

    def __init__(self, emulator: "Emulator", name: str, pool: PoolSpec) -> None:
        self.name = name
        self._emulator = emulator
        self._mending: asyncio.TimerHandle | None = None
        self._driver = Driver(
            name,
            pool,
            emulator.make_batch,
            seed=emulator.seed,
            clock=emulator.clock,
            epoch=time.time_ns() // 1_000_000,
            publish=self._publish,
            on_pass=lambda passed: self._server.metrics.passed(passed),
        )
        self._server = Server(
            emulator.cluster,
            self._driver,
            Limits(emulator.model, emulator.max_model_len, pool.block_tokens, emulator.seed),
            emulator.clock,
            dialect=emulator.dialect,
            kv_store=emulator.kv_store,
            rooms=emulator.rooms,
            on_fault=self._set_fault,
        )
        self._publisher: Publisher | None = None
        self.endpoint: Endpoint

    @property
    def epoch(self) -> int:
        """Grows each time it comes back from a crash."""
        return self._driver.instance.epoch

    @property
    def requests(self) -> int:
        """How many requests its engines hold."""
        return len(self._driver.jobs)

    @property
    def fault(self) -> Fault | None:
        """What is wrong with it."""
        return self._server.fault

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        self._set_fault(fault)

    async def start(self, host: str, ports: "_Ports") -> None:
        """Listen, announce itself, run. Raises ConfigError when a port cannot be had."""
        emulator, pool = self._emulator, self._driver.instance.pool
        by_port = emulator.rank_by == "port"
        wanted = [ports.next() for _ in range(pool.ranks if by_port else 1)]
        taken = await self._server.listen(host, wanted, by_port=by_port)
        self._publisher = Publisher(
            f"tcp://{host}:{ports.next()}", f"tcp://{host}:{ports.next()}", self._snapshot
        )
        await self._publisher.__aenter__()
        self._driver.start()
        shown = "127.0.0.1" if host == "0.0.0.0" else host
        urls = tuple([f"http://{shown}:{port}" for port in taken])
        bootstrap = emulator.dialect == "sglang" and pool.role is Role.PREFILL
        if bootstrap:
            emulator.rooms.default_port = emulator.rooms.default_port or taken[0]
        assert self._publisher.snapshot_endpoint is not None
        self.endpoint = Endpoint(
            self.name,
            pool.role,
            urls[0],
            pool.ranks,
            emulator.rank_by,
            self._publisher.endpoint.replace("0.0.0.0", shown),
            self._publisher.snapshot_endpoint.replace("0.0.0.0", shown),
            taken[0] if bootstrap else None,
            urls,
        )
        self._publisher.publish(self._driver.instance.up())

    async def close(self) -> None:
        """Say goodbye and stop."""
        if self._mending is not None:
            self._mending.cancel()
        if self._publisher is not None:
            self._publisher.publish(InstanceDown(self.name))
        await self._driver.close()
        await self._server.close()
        if self._publisher is not None:
            self._publisher.close()

    def _publish(self, event: PassEnded | InstanceUp) -> None:
        if self._publisher is not None:
            self._publisher.publish(event)

    def _snapshot(self) -> Sequence[InstanceUp | Snapshot]:
        instance = self._driver.instance
        return (instance.up(), self._driver.snapshot()) if instance.works else ()

    def _set_fault(self, fault: Fault | None) -> None:
        """Mend what is wrong, then break what shall be."""
        if self._mending is not None:
            self._mending.cancel()
            self._mending = None
        if self._server.fault is not None:
            self._mend()
        self._server.fault = fault
        if fault is None:
            return
        if fault.kind == "hang":
            self._server.unhung.clear()
            self._driver.hang()
        elif fault.kind == "slow":
            self._driver.instance.slow_down(fault.factor)
        elif fault.kind == "crash":
            self._emulator.kv_store.drop(self._server.engine_id)
            self._driver.crash()
            self._server.cut_connections()
        if fault.for_s is not None:
            self._mending = asyncio.get_running_loop().call_later(fault.for_s, self._set_fault, None)

    def _mend(self) -> None:
        self._server.unhung.set()
        if self._driver.recover():
            self._publish(self._driver.instance.up())


class Emulator:
    """Emulates a cluster's instances in this process. Async context manager.

    `speed` multiplies the model's time: 0.25 runs it four times as slow as the real thing. `base_port`: the
    first of a row of ports, HTTP and events of each instance in turn; 0 takes free ones. `only`: names of the
    instances to run, all by default (KV is handed over within one process). `bootstrap_timeout_s`,
    `pair_abort_s`: how long SGLang's legs wait for each other, and how late one learns that the other was
    aborted (wall time; SGLang waits up to 300 s).

    Raises ConfigError for a batch policy, dialect or instance nobody knows, and ports that cannot be had.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        batch: str = "vllm-v1",
        *,
        seed: int = 0,
        speed: float = 1.0,
        host: str = "127.0.0.1",
        base_port: int = 0,
        dialect: Dialect = "vllm",
        rank_by: RankBy = "header",
        model: str | None = None,
        only: Sequence[str] | None = None,
        bootstrap_timeout_s: float = 300.0,
        pair_abort_s: float = 10.0,
    ) -> None:
        if not 0.0 < speed < math.inf:
            raise ConfigError(f"speed must be a positive number, got {speed!r}")
        for what, value, known in (("dialect", dialect, Dialect), ("rank_by", rank_by, RankBy)):
            if value not in get_args(known):
                raise unknown_name(what, value, get_args(known))
        self.cluster, self.seed, self.speed = cluster, seed, speed
        self.dialect, self.rank_by = dialect, rank_by
        self.model = model or cluster.name
        self.max_model_len = min(pool.kv_tokens for pool in cluster.pools)
        self.make_batch = batch_maker(batch, seed)
        self._host, self._ports = host, _Ports(base_port)
        self._waits = (bootstrap_timeout_s, pair_abort_s)
        self._pools = {name: pool for pool in cluster.pools for name in pool.instance_names()}
        self._names = list(self._pools) if only is None else list(only)
        for name in self._names:
            if name not in self._pools:
                raise unknown_name("instance", name, self._pools)
        self.instances: list[Emulated] = []

    @property
    def endpoints(self) -> list[Endpoint]:
        """Where its instances are, in the cluster's order."""
        return [instance.endpoint for instance in self.instances]

    def instance(self, name: str) -> Emulated:
        """Return an instance. Raises ConfigError with the nearest known name."""
        for instance in self.instances:
            if instance.name == name:
                return instance
        raise unknown_name("instance", name, self._names)

    async def __aenter__(self) -> Self:
        self.clock = Clock(self.speed)
        self.kv_store = KvStore(asyncio.get_running_loop().time)
        self.rooms = Rooms(*self._waits)
        try:
            for name in self._names:
                instance = Emulated(self, name, self._pools[name])
                self.instances.append(instance)
                await instance.start(self._host, self._ports)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop all instances; connections are cut."""
        await asyncio.gather(*[instance.close() for instance in self.instances])
        self.instances = []


class _Ports:
    """A row of ports, or free ones."""

    def __init__(self, base: int) -> None:
        self._next = base

    def next(self) -> int:
        """Return the next one, 0 for any."""
        port = self._next
        self._next += bool(port)
        return port


def run_emulator(
    cluster: ClusterSpec,
    batch: str = "vllm-v1",
    *,
    seed: int = 0,
    speed: float = 1.0,
    host: str = "127.0.0.1",
    base_port: int = 8100,
    dialect: Dialect = "vllm",
    rank_by: RankBy = "header",
    model: str | None = None,
    only: Sequence[str] | None = None,
    on_ready: Callable[[list[Endpoint]], None] = lambda endpoints: None,
) -> None:
    """Run an `Emulator` until SIGINT or SIGTERM, on uvloop where it is installed. Options as there."""
    emulator = Emulator(
        cluster,
        batch,
        seed=seed,
        speed=speed,
        host=host,
        base_port=base_port,
        dialect=dialect,
        rank_by=rank_by,
        model=model,
        only=only,
    )

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with emulator:
            on_ready(emulator.endpoints)
            await stop.wait()

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
