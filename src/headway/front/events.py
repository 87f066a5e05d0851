"""Listens to the pass events of one engine and puts them into the gateway's terms.

Three things differ between what an engine says and what the policy must hear. The engine may have another
name for itself; it acknowledges the numbers on our headers, which go on where the policy's start again at
1; and an engine that knows nothing of those numbers (it acknowledges 0) is credited with the dispatches
that were seen to work.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from headway.core.events import InstanceDown, InstanceDraining, InstanceUp, PassEnded, PassStarted, Snapshot
from headway.wire.schema import PassEvent
from headway.wire.subscriber import Subscriber

__all__ = ["Listener", "Reporter"]


class Reporter(Protocol):
    """The worker that the events are of."""

    name: str

    def acknowledged(self, wire_number: int) -> int:
        """Return the policy's number for one that went over the wire."""

    def introduced(self, event: InstanceUp) -> None:
        """Take in what the engine says it is."""

    def reported(self, event: PassStarted | PassEnded | Snapshot) -> None:
        """Take in a report."""

    def said_goodbye(self, *, draining: bool) -> None:
        """The engine leaves, or takes nothing more."""


class Listener:
    """Subscribes for one worker. `is_other(name)`: whether a name is another worker's, whose events pass
    by here.
    """

    def __init__(
        self, reporter: Reporter, connect: str, snapshots: str | None, is_other: Callable[[str], bool]
    ) -> None:
        self._reporter = reporter
        self._is_other = is_other
        self._subscriber = Subscriber(connect, snapshots, self._hear)

    async def start(self) -> None:
        """Begin to listen. Raises ConfigError for an address that cannot be."""
        await self._subscriber.__aenter__()

    async def stop(self) -> None:
        """Listen no more."""
        await self._subscriber.close()

    def poll(self) -> None:
        """Ask for a snapshot."""
        self._subscriber.request_snapshot()

    def _hear(self, event: PassEvent) -> None:
        if self._is_other(event.instance):
            return
        own = self._reporter
        if event.instance != own.name:
            event = replace(event, instance=own.name)
        if isinstance(event, InstanceUp):
            own.introduced(event)
        elif isinstance(event, InstanceDown | InstanceDraining):
            own.said_goodbye(draining=isinstance(event, InstanceDraining))
        elif isinstance(event, PassStarted):
            own.reported(event)
        else:
            known = own.acknowledged(event.acknowledged)
            own.reported(event if known == event.acknowledged else replace(event, acknowledged=known))
