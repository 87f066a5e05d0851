"""Triage, cluster level (ours): what is held can be ordered, so that under overload some are served in time.

`staggered` in everything but the order in which a batch is filled. Under pressure, when somebody held will
miss its TTFT target in first-come order, requests that would miss it even if dispatched now go last
(relegated), the others shortest first with aging:

    rank(r) = prompt_tokens − aging_tokens_s · waited

The relegated go by the same rank among themselves, and their wait is bounded by `max_hold_s`. Neither half
works alone (algorithms.md §9): first-come order serves nobody in time once there is a backlog, and shortest
first without relegation spends passes on requests that are late already. There is no pressure while the next
pass of every instance can take the whole buffer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from headway.core.cluster.buffer import Waiting
from headway.core.cluster.pool import cluster_policies
from headway.core.cluster.staggered import Staggered, StaggeredSettings
from headway.core.settings import setting

__all__ = ["Triage", "TriageSettings"]


@dataclass(frozen=True, slots=True)
class TriageSettings(StaggeredSettings):
    """Settings of `triage`."""

    # Lower than in `staggered`: a relegated long prompt may otherwise wait for ever for a rank that is empty.
    saturation_passes: float = setting(
        1.0, "buffered work, in full passes of the pool, from which rule 6 holds", unit="passes", at_least=0.0
    )
    aging_tokens_s: float = setting(
        300.0, "how much shorter a request counts per second waited", unit="tokens/s", at_least=0.0
    )


@cluster_policies.register("triage")
class Triage(Staggered):
    """See the module's docstring."""

    Settings = TriageSettings
    settings: TriageSettings
    summary = "staggered, with the held requests in triage order under pressure"

    def _order(self, starts_s: float, now: float) -> Iterable[Waiting]:
        if not self._pressed(starts_s):
            return super()._order(starts_s, now)
        aging = self.settings.aging_tokens_s

        def key(waiting: Waiting) -> tuple[bool, float]:
            waited_s = now - waiting.request.arrival_s
            return self._late(waiting, starts_s), waiting.request.prompt_tokens - aging * waited_s

        return sorted(self.buffer.values(), key=key)

    def _late(self, waiting: Waiting, starts_s: float) -> bool:
        """Whether the request misses its TTFT target even in the pass that starts then."""
        request = waiting.request
        return starts_s + (self._pass_time.mean_s or 0.0) > request.arrival_s + request.slo.ttft_s

    def _pressed(self, starts_s: float) -> bool:
        """Whether first-come order would make somebody late: the backlog takes longer than some slack.

        A backlog that the next pass of every instance can take is no pressure: were those that come late put
        last even then, a long prompt might never find a rank with a whole chunk free.
        """
        backlog = self._backlog_passes()
        drained_s = starts_s + backlog * (self._pass_time.mean_s or 0.0)
        return backlog >= 1.0 and any(self._late(waiting, drained_s) for waiting in self.buffer.values())
