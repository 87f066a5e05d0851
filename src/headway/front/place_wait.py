"""Bounds how long a request waits for a place: by the queue's time-out, and shorter where no engine is up."""

from collections.abc import Callable, Iterable

from headway.core.events import Role
from headway.front.config import LimitsSpec
from headway.front.errors import Refusal, unavailable
from headway.front.workers import Workers

__all__ = ["PlaceWait"]


class PlaceWait:
    """The bounds of all requests' waits.

    `began_s`: since when a request waits. `roles`, `model`: what the engines it needs must be and serve.
    """

    def __init__(self, workers: Workers, limits: LimitsSpec, clock: Callable[[], float]) -> None:
        self._workers = workers
        self._limits = limits
        self._clock = clock

    def left_s(self, began_s: float, roles: Iterable[Role], model: str | None) -> float:
        """Return for how long a request may wait from now until `check` is due."""
        now, limits = self._clock(), self._limits
        missing_s = self._workers.missing_since_s(roles, model)
        gives_up_s = max(began_s, now if missing_s is None else missing_s) + limits.no_engine_timeout_s
        if missing_s is None and not limits.no_engine_timeout_s:
            return max(0.0, began_s + limits.queue_timeout_s - now)
        return max(0.0, min(began_s + limits.queue_timeout_s, gives_up_s) - now)

    def check(self, began_s: float, roles: Iterable[Role], model: str | None) -> None:
        """Raise Refusal when a request has waited for too long: `no_engine` or `queue_timeout`."""
        now, limits = self._clock(), self._limits
        missing_s = self._workers.missing_since_s(roles, model)
        too_long = now - began_s >= limits.queue_timeout_s
        if missing_s is not None:
            if too_long or now - max(began_s, missing_s) >= limits.no_engine_timeout_s:
                raise unavailable("no_engine", "No engine is up that could take the request.")
        elif too_long:
            message = f"No engine took the request in {limits.queue_timeout_s:g} s."
            raise Refusal(limits.queue_timeout_status, "queue_timeout", message, retry_after_s=1.0)
