"""Spreads work over time, so that many engines never keep the event loop busy for long."""

from collections.abc import Callable

__all__ = ["Pacer"]


class Pacer:
    """Allow `per_s` starts a second, and `burst` at once after a rest."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float]) -> None:
        self._gap_s = 1.0 / per_s
        self._burst_s = burst * self._gap_s
        self._clock = clock
        self._next_s = -float("inf")

    def delay_s(self) -> float:
        """Take the next start; return how long to wait for it."""
        now = self._clock()
        self._next_s = max(self._next_s, now - self._burst_s) + self._gap_s
        return max(0.0, self._next_s - now)
