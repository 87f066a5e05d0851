"""Admission control: bound the requests, prompt tokens and body bytes that wait, and the retries."""

from collections.abc import Callable

from headway.front.config import LimitsSpec
from headway.front.errors import overloaded
from headway.front.token_bucket import TokenBucket

__all__ = ["Buffer", "ByteBudget", "ReceivedBytes", "RetryBudget"]


class ByteBudget:
    """Count the bytes of request bodies in memory, those still arriving included, against one bound."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.used = 0

    def take(self, size: int) -> None:
        """Count bytes in. Raises Refusal (429, `buffer_bytes`) and counts nothing when they do not fit."""
        if self.used + size > self.most_bytes:
            raise overloaded("buffer_bytes", f"The buffer is full: {self.used} of {self.most_bytes} bytes.")
        self.used += size

    def give(self, size: int) -> None:
        """Count bytes out."""
        self.used -= size


class ReceivedBytes:
    """The bytes counted for one body while it arrives. Safe to `release` more than once."""

    __slots__ = ("_budget", "size")

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.size = 0

    def add(self, size: int) -> None:
        """Count bytes that were just received. Raises Refusal (429) when the budget is spent."""
        budget = self._budget
        if budget.used + size > budget.most_bytes:
            budget.take(size)  # raises
        budget.used += size
        self.size += size

    def release(self) -> None:
        """Count the body out: it is dropped, or `Buffer.admit` counts it from here on."""
        self._budget.used -= self.size
        self.size = 0


class Buffer:
    """Requests that were admitted and are not dispatched. Every `enter` is undone by one `leave`.

    `budget`: the bytes of their bodies and of those that are still arriving.
    """

    def __init__(self, limits: LimitsSpec, clock: Callable[[], float]) -> None:
        self._limits = limits
        self.budget = ByteBudget(limits.buffer_bytes)
        self.requests = 0
        self.tokens = 0
        self.in_flight = 0
        self._bucket = TokenBucket(clock)

    @property
    def bytes(self) -> int:
        """The bytes of bodies that arrive or wait."""
        return self.budget.used

    def admit(self, tokens: int, size: int, received: ReceivedBytes | None = None) -> None:
        """Count a new request in. Raises Refusal (429), naming the bound it would break.

        `received`: the bytes counted while its body arrived; this count takes their place.
        """
        if received is not None:
            received.release()
        limits = self._limits
        if limits.concurrent_requests is not None and self.in_flight >= limits.concurrent_requests:
            raise overloaded("too_many_requests", f"{self.in_flight} requests are being served already.")
        for name, have, more, most in (
            ("requests", self.requests, 1, limits.buffer_requests),
            ("tokens", self.tokens, tokens, limits.buffer_tokens),
            ("bytes", self.bytes, size, limits.buffer_bytes),
        ):
            if have + more > most:
                raise overloaded(f"buffer_{name}", f"The buffer is full: {have} of {most} {name} wait.")
        self._limit_rate()
        self.in_flight += 1
        self.enter(tokens, size)

    def enter(self, tokens: int, size: int) -> None:
        """Count a request as waiting (again)."""
        self.requests += 1
        self.tokens += tokens
        self.budget.used += size

    def leave(self, tokens: int, size: int) -> None:
        """Count it as dispatched, or gone."""
        self.requests -= 1
        self.tokens -= tokens
        self.budget.give(size)

    def done(self) -> None:
        """Count a request out for good."""
        self.in_flight -= 1

    def _limit_rate(self) -> None:
        rate = self._limits.rate_limit_rps
        if rate is not None and (wait_s := self._bucket.take(rate)):
            raise overloaded("rate_limit", f"More than {rate:g} requests per second.", wait_s)


class RetryBudget:
    """Retries allowed: a share of the requests seen, and a few to begin with.

    When everything fails, asking twice for everything is what keeps it down.
    """

    def __init__(self, share: float, reserve: float = 10.0) -> None:
        self._share = share
        self._reserve = reserve if share > 0.0 else 0.0
        self._left = self._reserve

    def earn(self) -> None:
        """Note a request."""
        self._left = min(self._reserve * 10.0, self._left + self._share)

    def spend(self) -> bool:
        """Take one retry; False if none is left."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
