"""Decides which decodes finish and how much KV they grow by, in O(ranks + changes) per pass.

Rule 1. There is one clock per lockstep group: the number of passes ended. A decode gains a token per pass,
        so its `generated = clock − offset`. One that sits a pass out has its offset moved on by one.
Rule 2. A decode finishes when the clock reaches `offset + limit`. It is noted in a calendar under that
        clock; a skip does not touch the calendar, the entry is moved when its day comes.
Rule 3. A decode needs a new KV block in the pass that starts with its context a multiple of `block_tokens`.
        Since context and clock advance together, that happens when `clock % block_tokens` equals a residue
        fixed when it joined: a count per (residue, rank) tells a pass's growth. A skip moves it one residue
        on.
Rule 4. Sums of context grow by the number of decodes per pass. Lateness is `lateness.PeakLateness`.

Between the start and the end of a pass nothing joins or leaves.
"""

from collections.abc import Iterable
from operator import add

from headway.model.lateness import PeakLateness
from headway.model.work import Stage, Work

__all__ = ["Decodes"]

#: How often stale lateness is dropped: rare enough that looking at every decode for it costs nothing.
_FORGET_EVERY = 4096


class Decodes:
    """The decodes of a lockstep group, `total` in all. Lists have shape (ranks,); `growth` has (block_tokens,
    ranks).
    """

    __slots__ = (
        "_block_tokens",
        "_due",
        "_peaks",
        "clock",
        "contexts",
        "counts",
        "growth",
        "members",
        "total",
    )

    def __init__(self, ranks: int, block_tokens: int) -> None:
        self.clock = self.total = 0
        self.members: list[dict[Work, None]] = [{} for _ in range(ranks)]  # oldest first
        self.counts = [0] * ranks
        self.contexts = [0] * ranks
        self.growth = [[0] * ranks for _ in range(block_tokens)]
        self._block_tokens = block_tokens
        self._due: dict[int, list[Work]] = {}
        self._peaks: dict[float, PeakLateness] = {}

    def join(self, work: Work) -> None:
        """Take in a request with its generated and context tokens stored, `work.limit` above the former."""
        rank, clock = work.rank, self.clock
        work.stage = Stage.DECODING
        work.offset = clock - work.stored_generated
        work.since = clock
        work.residue = (clock - work.stored_context) % self._block_tokens
        work.decodes = self
        self.members[rank][work] = None
        self.counts[rank] += 1
        self.total += 1
        self.contexts[rank] += work.stored_context
        self.growth[work.residue][rank] += 1
        self._schedule(work)
        self._peak(work).live += 1

    def leave(self, work: Work) -> None:
        """Let a request go, its progress and lateness written into it."""
        self._note_lateness(work)
        work.stored_generated, work.stored_context = work.generated_tokens, work.context_tokens
        work.decodes = None
        work.due = -1
        rank, tpot_s = work.rank, work.request.slo.tpot_s
        del self.members[rank][work]
        self.counts[rank] -= 1
        self.total -= 1
        self.contexts[rank] -= work.stored_context
        self.growth[work.residue][rank] -= 1
        peak = self._peaks[tpot_s]
        peak.live -= 1
        if not peak.live:
            del self._peaks[tpot_s]

    def blocks_needed(self, rank: int, skipped: Iterable[Work]) -> int:
        """Return how many KV blocks the coming pass adds on a rank when `skipped` sit it out."""
        residue = self.clock % self._block_tokens
        spared = sum([work.residue == residue for work in skipped if work.decodes is self])
        return self.growth[residue][rank] - spared

    def advance(self, now: float, skipped: Iterable[Work]) -> list[Work]:
        """End a pass at `now`: all but `skipped` gained a token. Return who is done."""
        for work in skipped:
            self._sit_out(work)
        self.clock = clock = self.clock + 1
        for peak in self._peaks.values():
            peak.push(clock, now)
        self.contexts = list(map(add, self.contexts, self.counts))
        if clock % _FORGET_EVERY == 0:
            self._forget()
        return self._done(clock) if clock in self._due else []

    def _sit_out(self, work: Work) -> None:
        self._note_lateness(work)
        work.offset += 1
        work.since = self.clock + 1
        self.contexts[work.rank] -= 1  # it is about to be counted among those that gain one
        self.growth[work.residue][work.rank] -= 1
        work.residue = (work.residue + 1) % self._block_tokens
        self.growth[work.residue][work.rank] += 1

    def _done(self, clock: int) -> list[Work]:
        done = []
        for work in self._due.pop(clock):
            if work.due != clock:
                continue  # it left, or joined anew with another day
            if work.offset + work.limit == clock:
                done.append(work)
            else:
                self._schedule(work)
        return done

    def _schedule(self, work: Work) -> None:
        work.due = work.offset + work.limit
        self._due.setdefault(work.due, []).append(work)

    def _peak(self, work: Work) -> PeakLateness:
        tpot_s = work.request.slo.tpot_s
        if tpot_s not in self._peaks:
            self._peaks[tpot_s] = PeakLateness(tpot_s)
        return self._peaks[tpot_s]

    def _note_lateness(self, work: Work) -> None:
        request = work.request
        tpot_s = request.slo.tpot_s
        peak = self._peaks[tpot_s].since(work.since)
        late_s = peak + (work.offset + 1) * tpot_s - request.arrival_s - request.slo.ttft_s
        if late_s > work.lateness_s:
            work.lateness_s = late_s

    def _forget(self) -> None:
        oldest = min((work.since for members in self.members for work in members), default=self.clock)
        for peak in self._peaks.values():
            peak.forget(oldest)
