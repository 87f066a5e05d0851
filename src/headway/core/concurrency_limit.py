"""Learns how many requests an engine takes at once from its refusals, as TCP learns a path's capacity (AIMD).

An engine that answers 429 or 503 ("queue full") is alive and says that it has enough. It is no fault.

Rule 1  (decrease)  a refusal sets the limit to what is in flight there, but never below half of what it was:
                    answers that pass each other on the way must not collapse it.
Rule 2  (increase)  while the limit binds and no refusal came for `GROW_AFTER_S`, it grows by a step. The step
                    doubles each time it goes well, and is 1 again after a refusal.
Rule 3  (pause)     where nothing of this host's is in flight, no end of ours can make room: the engine gets
                    nothing for as long as its `Retry-After` says, `PAUSE_S` if it says nothing. Else it gets
                    nothing for `LEAST_PAUSE_S`, and then when one of ours ends.
Rule 4  (release)   a limit that never bound for `FORGET_AFTER_S` is dropped.

Times are seconds of the host's clock.
"""

import math

__all__ = [
    "FORGET_AFTER_S",
    "GROW_AFTER_S",
    "LEAST_PAUSE_S",
    "MOST_PAUSE_S",
    "PAUSE_S",
    "ConcurrencyLimit",
]

GROW_AFTER_S = 2.0
PAUSE_S = 0.5
LEAST_PAUSE_S = 0.02
#: An engine's `Retry-After` is honoured up to this.
MOST_PAUSE_S = 60.0
FORGET_AFTER_S = 300.0


class ConcurrencyLimit:
    """The learned limit of one engine.

    `refusals`: how often it refused. `limit`: most requests to have there at once; None: not learned.
    """

    def __init__(self) -> None:
        self.refusals = 0
        self.limit: int | None = None
        self._step = 1
        self._changed_s = -math.inf
        self._bound_s = -math.inf  # when as many were in flight as the limit allows
        self._paused_until_s = -math.inf

    def refused(self, now: float, in_flight: int, retry_after_s: float | None) -> None:
        """Take in a refusal. `in_flight`: this host's other requests at the engine."""
        self.refusals += 1
        known = in_flight if self.limit is None else min(in_flight, self.limit)
        self.limit = max(1, known, (self.limit or 0) // 2)
        self._step = 1
        self._changed_s = self._bound_s = now
        pause_s = LEAST_PAUSE_S
        if in_flight == 0:
            pause_s = PAUSE_S if retry_after_s is None else max(pause_s, min(retry_after_s, MOST_PAUSE_S))
        self._paused_until_s = max(self._paused_until_s, now + pause_s)

    def answered(self, now: float, in_flight: int) -> None:
        """Take in an answer. `in_flight`: this host's requests at the engine, the answered one included."""
        if self.limit is None:
            return
        if in_flight >= self.limit:
            self._bound_s = now
            if now - self._changed_s >= GROW_AFTER_S:
                self.limit += self._step
                self._step *= 2
                self._changed_s = now
        elif now - self._bound_s >= FORGET_AFTER_S:
            self.limit = None

    def allowed(self, now: float) -> int | None:
        """Return the most requests to have there now; 0 during a pause, None without a limit."""
        return 0 if now < self._paused_until_s else self.limit

    def resumes_s(self, now: float) -> float | None:
        """Return when a pause ends; None when there is none."""
        return self._paused_until_s if now < self._paused_until_s else None

    def forget(self) -> None:
        """Drop what was learned: the engine restarted."""
        self.limit, self._step, self._paused_until_s = None, 1, -math.inf
