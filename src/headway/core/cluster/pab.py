"""PAB routing (FairBatching, arXiv 2510.14392, cluster level): to the node that can take the most in time.

Each node reports its prefill admission budget: the prompt tokens it can still take and finish within the TTFT
target (`core/batch/fair.py`). A request goes to the rank with the largest `PAB − cost`; what was sent since a
report is subtracted until the next one [P concept; rule R]. When no rank has budget left, the request is held
for a while: the next report may show room. The hold is bounded, and then the request goes to the best rank
all the same.
"""

from dataclasses import dataclass

from headway.core.cluster.baselines import least, tokens
from headway.core.cluster.buffer import Waiting
from headway.core.cluster.ledger import RankLoad
from headway.core.cluster.pool import PoolPolicy, PoolSettings, cluster_policies
from headway.core.events import Role
from headway.core.settings import setting

__all__ = ["Pab", "PabSettings"]


@dataclass(frozen=True, slots=True)
class PabSettings(PoolSettings):
    """Settings of `pab`."""

    patience: float = setting(
        0.25,
        "how long to hold for a rank with budget, as a share of the TTFT target",
        at_least=0.0,
        at_most=1.0,
    )


@cluster_policies.register("pab")
class Pab(PoolPolicy):
    """See the module's docstring. Where no engine reports a budget, it is `least-tokens`."""

    Settings = PabSettings
    settings: PabSettings
    summary = "FairBatching: the rank with the largest prefill admission budget"
    roles = frozenset({Role.AGGREGATED})
    reads_pab = True

    def wake_at(self) -> float | None:
        """Return when the patience with the oldest request ends, or the oldest hold."""
        hold_s = super().wake_at()
        first = self.buffer.first()
        if first is None or not self.ledger.ranks:
            return hold_s
        until_s = self._until_s(first)
        return until_s if hold_s is None else min(until_s, hold_s)

    def _until_s(self, waiting: Waiting) -> float:
        return waiting.since_s + self.settings.patience * waiting.request.slo.ttft_s

    def _place(self, now: float) -> None:
        while self.buffer and self.ledger.ranks:
            waiting = next(iter(self.buffer.values()))
            rank, has_budget = self._best(waiting)
            if not has_budget and now < self._until_s(waiting):
                waiting.why = "no rank has admission budget left"
                break
            self._dispatch(waiting, rank, now, "budget" if has_budget else "patience-over")

    def _best(self, waiting: Waiting) -> tuple[RankLoad, bool]:
        """Return the rank to use, and whether it has the budget: an idle one always has."""
        ranks = self.ledger.ranks_for(waiting.request)
        if any(rank.pab_tokens is None for rank in ranks):
            return least(ranks, tokens), True
        best = least(ranks, lambda rank: -(rank.pab_tokens or 0))
        return best, (best.pab_tokens or 0) >= waiting.request.prompt_tokens or best.requests == 0
