"""Remembers the front of vLLM's waiting queue from one step to the next.

A policy that orders prompts by deadline looks at hundreds of requests in each step, of which few change.
Most lie cold in memory, so that reading them costs more than the rest of the plan. The head reads each
request once, when it comes into sight, and afterwards only compares references with the queue.

Requests whose numbers may change while they wait are not remembered: the head is empty as long as one of them
is in sight. Requests come into sight without tokens computed, and with no preemption behind them. The driver
calls `clear()` whenever one may have come back changed.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from itertools import islice
from math import inf
from typing import Any, Final

from headway.hosts.vllm.view import Adopter, Work, is_blocked

__all__ = ["SIGHT", "Head"]

#: Requests that are remembered: as many as policies put in order.
SIGHT: Final = 256


class Head:
    """The first requests of the queue: `works` in its order, and `ordered` by TTFT deadline."""

    def __init__(self, adopter: Adopter) -> None:
        self._adopter = adopter
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._inners: list[Any] = []
        self._ids: list[int] = []  # of `_inners`, which keeps them from being given to others
        self.works: list[Work] = []
        self.ordered: list[Work] = []
        self._due_s: list[float] = []  # of `ordered`
        self._arrivals_s: list[float] = []  # sorted

    @property
    def earliest_s(self) -> float:
        """The earliest arrival in sight."""
        return self._arrivals_s[0] if self._arrivals_s else inf

    def follow(self, queue: Any) -> bool:
        """Take in what changed in the queue. Return False if its front cannot be remembered."""
        if not isinstance(queue, deque):
            return False
        inners = list(islice(queue, SIGHT))
        if inners != self._inners and not self._take_in(inners):
            self.clear()
            return self._take_in(inners)
        return True

    def _take_in(self, inners: list[Any]) -> bool:
        """Drop those that left and add those that came, which have to be the last ones."""
        ids = list(map(id, inners))
        gone = set(self._ids).difference(ids)
        stay = len(self._ids) - len(gone)
        came = inners[stay:]
        if any(map(_may_change, came)):
            self.clear()
            return False
        for each in gone:
            place = self._ids.index(each)
            self._remove(self.works[place])
            del self._ids[place], self._inners[place], self.works[place]
        if self._ids != ids[:stay]:
            return False
        self._ids = ids
        works = self._adopter.show(came)
        self._inners = inners
        self.works += works
        for work in works:
            due_s = _due_s(work)
            place = bisect_right(self._due_s, due_s)  # behind equal ones: they came before
            self._due_s.insert(place, due_s)
            self.ordered.insert(place, work)
            arrival_s = work.request.arrival_s
            self._arrivals_s.insert(bisect_left(self._arrivals_s, arrival_s), arrival_s)
        return True

    def _remove(self, work: Work) -> None:
        place = bisect_left(self._due_s, _due_s(work))
        while self.ordered[place] is not work:
            place += 1
        del self.ordered[place], self._due_s[place]
        del self._arrivals_s[bisect_left(self._arrivals_s, work.request.arrival_s)]


def _may_change(inner: Any) -> bool:
    return bool(inner.num_preemptions or inner.num_computed_tokens or is_blocked(inner))


def _due_s(work: Work) -> float:
    return work.request.arrival_s + work.request.slo.ttft_s
