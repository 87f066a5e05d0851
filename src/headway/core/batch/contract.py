"""The contract of batch policies: what runs in the next step of one rank of an engine.

    plan(view, now)  ->  Plan          before each step
    observe(step, now)                 after each step, to learn from
    admission_budget(view, now)        what the rank could still take in, told to the cluster level

The engine brings a plan about as far as its KV blocks, token cap and seats allow, and preempts by itself when
decodes run out of blocks; a policy that overlooks a limit loses efficiency, never correctness.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from headway.core.registry import Registry, Rng
from headway.core.request import Request
from headway.core.settings import Settings as AnySettings

__all__ = [
    "BatchPolicy",
    "BatchView",
    "EngineRequest",
    "Plan",
    "StepReport",
    "batch_policies",
    "by_deadline",
    "in_order_of_deadline",
    "may_have_arrived_by",
    "open_prompts",
]


class EngineRequest(Protocol):
    """A request inside an engine, as far as its batch policy may look."""

    @property
    def request(self) -> Request:
        """Prompt length, arrival and targets."""
        ...

    @property
    def todo_tokens(self) -> int:
        """Tokens to compute before its next output token: the rest of its prompt; 1 for a decode."""
        ...

    @property
    def context_tokens(self) -> int:
        """Tokens whose KV it holds."""
        ...

    @property
    def generated_tokens(self) -> int:
        """Output tokens delivered so far."""
        ...

    @property
    def first_token_s(self) -> float | None:
        """When its first output token was delivered; None before."""
        ...


class BatchView(Protocol):
    """The state of one rank before a step. Live: valid during `plan`, to be read, not kept."""

    @property
    def waiting(self) -> Sequence[EngineRequest]:
        """Prompts that have not begun and hold no KV, first come first."""
        ...

    @property
    def prefilling(self) -> Sequence[EngineRequest]:
        """Prompts begun and not finished; they hold KV and a seat."""
        ...

    @property
    def decodes(self) -> Collection[EngineRequest]:
        """Requests whose next step yields a token; each holds a seat."""
        ...

    @property
    def decode_context_tokens(self) -> int:
        """Sum of `context_tokens` over the decodes (a counter, not a loop)."""
        ...

    @property
    def token_cap(self) -> int:
        """Most new tokens the engine takes in one step (vLLM: max_num_batched_tokens)."""
        ...

    @property
    def free_seats(self) -> int:
        """How many waiting prompts may begin (vLLM: max_num_seqs less those that run)."""
        ...

    @property
    def free_blocks(self) -> int:
        """KV blocks free or evictable."""
        ...

    @property
    def block_tokens(self) -> int:
        """Tokens in a KV block."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: chunks of prompts in order of preference, and the decodes that sit it out.

    `prefills`: (request, chunk tokens ≥ 1) pairs; a waiting request in it begins. `skipped`: decodes that get
    no token this step and keep their KV. `decode=False`: none of the decodes runs.

    `blocked`: (waiting request, tokens) where nothing but KV blocks kept a prompt out: what the step had left
    for it and those behind it. An engine that finds part of it in its prefix cache needs fewer, and may try.
    """

    prefills: Sequence[tuple[EngineRequest, int]] = ()
    skipped: Collection[EngineRequest] = field(default=())
    decode: bool = True
    blocked: tuple[EngineRequest, int] | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step was and how long it took.

    `new_tokens`: prompt and decode tokens computed. `decodes`: how many of them were decodes.
    `context_tokens`: Σ over requests in the step of the tokens they attend to. `attention`: Σ chunk·(context
    + chunk/2) over the prefills, in tokens². `duration_s`: start to end.
    """

    new_tokens: int
    decodes: int
    context_tokens: int
    attention: float
    duration_s: float


def open_prompts(view: BatchView, now: float) -> Iterator[EngineRequest]:
    """Return the waiting prompts whose TTFT deadline is not before `now`, first come first.

    A host with long queues gives `waiting` a method `open_at(now)` that finds them without walking the queue.
    """
    find: Callable[[float], Iterator[EngineRequest]] | None = getattr(view.waiting, "open_at", None)
    if find is not None:
        return find(now)
    return (work for work in view.waiting if work.request.arrival_s + work.request.slo.ttft_s >= now)


def by_deadline(view: BatchView, count: int) -> Sequence[EngineRequest]:
    """Return the first `count` waiting prompts in order of TTFT deadline. To be read at once, not kept.

    A host with long queues gives `waiting` a method `by_deadline(count)` that knows the order from the step
    before, or returns None.
    """
    find: Callable[[int], Sequence[EngineRequest] | None] | None = getattr(view.waiting, "by_deadline", None)
    known = None if find is None else find(count)
    return in_order_of_deadline(view.waiting[:count]) if known is None else known


def in_order_of_deadline(works: Sequence[EngineRequest]) -> Sequence[EngineRequest]:
    """Return the prompts by TTFT deadline; those with equal ones as they came."""
    due_s = [work.request.arrival_s + work.request.slo.ttft_s for work in works]
    if due_s == sorted(due_s):  # the usual case
        return works
    return [works[place] for place in sorted(range(len(due_s)), key=due_s.__getitem__)]


def may_have_arrived_by(view: BatchView, count: int, then_s: float) -> bool:
    """Return False if it is known that none of the first `count` waiting prompts arrived by `then_s`.

    A host with long queues gives `waiting` a method `earliest_s(count)`, which returns None if it
    does not know.
    """
    find: Callable[[int], float | None] | None = getattr(view.waiting, "earliest_s", None)
    earliest_s = None if find is None else find(count)
    return earliest_s is None or earliest_s <= then_s


class BatchPolicy(ABC):
    """One object per rank. Construct with settings and a seeded source of random numbers."""

    Settings: ClassVar[type[AnySettings]] = AnySettings
    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    #: True when, with no prompt waiting or partial, the plan is always "every decode": hosts then need not
    # ask.
    decodes_always_run: ClassVar[bool] = False

    def __init__(self, settings: AnySettings, rng: Rng) -> None:
        self.settings = settings
        self.rng = rng

    @abstractmethod
    def plan(self, view: BatchView, now: float) -> Plan:
        """Say what the next step runs. Never empty while there is work that fits."""

    def observe(self, step: StepReport, now: float) -> None:  # noqa: B027 (most policies learn nothing)
        """Learn from a step that ended at `now`."""

    def admission_budget(self, view: BatchView, now: float) -> int | None:
        """Prompt tokens this rank can still take and finish in time; None when the policy does not say."""
        return None


batch_policies = Registry("batch policy", BatchPolicy)
