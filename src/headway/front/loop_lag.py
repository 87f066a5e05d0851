"""Measure how long the event loop is blocked: nothing else in this process runs meanwhile.

A timer is due every `PERIOD_S`; how late it runs is the lag. The longest of the last minute is kept, whoever
reads it and how often, and lags beyond `STALL_S` are counted.
"""

import asyncio
from collections import deque
from collections.abc import Callable

__all__ = ["LoopLag", "LoopLagMonitor"]

PERIOD_S = 0.05
#: A lag counts as a stall when it is longer: a first token is late by as much.
STALL_S = 0.05
#: The longest lag is that of so many past slots and the present one.
SLOTS, SLOT_S = 12, 5.0


class LoopLag:
    """Keep the longest lag of the last minute. Times are the caller's."""

    def __init__(self, now: float) -> None:
        self._slots: deque[float] = deque([0.0], maxlen=SLOTS + 1)
        self._slot_began_s = now
        self.stalls = 0

    def note(self, now: float, lag_s: float) -> None:
        """Take in a lag that ended now."""
        self._advance(now)
        self._slots[-1] = max(self._slots[-1], lag_s)
        self.stalls += lag_s > STALL_S

    def longest_s(self, now: float) -> float:
        """Return the longest lag of the last minute."""
        self._advance(now)
        return max(self._slots)

    def _advance(self, now: float) -> None:
        passed = min(SLOTS + 1, int((now - self._slot_began_s) / SLOT_S))
        if passed:
            self._slots.extend([0.0] * passed)
            self._slot_began_s = now - (now - self._slot_began_s) % SLOT_S


class LoopLagMonitor:
    """Measure the running loop until it is stopped. `on_lag` gets each lag, if given."""

    def __init__(self, on_lag: Callable[[float], None] = lambda lag_s: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_lag = on_lag
        self._lag = LoopLag(self._loop.time())
        self._due_s = self._loop.time() + PERIOD_S
        self._timer = self._loop.call_at(self._due_s, self._measure)

    def longest_s(self) -> float:
        """Return the longest lag of the last minute, one that is under way included."""
        now = self._loop.time()
        return max(self._lag.longest_s(now), now - self._due_s)

    def stalls(self) -> int:
        """Return how many lags were longer than `STALL_S`."""
        return self._lag.stalls

    def stop(self) -> None:
        """Measure no more."""
        self._timer.cancel()

    def _measure(self) -> None:
        now = self._loop.time()
        lag_s = max(0.0, now - self._due_s)
        self._lag.note(now, lag_s)
        self._on_lag(lag_s)
        self._due_s = now + PERIOD_S
        self._timer = self._loop.call_at(self._due_s, self._measure)
