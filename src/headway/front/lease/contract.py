"""Decides what a store of leases is: something all replicas of a pool reach, and that gives a lease to one.

Rule 1. A claim that is granted holds until `lease_s` after the store took it in, by the store's clock, unless
        it is claimed again or given back.
Rule 2. Who holds it keeps its token. Who gets it anew gets a larger one than there ever was, also if the
        store has lost its memory meanwhile: tokens begin at a clock's milliseconds.
Rule 3. A store that does not answer, or not well, raises StoreError: nothing is known then.
"""

from dataclasses import dataclass
from typing import Protocol

from headway.core.errors import EngineError
from headway.core.leadership import Claim

__all__ = ["Granted", "Store", "StoreError", "Taken"]


class StoreError(EngineError):
    """The store did not answer, or not well; one line says what is wrong."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The lease is ours, with this token."""

    token: int


@dataclass(frozen=True, slots=True)
class Taken:
    """It is another's (`leader`: its name), for `free_in_s` at most unless claimed again."""

    leader: str
    free_in_s: float


class Store(Protocol):
    """Where the lease of one pool is, for one replica."""

    async def claim(self, claim: Claim) -> Granted | Taken:
        """Get or keep the lease. Raises StoreError."""

    async def release(self, token: int) -> None:
        """Give the lease back, if it is still ours. Raises StoreError."""

    async def close(self) -> None:
        """Disconnect."""
