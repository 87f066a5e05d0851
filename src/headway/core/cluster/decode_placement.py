"""SBS decode placement: IQR-aware lexicographic (arXiv 2512.16134; constants reconstructed).

Each round takes the requests whose prefill is done, longest first, and gives each to the rank with the
smallest `(batch size, KV load, index)` among those that are no outliers in KV load:

    cut = Q3 + 1.5·(Q3 − Q1) over the candidates' KV loads      (not with fewer than 4 candidates)

Batch size first, because a decode step in lockstep is as slow as its fullest rank; KV load next; the mask
keeps a rank that is out of line in KV from being chosen for its small batch.
"""

import heapq
import math
from dataclasses import dataclass

from headway.core.cluster.buffer import Waiting
from headway.core.cluster.ledger import RankLoad
from headway.core.cluster.pool import PoolPolicy, PoolSettings, cluster_policies
from headway.core.events import Arrived, PassEnded, Role
from headway.core.settings import setting

__all__ = ["IqrLexicographic", "iqr_cut", "quartiles"]


def quartiles(values: list[int]) -> tuple[float, float]:
    """Return Q1 and Q3 by linear interpolation between order statistics. `values`: at least one, sorted."""

    def at(fraction: float) -> float:
        place = fraction * (len(values) - 1)
        low = int(place)
        high = min(low + 1, len(values) - 1)
        return values[low] + (place - low) * (values[high] - values[low])

    return at(0.25), at(0.75)


def iqr_cut(loads: list[int], factor: float) -> float:
    """Return the KV load above which a rank is an outlier (Tukey's fence)."""
    q1, q3 = quartiles(sorted(loads))
    return q3 + factor * (q3 - q1)


@dataclass(frozen=True, slots=True)
class IqrSettings(PoolSettings):
    """Settings of `iqr-lexicographic`."""

    fence: float = setting(1.5, "how many interquartile ranges above Q3 make an outlier", at_least=0.0)
    mask_from: int = setting(4, "fewest candidates for which outliers are masked", unit="ranks", at_least=1)


@cluster_policies.register("iqr-lexicographic")
class IqrLexicographic(PoolPolicy):
    """Rounds of decode placement. A round is all that arrives at one instant, as at the end of a prefill
    pass."""

    Settings = IqrSettings
    settings: IqrSettings
    summary = "SBS decode: fewest requests, then least KV, KV outliers masked"
    roles = frozenset({Role.DECODE, Role.AGGREGATED})
    _round_s: float | None = None

    def _arrived(self, event: Arrived, now: float) -> None:
        """Wait for the rest of the round: a timer fires after all other events of its instant."""
        if self._admit(event.request, now):
            self._hold(Waiting(event.request, now, why="its round is gathering"))
            self._round_s = now

    def _pass_ended(self, event: PassEnded, now: float) -> None:
        """Only learn from it: a report among the arrivals of a round must not split the round."""
        self.ledger.report(event)

    def wake_at(self) -> float | None:
        """Return the end of the round, or of the oldest hold."""
        return super().wake_at() if self._round_s is None else self._round_s

    def _place(self, now: float) -> None:
        self._round_s = None
        if not (self.buffer and self.ledger.ranks):
            return
        # Requests of different models may be for different ranks: a round each.
        rounds: dict[int, tuple[list[RankLoad], list[Waiting]]] = {}
        for waiting in sorted(self.buffer.values(), key=lambda w: -w.request.prompt_tokens):
            ranks = self.ledger.ranks_for(waiting.request)
            rounds.setdefault(id(ranks), (ranks, []))[1].append(waiting)
        for ranks, held in rounds.values():
            self._place_round(ranks, held, now)

    def _place_round(self, ranks: list[RankLoad], held: list[Waiting], now: float) -> None:
        """Dispatch the held requests, in order, to some of these ranks."""
        heap, cut = self._candidates(ranks)
        for waiting in held:
            while heap and heap[0][3].instance.full:
                heapq.heappop(heap)
            if not heap:  # every rank is full or out of line by now: use them all
                heap, cut = _heap([rank for rank in ranks if not rank.instance.full]), math.inf
            if not heap:
                break  # every instance is at its concurrency limit
            _, _, order, rank = heapq.heappop(heap)
            self._dispatch(waiting, rank, now, "round")
            if rank.kv_blocks <= cut and _has_room(rank):
                heapq.heappush(heap, (rank.requests, rank.kv_blocks, order, rank))

    def _candidates(self, ranks: list[RankLoad]) -> tuple["list[_Entry]", float]:
        """Return the ranks in line as a heap, and the cut, which holds for the round."""
        heap = _heap([rank for rank in ranks if _has_room(rank)])
        if len(heap) < self.settings.mask_from:
            return heap, math.inf
        cut = iqr_cut([entry[1] for entry in heap], self.settings.fence)
        heap = [entry for entry in heap if entry[1] <= cut]
        heapq.heapify(heap)
        return heap, cut


_Entry = tuple[int, int, int, RankLoad]


def _heap(ranks: list[RankLoad]) -> list[_Entry]:
    heap = [(rank.requests, rank.kv_blocks, order, rank) for order, rank in enumerate(ranks)]
    heapq.heapify(heap)
    return heap


def _has_room(rank: RankLoad) -> bool:
    """Whether the rank has a seat and KV to spare, as far as it said what it has."""
    info = rank.instance.info
    room = rank.room_blocks()
    return (info.max_running is None or rank.requests < info.max_running) and (room is None or room > 0)
