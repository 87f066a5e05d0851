"""Collects what the page shows, as an observer of the driver: no policy knows of it.

Noting costs a few microseconds per event and nothing is worked out before somebody looks. Memory is
bounded: rings of passes, decisions and latencies, and one small record per request that is not over.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from headway.core.actions import Action, Reject
from headway.core.events import (
    Arrived,
    Cancelled,
    Event,
    Failed,
    Finished,
    InstanceDown,
    InstanceUp,
    PassEnded,
    Snapshot,
)
from headway.core.request import Request
from headway.hosts.gateway.flight import Flight

__all__ = ["Decision", "Latency", "Observer", "Pass"]

#: The rings' lengths. A hundred passes a second fill ten seconds of lanes eight times over.
MOST_PASSES, MOST_DECISIONS, MOST_LATENCIES = 8192, 512, 4096


class Pass(NamedTuple):
    """A pass that ended; `number` counts them all."""

    number: int
    at_s: float
    report: PassEnded


class Decision(NamedTuple):
    """An action, and the event that led to it; `number` counts them all."""

    number: int
    at_s: float
    event: Event
    action: Action


class Latency(NamedTuple):
    """A request that was served. `tpot_s`: None for a single token. `*_met`: by its own targets."""

    at_s: float
    ttft_s: float
    tpot_s: float | None
    ttft_met: bool
    tpot_met: bool


class Observer:
    """Sees every event (`observe`) and every request that is over (`done`)."""

    def __init__(self) -> None:
        self.passes: deque[Pass] = deque(maxlen=MOST_PASSES)
        self.decisions: deque[Decision] = deque(maxlen=MOST_DECISIONS)
        self.latencies: deque[Latency] = deque(maxlen=MOST_LATENCIES)
        #: What each instance says it is, and the last report of each (instance, first rank).
        self.shapes: dict[str, InstanceUp] = {}
        self.loads: dict[tuple[str, int], PassEnded | Snapshot] = {}
        #: Requests that are not over, by id. Every one that arrived ends in an event or a `Reject`.
        self.requests: dict[str, Request] = {}
        self.totals = {"arrived": 0, "served": 0, "refused": 0, "client_errors": 0, "failed": 0, "gone": 0}
        self._passes = self._decisions = 0

    def observe(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        """Note an event and what the policy did about it: an observer of the driver."""
        note = _NOTES.get(type(event))
        if note is not None:
            note(self, now, event)
        for action in actions:
            self._decisions += 1
            self.decisions.append(Decision(self._decisions, now, event, action))
            if isinstance(action, Reject):
                self.requests.pop(action.request_id, None)

    def done(self, flight: Flight, status: int) -> None:
        """Note how a request ended, with the status its client was given."""
        self.totals[_outcome(status)] += 1
        if status == 200 and flight.call.stream and flight.ended_s is not None:
            latency = _latency(flight, flight.ended_s)
            if latency is not None:
                self.latencies.append(latency)

    def keep(self, instances: Iterable[str]) -> None:
        """Forget instances that are no workers any more."""
        names = set(instances)
        self.shapes = {name: shape for name, shape in self.shapes.items() if name in names}
        self.loads = {key: load for key, load in self.loads.items() if key[0] in names}

    def _arrived(self, now: float, event: Arrived) -> None:
        self.totals["arrived"] += 1
        self.requests[event.request.id] = event.request

    def _over(self, now: float, event: Cancelled | Finished) -> None:
        self.requests.pop(event.request_id, None)

    def _failed(self, now: float, event: Failed) -> None:
        if not event.retry:
            self.requests.pop(event.request_id, None)

    def _pass_ended(self, now: float, event: PassEnded) -> None:
        self._passes += 1
        self.passes.append(Pass(self._passes, now, event))
        self.loads[event.instance, event.first_rank] = event

    def _snapshot(self, now: float, event: Snapshot) -> None:
        self.loads[event.instance, event.first_rank] = event

    def _instance_up(self, now: float, event: InstanceUp) -> None:
        self.shapes[event.instance] = event

    def _instance_down(self, now: float, event: InstanceDown) -> None:
        self.loads = {key: load for key, load in self.loads.items() if key[0] != event.instance}


def _outcome(status: int) -> str:
    """Name what became of a request. A 4xx is the client's error, not a failure of the service."""
    if status < 300:
        return "served"
    other = "client_errors" if 400 <= status < 500 else "failed"
    return {408: "refused", 429: "refused", 499: "gone"}.get(status, other)  # 408: held for too long


def _latency(flight: Flight, ended_s: float) -> Latency | None:
    if flight.first_byte_s is None:
        return None
    slo = flight.request.slo
    ttft_s, tpot_s = flight.first_byte_s - flight.request.arrival_s, None
    if flight.output_tokens is not None and flight.output_tokens > 1:
        tpot_s = (ended_s - flight.first_byte_s) / (flight.output_tokens - 1)
    return Latency(ended_s, ttft_s, tpot_s, ttft_s <= slo.ttft_s, tpot_s is None or tpot_s <= slo.tpot_s)


_NOTES: dict[type[Event], Callable[..., None]] = {
    Arrived: Observer._arrived,
    Cancelled: Observer._over,
    Finished: Observer._over,
    Failed: Observer._failed,
    PassEnded: Observer._pass_ended,
    Snapshot: Observer._snapshot,
    InstanceUp: Observer._instance_up,
    InstanceDown: Observer._instance_down,
}
