"""Decides nothing: what an engine knows of one request, and how far it has come.

A decode's progress is not stored but read off the engine's clock: `generated = clock − offset`, so that a
pass in which a thousand decodes each gain a token touches none of them.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from headway.core.errors import InvariantError
from headway.core.request import Request

if TYPE_CHECKING:
    from headway.model.decodes import Decodes

__all__ = ["Stage", "Work"]


class Stage(Enum):
    """Where a request is in its engine's care."""

    NEW = auto()
    WAITING = auto()  # holds nothing yet
    ARRIVED = auto()  # prefilled elsewhere, waits for blocks and a seat
    PREFILLING = auto()
    DECODING = auto()
    GONE = auto()


@dataclass(eq=False, slots=True)
class Work:
    """A request inside one engine; implements `core.batch.contract.EngineRequest`. Good for one stay only.

    `output_tokens`: its true output length, which no policy may read. `prefilled`: it comes with the KV of
    its prompt and one generated token; the host may set `first_token_s` before it submits it. `lateness_s`:
    the largest (delivery − deadline line) over its tokens here, final when it leaves. `truncated`: it left
    with fewer tokens than asked for because the rank's KV holds no more. Raises InvariantError for an output
    of no token.
    """

    request: Request
    output_tokens: int
    prefilled: bool = False
    first_token_s: float | None = field(default=None, init=False)
    finished: bool = field(default=False, init=False)
    truncated: bool = field(default=False, init=False)
    preemptions: int = field(default=0, init=False)
    lateness_s: float = field(default=float("-inf"), init=False)
    # The engine's own notes: the rank it is on, its share of the pass under way, what it holds.
    stage: Stage = field(default=Stage.NEW, init=False, repr=False)
    rank: int = field(default=-1, init=False, repr=False)
    chunk_tokens: int = field(default=0, init=False, repr=False)
    held_hashes: int = field(default=0, init=False, repr=False)
    cancelled: bool = field(default=False, init=False, repr=False)
    stored_generated: int = field(default=0, init=False, repr=False)
    stored_context: int = field(default=0, init=False, repr=False)
    # Notes of `Decodes`, while it is one of them.
    decodes: "Decodes | None" = field(default=None, init=False, repr=False)
    limit: int = field(default=0, init=False, repr=False)
    offset: int = field(default=0, init=False, repr=False)
    since: int = field(default=0, init=False, repr=False)
    due: int = field(default=-1, init=False, repr=False)
    residue: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.output_tokens < 1:
            raise InvariantError(f"request {self.request.id}: output_tokens must be at least 1")
        if self.prefilled:
            self.stored_generated = 1

    @property
    def generated_tokens(self) -> int:
        """Output tokens delivered so far."""
        decodes = self.decodes
        return self.stored_generated if decodes is None else decodes.clock - self.offset

    @property
    def context_tokens(self) -> int:
        """Tokens whose KV it holds; the newest output token is not among them."""
        decodes = self.decodes
        if decodes is None:
            return self.stored_context
        return self.request.prompt_tokens + decodes.clock - self.offset - 1

    @property
    def todo_tokens(self) -> int:
        """Tokens to compute before its next output token; after a preemption the generated ones too."""
        if self.decodes is not None or self.stage is Stage.ARRIVED:
            return 1
        return self.request.prompt_tokens + self.stored_generated - self.stored_context

    def deliver(self, now: float) -> None:
        """Count one output token delivered at `now`, outside of `Decodes`."""
        if self.first_token_s is None:
            self.first_token_s = now
        request = self.request
        due_s = request.slo.deadline_s(request.arrival_s, self.stored_generated)
        self.lateness_s = max(self.lateness_s, now - due_s)
        self.stored_generated += 1
