"""Lets a policy place requests only while this replica leads the pool: two that place undo each other.

Rule 1  (the lease)   from `LeaseHeld(until_s)` the policy may place until that very moment of this host's own
                      clock, or until `LeaseLost`. The lease itself runs longer (`core/leadership.py`).
Rule 2  (following)   a follower hears all there is to hear of the engines, and places nothing. What arrives
                      is held where its socket is.
Rule 3  (patience)    it is held for `wait_s` at most while this replica does not lead, then refused as
                      "not-leader": the client, or what balances before us, tries another replica.
Rule 4  (taking over) what the leader before placed and no report has told of yet is unknown here. So every
                      engine is polled, and the first batch waits until each has reported, `LOOK_S` at most.
"""

import math
from dataclasses import replace

from headway.core.actions import Action, Poll, Recall, Reject
from headway.core.cluster.contract import ClusterPolicy, Held
from headway.core.events import (
    Arrived,
    Cancelled,
    Event,
    Failed,
    InstanceDown,
    InstanceUp,
    LeaseHeld,
    LeaseLost,
    PassEnded,
    PrefillDone,
    Snapshot,
    TimerFired,
)

__all__ = ["LOOK_S", "NOT_LEADER", "Led"]

#: An engine that is polled answers in milliseconds, or not at all.
LOOK_S = 0.25
#: Why a request is refused that waited for a leader in vain.
NOT_LEADER = "not-leader"
#: Whoever leads by then takes it.
RETRY_AFTER_S = 1.0

_WHY_HELD = "this replica does not lead the pool"


class Led(ClusterPolicy):
    """A policy under a lease. It follows until it is told otherwise."""

    def __init__(self, policy: ClusterPolicy, *, wait_s: float) -> None:
        self.reads_pab = policy.reads_pab
        self.reads_prefixes = policy.reads_prefixes
        self._policy = policy
        self._wait_s = wait_s
        self._up: set[str] = set()
        self._until_s = -math.inf  # of the lease
        self._lost_s = -math.inf
        self._leads = False
        self._unheard: set[str] = set()  # engines that owe a report before the first batch
        self._look_s = math.inf  # until when it waits for them
        self._ends_s = math.inf  # no wait ends earlier than this
        policy.handle(LeaseLost(), -math.inf)

    def leads(self, now: float) -> bool:
        """Whether requests may be placed now."""
        return self._leads and now < self._until_s

    def handle(self, event: Event, now: float) -> list[Action]:
        """See `ClusterPolicy.handle`."""
        actions = self._lose(now) if self._until_s <= now else []
        match event:
            case LeaseHeld(until_s=until_s):
                actions += self._held(until_s, now)
            case LeaseLost():
                actions += self._lose(now)
            case TimerFired():
                actions += self._due(event, now)
            case _:
                actions += self._policy.handle(event, now)
                self._note(event, actions, now)
        if self._look_s <= now or (self._look_s < math.inf and not self._unheard):
            actions += self._lead(now)
        if self._ends_s <= now:
            actions += self._end_waits(now)
        return actions

    def wake_at(self) -> float | None:
        """See `ClusterPolicy.wake_at`."""
        inner_s = self._policy.wake_at()
        lease_s = self._until_s if self._until_s > -math.inf else math.inf
        first_s = min(math.inf if inner_s is None else inner_s, lease_s, self._look_s, self._ends_s)
        return None if first_s == math.inf else first_s

    def held(self) -> list[Held]:
        """See `ClusterPolicy.held`."""
        held = self._policy.held()
        return held if self._leads else [replace(each, why=_WHY_HELD) for each in held]

    # The lease

    def _held(self, until_s: float, now: float) -> list[Action]:
        if until_s <= now:
            return []  # the answer took longer than the lease
        known, self._until_s = self._until_s > -math.inf, until_s
        if known:
            return []
        self._unheard, self._look_s, self._ends_s = set(self._up), now + LOOK_S, math.inf
        return [Poll(name) for name in sorted(self._up)]

    def _lead(self, now: float) -> list[Action]:
        self._leads, self._unheard, self._look_s = True, set(), math.inf
        return self._policy.handle(LeaseHeld(self._until_s), now)

    def _lose(self, now: float) -> list[Action]:
        if self._until_s == -math.inf:
            return []
        self._until_s, self._lost_s = -math.inf, now
        self._leads, self._unheard, self._look_s = False, set(), math.inf
        self._ends_s = now + self._wait_s
        return self._policy.handle(LeaseLost(), now)

    # What is heard

    def _note(self, event: Event, actions: list[Action], now: float) -> None:
        match event:
            case InstanceUp(name):
                self._up.add(name)
            case InstanceDown(name):
                self._up.discard(name)
                self._unheard.discard(name)
            case PassEnded(name) | Snapshot(name):
                self._unheard.discard(name)
            case Arrived() | PrefillDone() | Failed():
                self._expect_wait(now)
        if any(isinstance(action, Recall) for action in actions):
            self._expect_wait(now)

    def _due(self, event: TimerFired, now: float) -> list[Action]:
        wake_s = self._policy.wake_at()
        if wake_s is None or wake_s > now:
            return []
        actions = self._policy.handle(event, now)
        self._note(event, actions, now)
        return actions

    # Waiting for a leader

    def _expect_wait(self, now: float) -> None:
        """A request may have begun to wait."""
        if self._until_s == -math.inf:
            self._ends_s = min(self._ends_s, now + self._wait_s)

    def _end_waits(self, now: float) -> list[Action]:
        actions: list[Action] = []
        self._ends_s = math.inf
        for held in self._policy.held():
            ends_s = max(held.since_s, self._lost_s) + self._wait_s
            if ends_s > now:
                self._ends_s = min(self._ends_s, ends_s)
                continue
            actions.append(Reject(held.request_id, NOT_LEADER, RETRY_AFTER_S))
        return actions + self._withdraw(actions, now)

    def _withdraw(self, rejects: list[Action], now: float) -> list[Action]:
        """Have the policy forget what was refused in its stead."""
        return [
            action
            for reject in rejects
            if isinstance(reject, Reject)
            for action in self._policy.handle(Cancelled(reject.request_id), now)
        ]
