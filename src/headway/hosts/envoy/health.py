"""Answers gRPC health checks: whether the process lives, and whether it should be sent requests.

"", "liveness"       always, while it can answer at all
"readiness", and     while every role has an engine that takes work, this replica leads its pool and
ext_proc's service   no drain has begun
"""

import asyncio
from collections.abc import Callable

from grpc_health.v1.health import aio
from grpc_health.v1.health_pb2 import HealthCheckResponse

from headway.hosts.envoy.messages import EXT_PROC

__all__ = ["Health"]

#: How often it is looked whether that has changed; who watches hears of it then.
LOOK_S = 0.1
_ALIVE, _READY = ("", "liveness"), ("readiness", EXT_PROC)


class Health:
    """The health service: `servicer` is to be added to servers. `ready()`: whether to be sent requests."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self.servicer = aio.HealthServicer()
        self._ready = ready
        self._told: bool | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to tell."""
        for service in _ALIVE:
            await self.servicer.set(service, HealthCheckResponse.SERVING)
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
        ready = self._ready()
        if ready is not self._told:
            self._told = ready
            status = HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
            for service in _READY:
                await self.servicer.set(service, status)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()
