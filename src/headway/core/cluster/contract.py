"""The contract of cluster policies: which instance and rank a request goes to, and when.

    handle(event, now)  ->  [Action]     for every event, in order of time
    wake_at()           ->  float|None   when to call `handle(TimerFired(), now)` next, if nothing happens
    before

`now` is monotonic seconds. A host sleeps until `wake_at()` or the next event; it may be late, never early.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from headway.core.actions import Action
from headway.core.events import Event

__all__ = ["ClusterPolicy", "Held"]


@dataclass(frozen=True, slots=True)
class Held:
    """A request that waits in a policy, since when, and why (one short phrase)."""

    request_id: str
    since_s: float
    why: str


class ClusterPolicy(ABC):
    """What a host drives: the policy of one pool, or of a prefill and a decode pool together."""

    #: Whether it reads `pab_tokens` of reports: working them out costs a walk over an engine's requests.
    reads_pab: bool = False
    #: Whether it looks at `Request.prefix`: working out hashes costs a walk over the prompt.
    reads_prefixes: bool = False

    @abstractmethod
    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in an event; return what to do about it, in order."""

    @abstractmethod
    def wake_at(self) -> float | None:
        """When this policy wants a `TimerFired`, in seconds; None: only events matter."""

    @abstractmethod
    def held(self) -> list[Held]:
        """Explain every request that was not dispatched yet."""
