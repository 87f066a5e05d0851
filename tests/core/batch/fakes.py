"""An engine rank in literal numbers, for tests of batch policies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from headway.core.batch.contract import BatchPolicy, EngineRequest, Plan, StepReport
from headway.core.request import Request, Slo

_ids = count()


@dataclass(eq=False, slots=True)
class FakeRequest:
    request: Request
    todo_tokens: int
    context_tokens: int = 0
    generated_tokens: int = 0
    first_token_s: float | None = None


def prompt(
    tokens: int, *, at: float = 0.0, done: int = 0, ttft_s: float = 1.0, tpot_s: float = 0.05
) -> FakeRequest:
    request = Request(f"p{next(_ids)}", at, tokens, Slo(ttft_s, tpot_s))
    return FakeRequest(request, tokens - done, done)


def decode(
    *,
    at: float = 0.0,
    context: int = 1000,
    generated: int = 1,
    first: float | None = None,
    ttft_s: float = 1.0,
    tpot_s: float = 0.05,
) -> FakeRequest:
    request = Request(f"d{next(_ids)}", at, max(1, context - generated), Slo(ttft_s, tpot_s))
    return FakeRequest(request, 1, context, generated, at if first is None else first)


@dataclass(slots=True)
class FakeView:
    waiting: Sequence[FakeRequest] = ()
    prefilling: Sequence[FakeRequest] = ()
    decodes: Sequence[FakeRequest] = ()
    token_cap: int = 8192
    free_seats: int = 256
    free_blocks: int = 1_000_000
    block_tokens: int = 16
    decode_context_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.decode_context_tokens = sum(d.context_tokens for d in self.decodes)


Cost = Callable[[int, int, float], float]


def plain_cost(new_tokens: int, context_tokens: int, attention: float) -> float:
    """5 ms + 20 µs a token: a step of 45 ms holds 2,000 tokens, a step of 50 ms 2,250."""
    return 0.005 + 20e-6 * new_tokens


def teach(policy: BatchPolicy, cost: Cost = plain_cost) -> None:
    """Let a policy see steps of every kind, exactly timed."""
    for new in range(256, 8193, 256):
        for decodes, context in ((0, 0), (8, 8_000), (64, 30_000)):
            attention = 0.5 * (new - decodes) ** 2
            policy.observe(StepReport(new, decodes, context, attention, cost(new, context, attention)), 0.0)

    for decodes in (1, 8, 64, 256):
        for context in (decodes * 100, decodes * 1000, 150_000):
            for _ in range(4):
                seconds = cost(decodes, context, 0.0)
                policy.observe(StepReport(decodes, decodes, context, 0.0, seconds), 0.0)


def chunks(plan: Plan) -> list[tuple[EngineRequest, int]]:
    return list(plan.prefills)
