"""Limits a rate: a bucket that holds one second's worth of requests, at least one."""

from collections.abc import Callable

__all__ = ["TokenBucket"]


class TokenBucket:
    """A bucket that starts with one token and refills all the time. The rate may differ with each call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens = 1.0
        self._counted_s = clock()

    def take(self, rate_rps: float) -> float:
        """Take a token and return 0; where there is none, return the seconds until there is one."""
        now = self._clock()
        self._tokens = min(max(1.0, rate_rps), self._tokens + (now - self._counted_s) * rate_rps)
        self._counted_s = now
        if self._tokens < 1.0:
            return (1.0 - self._tokens) / rate_rps
        self._tokens -= 1.0
        return 0.0
