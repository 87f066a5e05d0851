"""The policy of one pool: it holds requests, and places them when it sees fit.

Every policy of this family is the same machine; what differs is `_place(now)`. The machine keeps the ledger,
refuses prompts no rank can hold, bounds every hold, and takes a request back when its engine failed before
the first byte.

A request whose model no active instance serves is stranded: it is held apart, so that it neither blocks the
requests behind it nor counts as backlog, until an instance with its model comes or its hold ends.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from headway.core.actions import Action, Reject
from headway.core.cluster.buffer import Buffer, Waiting
from headway.core.cluster.contract import ClusterPolicy, Held
from headway.core.cluster.ledger import Ledger, RankLoad
from headway.core.events import (
    Arrived,
    Cancelled,
    ConcurrencyLimited,
    Event,
    Failed,
    Finished,
    InstanceDown,
    InstanceDraining,
    InstanceUp,
    LeaseHeld,
    LeaseLost,
    PassEnded,
    PassStarted,
    PrefillDone,
    Role,
    Snapshot,
    TimerFired,
)
from headway.core.registry import Registry, Rng
from headway.core.request import Request
from headway.core.settings import Settings, setting

__all__ = ["Immediate", "PoolPolicy", "PoolSettings", "cluster_policies"]

ANY_ROLE = frozenset(Role)


@dataclass(frozen=True, slots=True)
class PoolSettings(Settings):
    """Settings every cluster policy has."""

    max_hold_s: float = setting(
        120.0, "longest a request is held before it is refused", unit="s", at_least=0.0
    )


class PoolPolicy(ClusterPolicy):
    """Base of the policies of one pool. Construct with settings and a seeded source of random numbers."""

    Settings: ClassVar[type[PoolSettings]] = PoolSettings
    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    roles: ClassVar[frozenset[Role]] = ANY_ROLE
    #: The decode policy a bare prefill policy is paired with; None: itself.
    partner: ClassVar[str | None] = None

    def __init__(self, settings: PoolSettings, rng: Rng) -> None:
        self.settings = settings
        self.rng = rng
        self.ledger = Ledger()
        self.buffer = Buffer()
        self.stranded = Buffer()
        self._actions: list[Action] = []

    @abstractmethod
    def _place(self, now: float) -> None:
        """Dispatch what should leave the buffer now."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """See `ClusterPolicy.handle`."""
        self._actions = []
        getattr(self, _HANDLERS[type(event)])(event, now)
        if self.ledger.take_freed():
            self._limits_changed()
            if self.buffer:
                self._place(now)
        return self._actions

    def wake_at(self) -> float | None:
        """Return when the oldest hold must end; subclasses add their own times."""
        ends_s = self._oldest_s() + self.settings.max_hold_s
        return ends_s if ends_s < math.inf else None

    def held(self) -> list[Held]:
        """See `ClusterPolicy.held`."""
        nowhere = self._why_nowhere()
        held = [Held(w.request.id, w.since_s, nowhere or w.why) for w in self.buffer.values()]
        return held + self._held_stranded()

    def _why_nowhere(self) -> str:
        """Return why no instance may be given work; empty when one may, or none is known."""
        if self.ledger.active or self.ledger.paused or not self.ledger.instances:
            return ""
        return "every engine is at its concurrency limit" if self.ledger.eligible else "no engine takes work"

    def _held_stranded(self) -> list[Held]:
        why = "no active instance serves its model"
        return [Held(w.request.id, w.since_s, why) for w in self.stranded.values()]

    # Held requests: those an active instance serves in `buffer`, the others in `stranded`.

    def _hold(self, waiting: Waiting, *, first: bool = False) -> None:
        """Hold a request after all others, or before them if `first`."""
        queue = self.stranded if self.ledger.is_stranded(waiting.request) else self.buffer
        if first:
            queue.add_first(waiting)
        else:
            queue.add(waiting)

    def _let_go(self, request_id: str) -> None:
        """Stop holding a request; do nothing if it is not held."""
        self.buffer.remove(request_id)
        if self.stranded:
            self.stranded.remove(request_id)

    def _all_held(self) -> Iterator[Waiting]:
        """Iterate over a copy of all held requests."""
        return iter([*self.buffer.values(), *self.stranded.values()])

    def _oldest_s(self) -> float:
        """Return since when the oldest hold lasts; infinity when nothing is held."""
        oldest_s = self.buffer.oldest_s() if self.buffer else math.inf
        return min(oldest_s, self.stranded.oldest_s()) if self.stranded else oldest_s

    def _instances_changed(self) -> None:
        """Follow a change of which instances are active, or of the models they serve."""
        self.ledger.refresh()
        self._sort_stranded()

    def _limits_changed(self) -> None:
        """Follow a change of which instances are at their concurrency limit."""
        self.ledger.refresh()
        if not self.ledger.alike:
            self._sort_stranded()

    def _sort_stranded(self) -> None:
        """Hold each request where it belongs after a change of the active instances."""
        if not (self.ledger.names_models or self.stranded):
            return
        for waiting in self._all_held():
            if self.ledger.is_stranded(waiting.request) is not (waiting.request.id in self.stranded):
                self._let_go(waiting.request.id)
                self._hold(waiting)

    # What events do to the buffer and the ledger.

    def _arrived(self, event: Arrived, now: float) -> None:
        if self._admit(event.request, now):
            self._hold(Waiting(event.request, now))
            self._place(now)

    def _admit(self, request: Request, now: float) -> bool:
        """Refuse at the door what can never be served."""
        if self.ledger.fits(request):
            return True
        self._actions.append(Reject(request.id, "prompt-too-long"))
        return False

    def _cancelled(self, event: Cancelled, now: float) -> None:
        self._let_go(event.request_id)
        self.ledger.release(event.request_id)

    def _pass_started(self, event: PassStarted, now: float) -> None:
        pass

    def _pass_ended(self, event: PassEnded, now: float) -> None:
        if self.ledger.report(event):
            self._place(now)

    def _snapshot(self, event: Snapshot, now: float) -> None:
        if self.ledger.report(event):
            self._place(now)

    def _prefill_done(self, event: PrefillDone, now: float) -> None:
        self.ledger.prefilled(event.request_id)

    def _finished(self, event: Finished, now: float) -> None:
        self._let_go(event.request_id)  # recalled too late
        self.ledger.release(event.request_id)

    def _failed(self, event: Failed, now: float) -> None:
        placement = self.ledger.release(event.request_id)
        if not event.retry:
            self._let_go(event.request_id)
        elif placement is not None:
            self._take_back(placement.request, now)
            self._place(now)

    def _take_back(self, request: Request, now: float) -> None:
        """Hold a request again, before all others: it has waited once."""
        self._hold(Waiting(request, now, rounds=1, why="its engine failed"), first=True)

    def _instance_up(self, event: InstanceUp, now: float) -> None:
        self.ledger.up(event)
        for waiting in self._all_held():
            if not self.ledger.fits(waiting.request):
                self._reject_for_good(waiting)  # it came before anything was known
        self._sort_stranded()
        self._place(now)

    def _instance_draining(self, event: InstanceDraining, now: float) -> None:
        load = self.ledger.instances.get(event.instance)
        if load is not None:
            load.draining = True
            self._instances_changed()

    def _concurrency_limited(self, event: ConcurrencyLimited, now: float) -> None:
        self.ledger.limit(event.instance, event.requests)
        self._limits_changed()

    def _instance_down(self, event: InstanceDown, now: float) -> None:
        self.ledger.down(event.instance)
        self._sort_stranded()

    def _lease_held(self, event: LeaseHeld, now: float) -> None:
        self.ledger.paused = False
        self._instances_changed()
        self._place(now)

    def _lease_lost(self, event: LeaseLost, now: float) -> None:
        self.ledger.paused = True
        self._instances_changed()

    def _timer_fired(self, event: TimerFired, now: float) -> None:
        self._end_holds(now)
        self._place(now)

    def _end_holds(self, now: float) -> None:
        """Refuse what has been held for too long: every hold is bounded."""
        bound = self.settings.max_hold_s
        if now < self._oldest_s() + bound:
            return
        for waiting in self._all_held():
            if now >= waiting.since_s + bound:
                self._reject(waiting, "held-too-long", now)

    def _reject(self, waiting: Waiting, why: str, now: float) -> None:
        self._let_go(waiting.request.id)
        self._actions.append(Reject(waiting.request.id, why, self._retry_after_s(now)))

    def _reject_for_good(self, waiting: Waiting) -> None:
        self._let_go(waiting.request.id)
        self._actions.append(Reject(waiting.request.id, "prompt-too-long"))

    def _retry_after_s(self, now: float) -> float:
        """Guess when a place may be free: as long as the oldest held request has waited, at least a
        second."""
        oldest = self.buffer.first()
        return max(1.0, now - oldest.since_s) if oldest else 1.0

    def _dispatch(self, waiting: Waiting, rank: RankLoad, now: float, why: str) -> None:
        self._let_go(waiting.request.id)
        self._actions.append(self.ledger.place(waiting.request, rank, now, why))
        if rank.instance.full:
            self._limits_changed()


class Immediate(PoolPolicy):
    """A policy that dispatches each request the moment it comes, to the rank `_choose` names."""

    @abstractmethod
    def _choose(self, request: Request, ranks: list[RankLoad]) -> RankLoad:
        """Pick one of the ranks, which are those that serve the request's model (never empty)."""

    def _place(self, now: float) -> None:
        while self.buffer and self.ledger.ranks:
            waiting = next(iter(self.buffer.values()))
            ranks = self.ledger.ranks_for(waiting.request)
            self._dispatch(waiting, self._choose(waiting.request, ranks), now, "immediate")


_HANDLERS: dict[type[Event], str] = {
    Arrived: "_arrived",
    Cancelled: "_cancelled",
    PassStarted: "_pass_started",
    PassEnded: "_pass_ended",
    Snapshot: "_snapshot",
    PrefillDone: "_prefill_done",
    Finished: "_finished",
    Failed: "_failed",
    InstanceUp: "_instance_up",
    InstanceDraining: "_instance_draining",
    ConcurrencyLimited: "_concurrency_limited",
    InstanceDown: "_instance_down",
    LeaseHeld: "_lease_held",
    LeaseLost: "_lease_lost",
    TimerFired: "_timer_fired",
}

cluster_policies = Registry("policy", PoolPolicy)
