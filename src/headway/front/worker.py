"""One engine as a front door sees it: its health, what the policy knows of it, and what is under way there.

Its states are those of `core/engine_health.py`; its concurrency limit is learned by
`core/concurrency_limit.py`.
"""

import asyncio
import math
from dataclasses import replace
from typing import Protocol

from headway.core.concurrency_limit import ConcurrencyLimit
from headway.core.engine_health import EngineHealth, HealthRules
from headway.core.engine_health import EngineState as State
from headway.core.events import InstanceUp
from headway.front.config import InstanceSpec
from headway.front.events import Listener
from headway.front.inference import Inference
from headway.front.model_catalog import ModelCard, base_names

__all__ = ["Leg", "State", "Worker"]

#: Without a word from an engine that publishes events for so long, its passes are worked out instead.
SILENT_S = 10.0
#: Engines take a number this much larger for the beginning of another count (theirs begins at 10,000).
_FAR = 20_000


class Leg(Protocol):
    """A request under way at an engine. `scheduled`: the policy placed it there."""

    scheduled: bool

    def abandon(self, worker: "Worker") -> None:
        """The worker is gone: give up, unless bytes are coming."""


class Worker:
    """An engine.

    `health` decides whether it gets work, `limit` how much at once. `draining`: set by an operator; it
    outlasts every state of health. `told`: the event that introduced it to the policy; None while it is down.
    `models`: those it listed last, by name; empty: it lists none.
    """

    inference: Inference

    def __init__(self, spec: InstanceSpec, rules: HealthRules | None = None, now: float = -math.inf) -> None:
        self.spec = spec
        self.name = spec.name
        self.ranks = spec.ranks
        self.health = EngineHealth(rules or HealthRules(), now)
        self.limit = ConcurrencyLimit()
        self.limit_told: int | None = None  # what the policy knows of it
        self.draining = False
        self.told: InstanceUp | None = None
        self.epoch = 0
        self.sequence = 0
        self.heard_s = -math.inf
        self.listener: Listener | None = None
        self.said_hello = asyncio.Event()
        self.legs: set[Leg] = set()
        self.models: dict[str, ModelCard] = {}
        self.asked_for_models = False
        self.models_asked_s = -math.inf
        self.load_doubts: set[str] = set()  # how its metrics contradict the configured ranks, as logged
        self.puzzles: set[type[Exception]] = set()  # what went wrong with it that should not have
        self._hello: InstanceUp | None = None
        self._base = 0
        self._last_number = 0

    @property
    def state(self) -> State:
        """The state of its health."""
        return self.health.state

    @property
    def in_flight(self) -> int:
        """How many requests are under way there that the policy placed."""
        return sum(getattr(leg, "scheduled", True) for leg in self.legs)

    @property
    def chunk_tokens(self) -> int:
        """Most prompt tokens of one pass."""
        return self._hello.chunk_tokens if self._hello else self.spec.chunk_tokens

    def takes_work(self) -> bool:
        """Whether the policy may send work there."""
        return self.state is State.UP and not self.draining

    def serves(self, model: str | None) -> bool:
        """Return whether the engine lists the model, or lists none and so serves any."""
        return model is None or not self.models or model in self.models

    def shares_model(self, other: "Worker") -> bool:
        """Return whether some request could be served by either engine."""
        return not (self.models and other.models) or any(name in other.models for name in self.models)

    def reports(self, now: float) -> bool:
        """Whether the engine tells its passes itself."""
        return now - self.heard_s < SILENT_S

    def next_sequence(self) -> int:
        """Return the number of the next report made in its name."""
        self.sequence += 1
        return self.sequence

    def hello(self, event: InstanceUp) -> bool:
        """Take in what the engine says of itself; whether that is news. Its shape is the configuration's."""
        self._hello = replace(event, role=self.spec.role, ranks=self.spec.ranks)
        self.reached(event.epoch)
        return self.up_event() != self.told

    def reached(self, epoch: int) -> bool:
        """Update the epoch. Return whether it is a new one, in which the engine has not announced its end."""
        if epoch <= self.epoch:
            return False
        self.epoch = epoch
        self.health.reached_end()
        return True

    def up_event(self) -> InstanceUp:
        """Return the event that introduces it to the policy."""
        info = self.spec.instance_up(self.epoch) if self._hello is None else self._hello
        models = frozenset(self.models) or None
        return replace(info, epoch=self.epoch, models=models, base_models=base_names(self.models.values()))

    def begin_anew(self) -> None:
        """Start a life after death. An engine that counts its epochs itself will tell."""
        if self._hello is None and self.heard_s == -math.inf:
            self.epoch += 1
            self.sequence = 0

    # Numbers of dispatches. The policy counts from 1 again when an instance was down; on the wire they go
    # on, so that an old acknowledgement cannot be taken for a new one.

    def wire_number(self, number: int) -> int:
        """Return what the header says for a dispatch."""
        self._last_number = max(self._last_number, number)
        return self._base + number

    def acknowledged(self, wire_number: int) -> int:
        """Return the policy's number for one the engine acknowledges; 0: it knows nothing of our numbers."""
        if wire_number == 0:
            return self.inference.acknowledged
        if wire_number > self._base + self._last_number:  # it counted for another gateway before us
            self._base = wire_number - self._last_number
        return max(0, wire_number - self._base)

    def count_anew(self) -> None:
        """Begin far from where another leader of the pool may have counted to: engines take it for a count of
        its own, and what they still acknowledge of the other's is none of ours.
        """
        self._base += _FAR

    def rebase(self) -> None:
        """The policy will count from 1 again."""
        self._base += self._last_number
        self._last_number = 0
