"""Keeps the engines of different models apart: each group of engines has a policy of its own.

What a policy measures (saturation, backlog, pass times) and what it holds must not mix models: a queue for
one model says nothing about the engines of another.

Rule 1  (groups)    an instance that comes up joins the oldest group that shares a base model with it, else an
                    empty group, else a new one. It stays there until it is down. An instance that serves
                    anything (`models` is None) shares a model with every other. Adapters make no groups: they
                    run on the engines of their base model, and within the group their requests go only to
                    instances that loaded them (`Ledger.ranks_for`).
Rule 2  (requests)  a request goes to a group that can serve its model now, in every role. Of several, it goes
                    to the one with the fewest requests per rank.
Rule 3  (waiting)   without such a group a request waits in the group that had the model last, else in a group
                    without instances. It moves when another group can serve it. The policy of the group where
                    it waits bounds the wait.

With one group, which is the usual case, events go straight to its policy: only the requests that are not
over are remembered, in case another group comes up.
"""

from collections.abc import Callable
from dataclasses import dataclass

from headway.core.actions import Action, Dispatch, Recall, Reject
from headway.core.cluster.contract import ClusterPolicy, Held
from headway.core.cluster.model_group import ModelGroup
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
    Snapshot,
    TimerFired,
)
from headway.core.request import Request

__all__ = ["ByModel"]


#: Events that may change the groups, or concern them all.
_OF_INSTANCES = frozenset((InstanceUp, InstanceDraining, InstanceDown, LeaseHeld, LeaseLost))


@dataclass(slots=True, eq=False)
class _Tracked:
    """A request that is not over. `placed`: it was dispatched, and not recalled or failed since."""

    request: Request
    group: ModelGroup
    placed: bool = False


