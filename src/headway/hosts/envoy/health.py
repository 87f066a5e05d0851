"""Answers gRPC health checks: whether the process lives, and whether it should be sent requests.

"", "liveness"       always, while it can answer at all
"readiness", and     while every role has an engine that takes work, this replica leads its pool and
ext_proc's service   no drain has begun

The port for health checks alone is served by threads, so that a busy event loop keeps no check waiting. One
that has not turned for `STALL_S` is stuck, and counts as dead there.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1.health import HealthServicer, aio
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from headway.core.errors import ConfigError
from headway.hosts.envoy.messages import EXT_PROC

__all__ = ["Health", "HealthServer"]

#: How often it is looked whether that has changed; who watches hears of it then.
LOOK_S = 0.1
_ALIVE, _READY = ("", "liveness"), ("readiness", EXT_PROC)


#: A loop that has not looked for so long is stuck: the process does not live.
STALL_S = 10.0
#: Checks answered at once on a port of their own.
THREADS = 4


class _Threaded(HealthServicer):  # type: ignore[misc]
    """Answers in threads, so that a busy event loop keeps no check waiting."""

    def __init__(self, stalled: Callable[[], bool]) -> None:
        super().__init__(experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(THREADS))
        self._stalled = stalled

    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See `grpc.health.v1.Health.Check`."""
        answer = super().Check(request, context)
        return HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING) if self._stalled() else answer


class HealthServer:
    """A port for health checks alone, served by threads. Raises ConfigError when it cannot be bound."""

    def __init__(self, health: "Health", where: str) -> None:
        self._server = grpc.server(ThreadPoolExecutor(THREADS))
        add_HealthServicer_to_server(health.threaded, self._server)
        try:
            self.port = int(self._server.add_insecure_port(where))
        except RuntimeError:
            raise ConfigError(f"cannot listen on {where}: it is taken, or not ours") from None
        self._server.start()

    async def stop(self) -> None:
        """Close the port."""
        await asyncio.to_thread(self._server.stop(None).wait)


class Health:
    """The health service: `servicer` is to be added to servers of an event loop, `threaded` to others.

    `ready()`: whether to be sent requests.
    """

    def __init__(self, ready: Callable[[], bool]) -> None:
        self.servicer = aio.HealthServicer()
        self.threaded = _Threaded(lambda: time.monotonic() - self._looked_s > STALL_S)
        self._looked_s = time.monotonic()
        self._ready = ready
        self._told: bool | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to tell."""
        for service in _ALIVE:
            await self.servicer.set(service, HealthCheckResponse.SERVING)
            self.threaded.set(service, HealthCheckResponse.SERVING)
        await self.look()
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Tell no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def look(self) -> None:
        """Tell whether it is ready now."""
        self._looked_s = time.monotonic()
        ready = self._ready()
        if ready is not self._told:
            self._told = ready
            status = HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
            for service in _READY:
                await self.servicer.set(service, status)
                self.threaded.set(service, status)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()
