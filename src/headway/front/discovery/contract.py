"""Decides what a source of engines is: something that says, whenever it changes, which engines there are.

Rule 1. A source tells whole sets, never changes: whoever misses one has lost nothing with the next.
Rule 2. What a source cannot read it says in one line, and tells nothing: the last good set stays.
Rule 3. A source never gives up. What is wrong may be put right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from headway.front.config import InstanceSpec

__all__ = ["Found", "Source", "Tell"]


@dataclass(frozen=True, slots=True)
class Found:
    """The engines there are. `draining`: names of those that get nothing new and finish what they have."""

    instances: tuple[InstanceSpec, ...]
    draining: frozenset[str] = frozenset()


#: Hears a set. Returns at once.
Tell = Callable[[Found], None]


class Source(Protocol):
    """Where engines are found."""

    def check(self) -> None:
        """Raise ConfigError when it can never work, before anything starts."""

    async def follow(self, tell: Tell) -> None:
        """Tell the set there is, then each that follows, until cancelled."""
