"""One engine as the gateway sees it: its state, what the policy was told of it, and what is under way there.

starting ──▶ up ──▶ ejected ──▶ down         ejected: takes nothing new (it failed us); down: it is gone
             ▲ ◀──────┘          │           a return takes healthy checks in a row, twice as many each time
             └───────────────────┘           an engine that said it leaves returns in a new life only
"""

import asyncio
import math
from dataclasses import replace
from enum import StrEnum
from typing import Protocol

from headway.core.events import InstanceUp
from headway.front.config import InstanceSpec
from headway.front.events import Listener
from headway.front.inference import Inference

__all__ = ["Leg", "State", "Worker"]

#: Without a word from an engine that publishes events for so long, its passes are worked out instead.
SILENT_S = 10.0
#: Engines take a number this much larger for the beginning of another count (theirs begins at 10,000).
_FAR = 20_000


class State(StrEnum):
    """Whether an engine gets work."""

    STARTING = "starting"
    UP = "up"
    EJECTED = "ejected"
    DOWN = "down"


class Leg(Protocol):
    """A request under way on a worker."""

    def abandon(self, worker: "Worker") -> None:
        """The worker is gone: give up, unless bytes are coming."""


class Worker:
    """An engine. `draining`: an operator's wish, which outlasts its health. `leaving`: the engine's own word,
    which lasts until it has been away. `models`: name → longest context.
    """

    inference: Inference

    def __init__(self, spec: InstanceSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.ranks = spec.ranks
        self.state = State.STARTING
        self.draining = False
        self.leaving = False
        self.told: InstanceUp | None = None
        self.epoch = 0
        self.sequence = 0
        self.heard_s = -math.inf
        self.listener: Listener | None = None
        self.said_hello = asyncio.Event()
        self.legs: set[Leg] = set()
        self.models: dict[str, int | None] = {}
        self.missed = 0  # health checks in a row
        self.passed = 0
        self.errors = 0  # failed requests in a row
        self.ejections = 0
        self.answered_s = -math.inf  # somebody: slow for another request then, but not hung
        self.up_since_s = math.inf
        self.why = "not checked yet"
        self.puzzles: set[type[Exception]] = set()  # what went wrong with it that should not have
        self._hello: InstanceUp | None = None
        self._base = 0
        self._last_number = 0

    @property
    def chunk_tokens(self) -> int:
        """Most prompt tokens of one pass."""
        return self._hello.chunk_tokens if self._hello else self.spec.chunk_tokens

    def takes_work(self) -> bool:
        """Whether the policy may send work there."""
        return self.state is State.UP and not self.draining

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
        """Note the epoch it is in; whether it is a new one, in which it has not said that it leaves."""
        if epoch <= self.epoch:
            return False
        self.epoch = epoch
        self.is_back()
        return True

    def is_back(self) -> None:
        """What it said before it was away no longer holds."""
        if self.leaving:
            self.leaving = False
            self.passed = 0

    def up_event(self) -> InstanceUp:
        """Return the event that introduces it to the policy."""
        if self._hello is None:
            return self.spec.instance_up(self.epoch)
        return replace(self._hello, epoch=self.epoch)

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