class ByModel(ClusterPolicy):
    """See the module's docstring. `make(number)` builds the policy of a new group; numbers count from 0."""

    def __init__(self, make: Callable[[int], ClusterPolicy]) -> None:
        self._make = make
        self._made = 0
        self._lease: LeaseHeld | LeaseLost | None = None
        self._group_of: dict[str, ModelGroup] = {}  # by instance
        self._requests: dict[str, _Tracked] = {}
        self.groups = [self._new_group(0.0)]
        self.reads_pab = self.groups[0].policy.reads_pab
        self.reads_prefixes = self.groups[0].policy.reads_prefixes

    def handle(self, event: Event, now: float) -> list[Action]:
        """See `ClusterPolicy.handle`."""
        if len(self.groups) == 1 and type(event) not in _OF_INSTANCES:
            return self._handle_alone(event, now)
        match event:
            case Arrived(request):
                actions = self._send(request, self._choose(request, now), now)
            case PassEnded(name) | PassStarted(name) | Snapshot(name) | ConcurrencyLimited(name):
                actions = self._group_of.get(name, self.groups[0]).policy.handle(event, now)
            case PrefillDone(request_id):
                actions = self._policy_of(request_id).handle(event, now)
            case Cancelled(request_id) | Finished(request_id):
                policy = self._policy_of(request_id)
                self._forget(request_id)
                actions = policy.handle(event, now)
            case Failed(request_id):
                actions = self._failed(event, request_id, now)
            case InstanceUp():
                actions = self._instance_up(event, now)
            case InstanceDraining(name) | InstanceDown(name):
                actions = self._instance_leaves(event, name, now)
            case TimerFired():
                actions = self._due(event, now)
            case LeaseHeld() | LeaseLost():
                self._lease = event
                actions = [action for group in self.groups for action in group.policy.handle(event, now)]
        self._note(actions)
        return actions

    def _handle_alone(self, event: Event, now: float) -> list[Action]:
        """Handle an event while there is one group: each request is its group's."""
        group = self.groups[0]
        if isinstance(event, Arrived):
            self._requests[event.request.id] = _Tracked(event.request, group)
            group.requests += 1
        elif isinstance(event, Finished | Cancelled):
            self._forget(event.request_id)
        elif isinstance(event, Failed):
            tracked = self._requests.get(event.request_id)
            if tracked is not None and event.retry:
                tracked.placed = False
            else:
                self._forget(event.request_id)
        actions = group.policy.handle(event, now)
        if actions:
            self._note(actions)
        return actions

    def wake_at(self) -> float | None:
        """See `ClusterPolicy.wake_at`."""
        if len(self.groups) == 1:
            return self.groups[0].policy.wake_at()
        times = [wake_s for group in self.groups if (wake_s := group.policy.wake_at()) is not None]
        return min(times, default=None)

    def held(self) -> list[Held]:
        """See `ClusterPolicy.held`."""
        return [held for group in self.groups for held in group.policy.held()]

    def _due(self, event: TimerFired, now: float) -> list[Action]:
        """Wake the policies whose time has come."""
        if len(self.groups) == 1:
            return self.groups[0].policy.handle(event, now)
        actions: list[Action] = []
        for group in self.groups:
            wake_s = group.policy.wake_at()
            if wake_s is not None and wake_s <= now:
                actions += group.policy.handle(event, now)
        return actions

    # Requests

    def _choose(self, request: Request, now: float) -> ModelGroup:
        """Return the group a request goes to (rules 2 and 3)."""
        if len(self.groups) == 1:
            return self.groups[0]
        model = request.model
        able = [(group, ranks) for group in self.groups if (ranks := group.ranks_for(model))]
        if able:
            return min(able, key=lambda pair: pair[0].requests / pair[1])[0]
        waits_in = (group for group in self.groups if group.has(model))
        return next(waits_in, None) or self._without_instances(now)

    def _without_instances(self, now: float) -> ModelGroup:
        """Return the group for requests whose model no group has; create it if there is none."""
        empty = next((group for group in self.groups if group.is_new), None)
        if empty is None:
            empty = self._new_group(now)
            self.groups.append(empty)
        return empty

    def _policy_of(self, request_id: str) -> ClusterPolicy:
        tracked = self._requests.get(request_id)
        return (tracked.group if tracked is not None else self.groups[0]).policy

    def _send(self, request: Request, group: ModelGroup, now: float) -> list[Action]:
        self._requests[request.id] = _Tracked(request, group)
        group.requests += 1
        return group.policy.handle(Arrived(request), now)

    def _failed(self, event: Failed, request_id: str, now: float) -> list[Action]:
        policy = self._policy_of(request_id)
        tracked = self._requests.get(request_id)
        if tracked is None or not event.retry:
            self._forget(request_id)
            return policy.handle(event, now)
        tracked.placed = False
        return self._move(tracked, now) or policy.handle(event, now)

    def _move(self, tracked: _Tracked, now: float) -> list[Action] | None:
        """Move a request that is not placed to a group that can serve it; None if it is best where it is."""
        request, group = tracked.request, tracked.group
        if group.ranks_for(request.model):
            return None
        target = self._choose(request, now)
        if target is group or not target.ranks_for(request.model):
            return None
        self._forget(request.id)
        return group.policy.handle(Cancelled(request.id), now) + self._send(request, target, now)

    def _move_held(self, now: float) -> list[Action]:
        """Move the held requests for which another group can do more than theirs."""
        actions: list[Action] = []
        if len(self.groups) == 1:
            return actions
        for held in self.held():
            tracked = self._requests.get(held.request_id)
            if tracked is not None and not tracked.placed:
                moved = self._move(tracked, now) or []
                self._note(moved)
                actions += moved
        return actions

    def _note(self, actions: list[Action]) -> None:
        """Follow what becomes of requests."""
        for action in actions:
            if isinstance(action, Reject):
                self._forget(action.request_id)
            elif isinstance(action, Dispatch | Recall) and action.request_id in self._requests:
                self._requests[action.request_id].placed = isinstance(action, Dispatch)

    def _forget(self, request_id: str) -> None:
        tracked = self._requests.pop(request_id, None)
        if tracked is not None:
            tracked.group.requests -= 1

    # Instances

    def _instance_up(self, event: InstanceUp, now: float) -> list[Action]:
        group = self._group_of.get(event.instance) or self._group_for(event, now)
        self._group_of[event.instance] = group
        group.add(event)
        actions = group.policy.handle(event, now)
        self._note(actions)
        return actions + self._move_held(now)

    def _instance_leaves(self, event: InstanceDraining | InstanceDown, name: str, now: float) -> list[Action]:
        group = self._group_of.get(name)
        if group is None:
            return self.groups[0].policy.handle(event, now)
        if isinstance(event, InstanceDown):
            del self._group_of[name]
            group.remove(name)
        else:
            group.drain(name)
        actions = group.policy.handle(event, now)
        self._note(actions)
        return actions + self._move_held(now)

    def _group_for(self, info: InstanceUp, now: float) -> ModelGroup:
        """Return the group a new instance joins (rule 1); create it if there is none."""
        for group in sorted(self.groups, key=lambda group: group.is_new):
            if group.takes(info):
                return group
        group = self._new_group(now)
        self.groups = [*(each for each in self.groups if not each.is_unused), group]
        return group

    def _new_group(self, now: float) -> ModelGroup:
        policy = self._make(self._made)
        self._made += 1
        if self._lease is not None:
            policy.handle(self._lease, now)
        return ModelGroup(policy)
