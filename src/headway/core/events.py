"""What a host tells a cluster policy. Each is handed over with `now`, in order of time.

Unknown is `None`, never 0. Per-rank values are tuples of shape (ranks,), starting at `first_rank`: an
instance in lockstep reports all its ranks at once (`first_rank=0`), independent ranks report one by one.

Reports (`PassEnded`, `Snapshot`) carry three numbers that make late and lost ones harmless: `epoch` (grows
when the instance restarts), `sequence` (grows with each report of an epoch) and `acknowledged` (the last
`Dispatch.number` of this instance that the report accounts for).
"""

from dataclasses import dataclass
from enum import StrEnum

from headway.core.errors import ConfigError
from headway.core.request import Request

__all__ = [
    "Arrived",
    "Cancelled",
    "ConcurrencyLimited",
    "Event",
    "Failed",
    "Finished",
    "InstanceDown",
    "InstanceDraining",
    "InstanceUp",
    "LeaseHeld",
    "LeaseLost",
    "PassEnded",
    "PassStarted",
    "PrefillDone",
    "Role",
    "Snapshot",
    "StepModel",
    "TimerFired",
]


class Role(StrEnum):
    """What an instance does."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request wants a place in the pool."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client is gone; the host withdraws the request wherever it is."""

    request_id: str


@dataclass(frozen=True, slots=True)
class PassStarted:
    """A forward pass began (optional: not every engine says so)."""

    instance: str
    epoch: int
    sequence: int
    first_rank: int = 0


@dataclass(frozen=True, slots=True)
class StepModel:
    """What a rank has learned of its step times: `a_s + b_s·new + c_s·context + q_s·attention` seconds.

    Terms as in `core/estimate/step_time.py`. `steps`: learned from. `error`: mean absolute error of the last
    steps, as a share; None before it is known. `margin`: factor that keeps most steps within their
    prediction.
    """

    a_s: float
    b_s: float
    c_s: float
    q_s: float
    steps: int
    error: float | None = None
    margin: float = 1.0


@dataclass(frozen=True, slots=True)
class PassEnded:
    """A forward pass ended; the state of each rank right after it.

    `ran_tokens`: new prompt tokens computed in the pass. `queued_tokens`: prompt tokens received and still to
    compute, waiting or partial. `kv_blocks`: in use. `running`: requests that hold a decode seat. `waiting`:
    requests received that do not run yet. `pab_tokens`: prefill admission budget (FairBatching).
    `decode_models`, `mixed_models`: step times as the engine has learned them, of steps without and with
    prompts; said now and then.
    """

    instance: str
    epoch: int
    sequence: int
    acknowledged: int
    duration_s: float
    ran_tokens: tuple[int, ...]
    queued_tokens: tuple[int, ...] | None = None
    kv_blocks: tuple[int, ...] | None = None
    running: tuple[int, ...] | None = None
    waiting: tuple[int, ...] | None = None
    pab_tokens: tuple[int, ...] | None = None
    first_rank: int = 0
    decode_models: tuple[StepModel | None, ...] | None = None
    mixed_models: tuple[StepModel | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The full state of an instance, in answer to `Poll` or after it came back. Fields as in `PassEnded`.

    `busy` says whether a pass is under way.
    """

    instance: str
    epoch: int
    sequence: int
    acknowledged: int
    busy: bool
    queued_tokens: tuple[int, ...] | None = None
    kv_blocks: tuple[int, ...] | None = None
    running: tuple[int, ...] | None = None
    waiting: tuple[int, ...] | None = None
    pab_tokens: tuple[int, ...] | None = None
    first_rank: int = 0


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prompt is computed and the first token exists."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last token exists. `output_tokens` is known only now."""

    request_id: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine lost the request. `retry`: no byte has reached the client, so it may be placed again."""

    request_id: str
    reason: str
    retry: bool


@dataclass(frozen=True, slots=True)
class InstanceUp:
    """An instance can take work: new, restarted (a higher epoch) or back after it was suspected.

    `chunk_tokens`: most prompt tokens a rank takes in one pass. `kv_blocks`, `max_running`: per rank.
    `models`: every name it serves, adapters included; None: it serves whatever it is asked for.
    `base_models`: those of the names that are no adapters. Raises ConfigError when it has no rank or no room
    for a token.
    """

    instance: str
    role: Role
    ranks: int
    chunk_tokens: int
    kv_blocks: int | None = None
    block_tokens: int = 16
    max_running: int | None = None
    lockstep: bool = True
    epoch: int = 0
    models: frozenset[str] | None = None
    base_models: frozenset[str] = frozenset()

    def serves(self, model: str | None) -> bool:
        """Return whether a request for this model may go there."""
        return model is None or self.models is None or model in self.models

    def __post_init__(self) -> None:
        for name in ("ranks", "chunk_tokens", "block_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"instance {self.instance}: {name} must be at least 1, got {getattr(self, name)}"
                )


@dataclass(frozen=True, slots=True)
class InstanceDraining:
    """The instance takes no new work and finishes what it has."""

    instance: str


@dataclass(frozen=True, slots=True)
class ConcurrencyLimited:
    """Set the most requests this host may have at an instance at once (backpressure).

    `requests`: the limit; 0: nothing new for now; None: no limit. It holds until it is set again or the
    instance goes down. What is there beyond the limit stays there.
    """

    instance: str
    requests: int | None


@dataclass(frozen=True, slots=True)
class InstanceDown:
    """The instance is gone. The host sends `Failed` for each request that was there, after this."""

    instance: str


@dataclass(frozen=True, slots=True)
class LeaseHeld:
    """This replica leads the pool until `until_s`, in `now`'s seconds, unless this is said again. A policy
    that never hears of leases leads.
    """

    until_s: float


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """This replica no longer leads the pool: nothing is placed, whatever else is heard goes on counting."""


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time a policy asked for by `wake_at()` has come (or is past: hosts may be late)."""


Event = (
    Arrived
    | Cancelled
    | PassStarted
    | PassEnded
    | Snapshot
    | PrefillDone
    | Finished
    | Failed
    | InstanceUp
    | InstanceDraining
    | ConcurrencyLimited
    | InstanceDown
    | LeaseHeld
    | LeaseLost
    | TimerFired
)
