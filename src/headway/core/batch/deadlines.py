"""What the deadlines of running decodes demand of a step: parts of `fair` (rules 3, 4 and 9 there)."""

from bisect import bisect_left
from collections.abc import Collection
from operator import itemgetter
from typing import NamedTuple

from headway.core.batch.contract import BatchView, EngineRequest
from headway.core.estimate.step_time import Coefficients

__all__ = ["Tightness", "TimeLeft", "least_target", "relaxed_decodes", "sit_out"]

#: A tighter target than this many steps of all decodes is not believed, if most ask for less (rule 9).
_TIGHTEST_STEPS = 1.25


def least_target(view: BatchView, costs: Coefficients) -> tuple[float, int]:
    """Return the least TPOT target in reach, and how many are out of reach (rule 9).

    With none in reach it is the shortest time a step can take.
    """
    targets = [work.request.slo.tpot_s for work in view.decodes]
    step_s = costs.predict(len(targets), view.decode_context_tokens)
    least_s = min(targets)
    if least_s >= _TIGHTEST_STEPS * step_s:
        return least_s, 0
    targets.sort()
    floor_s = max(costs.a_s, min(_TIGHTEST_STEPS * step_s, targets[len(targets) // 2]))
    if targets[-1] >= step_s:
        floor_s = max(floor_s, step_s)
    unmet = bisect_left(targets, floor_s)
    return (targets[unmet] if unmet < len(targets) else floor_s), unmet


class Tightness(NamedTuple):
    """What the deadlines of the decodes demand of a step.

    `slacks`: seconds until the next token of each is due. `budget_s`: how long the step may take (rule 2).
    `tpot_s`: the least target that binds. `stall_free`: most targets cannot be met (rule 9).
    """

    slacks: list[float]
    budget_s: float
    tpot_s: float
    stall_free: bool


class TimeLeft:
    """The seconds of a step that prompts and decodes with slack may still use."""

    __slots__ = ("_costs", "left_s")

    def __init__(self, costs: Coefficients, left_s: float) -> None:
        self._costs = costs
        self.left_s = left_s

    def allow(self, work: EngineRequest, most: int) -> int:
        """Take the time of the largest chunk that fits; return the chunk."""
        context = work.context_tokens
        chunk = self._costs.chunk_for(self.left_s, context, most)
        if chunk > 0:
            self.left_s -= self._costs.prefill_s(chunk, context)
        return chunk

    def left_after(self, decodes: int, context_tokens: int, most: int) -> int:
        """Return the prompt tokens, at most `most`, that there is time for beside these decodes as well."""
        left_s = self.left_s - self._costs.b_s * decodes - self._costs.c_s * context_tokens
        return self._costs.chunk_for(left_s, 0, most)


def relaxed_decodes(
    decodes: Collection[EngineRequest], tightness: Tightness
) -> tuple[list[tuple[float, EngineRequest]], int]:
    """Return the decodes that are not urgent, as (slack, decode), and the context they hold together."""
    bound_s = tightness.budget_s + tightness.tpot_s
    pairs = zip(tightness.slacks, decodes, strict=True)
    relaxed = [(slack, work) for slack, work in pairs if slack >= bound_s]
    return relaxed, sum([work.context_tokens for _, work in relaxed])


def sit_out(
    relaxed: list[tuple[float, EngineRequest]],
    context_tokens: int,
    costs: Coefficients,
    left_s: float,
    tokens: int,
) -> list[EngineRequest]:
    """Return the decodes with slack that find no room in the step: those with the most slack."""
    if len(relaxed) <= tokens and costs.b_s * len(relaxed) + costs.c_s * context_tokens <= left_s:
        return []
    relaxed.sort(key=itemgetter(0))
    for taken, (_, work) in enumerate(relaxed):
        left_s -= costs.b_s + costs.c_s * work.context_tokens
        if left_s < 0.0 or taken >= tokens:
            return [work for _, work in relaxed[taken:]]
    return []
