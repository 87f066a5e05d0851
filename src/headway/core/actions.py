"""What a cluster policy asks of its host. Carry them out in the order given."""

from dataclasses import dataclass

__all__ = ["Action", "Dispatch", "Poll", "Recall", "Reject"]


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send the request to this rank now.

    `number` counts the dispatches to the instance from 1; its reports acknowledge up to a number. `why` is
    one word of the policy's for the decision log, for instance "slot" or "idle".
    """

    request_id: str
    instance: str
    rank: int
    number: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Reject:
    """Tell the client no (HTTP 429), why, and when to come back (None: never, the request itself is at
    fault)."""

    request_id: str
    why: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Recall:
    """Withdraw the request from this instance; no byte of its answer was sent. It will be dispatched
    again."""

    request_id: str
    instance: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Poll:
    """Ask the instance for a `Snapshot`: its reports are overdue."""

    instance: str


Action = Dispatch | Reject | Recall | Poll
