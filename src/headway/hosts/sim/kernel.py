"""The kernel decides what happens next: a heap of events in virtual time.

Events are ordered by (time, kind, sequence). The kinds put an instant in order: faults, arrivals and pass
ends make news; deliveries and reports spread it; then engines start, so that a whole batch delivered at one
instant is in the pass that starts then; timers come last, because a policy may be woken late, never early.
"""

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from headway.core.errors import InvariantError

__all__ = ["ARRIVAL", "DELIVERY", "FAULT", "PASS_END", "REPORT", "START", "TIMER", "Kernel"]

FAULT, ARRIVAL, PASS_END, DELIVERY, REPORT, START, TIMER = range(7)


class Kernel:
    """Virtual time. `now` is in seconds and only grows."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._until = math.inf

    def at(self, time_s: float, kind: int, call: Callable[..., None], *args: Any) -> None:
        """Have `call(now, *args)` happen at `time_s`. No cancel: a callee checks that it is wanted.

        Raises InvariantError when the time is past or not a number.
        """
        if not time_s >= self.now:
            raise InvariantError(f"an event at {time_s!r} s, when it is {self.now!r} s already")
        self._sequence += 1
        heappush(self._heap, (time_s, kind, self._sequence, call, args))

    def run(self) -> None:
        """Let events happen until none is left, or to the end of the instant in which `stop` was called."""
        heap = self._heap
        while heap and heap[0][0] <= self._until:
            self.now, _, _, call, args = heappop(heap)
            call(self.now, *args)

    def stop(self) -> None:
        """End the run when this instant is over."""
        self._until = self.now

    def quiet(self) -> bool:
        """Whether nothing else is to happen at this instant."""
        return not self._heap or self._heap[0][0] > self.now

    def pending(self, *kinds: int) -> bool:
        """Whether any event of these kinds is still to come (a scan: not for every event)."""
        return any(kind in kinds for _, kind, *_ in self._heap)
