"""What a policy holds: requests in order of their wait, with the sums and least values it asks for.

The buffer is longest when there is most to do; what is asked of it all the time must not cost a walk over it.
"""

import math
from dataclasses import dataclass, field

from headway.core.errors import InvariantError
from headway.core.request import Request

__all__ = ["Buffer", "Waiting"]


@dataclass(slots=True)
class Waiting:
    """A held request. `rounds`: how many batches left without it.

    `least_tokens`: prompt tokens to compute when all of its prefix is cached, at least 1.
    """

    request: Request
    since_s: float
    rounds: int = 0
    why: str = "no instance is up"
    least_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.least_tokens = request.prompt_tokens
        if request.prefix:
            cached = len(request.prefix) * request.prefix_block_tokens
            self.least_tokens = max(1, request.prompt_tokens - cached)


class Buffer(dict[str, Waiting]):
    """Held requests by id, oldest first but for what came back after a failure.

    To be changed by `add`, `add_first` and `remove` only. `tokens`: sum of the prompts.
    """

    __slots__ = ("_least_tokens", "_oldest_s", "tokens")

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0
        # Least values; None: what they were has left, look again.
        self._oldest_s: float | None = math.inf
        self._least_tokens: float | None = math.inf

    def add(self, waiting: Waiting) -> None:
        """Hold a request, after all others. Raises InvariantError when it is here."""
        if waiting.request.id in self:
            raise InvariantError(f"request {waiting.request.id} is held already")
        self[waiting.request.id] = waiting
        self.tokens += waiting.request.prompt_tokens
        if self._oldest_s is not None and waiting.since_s < self._oldest_s:
            self._oldest_s = waiting.since_s
        if self._least_tokens is not None and waiting.least_tokens < self._least_tokens:
            self._least_tokens = waiting.least_tokens

    def add_first(self, waiting: Waiting) -> None:
        """Hold a request, before all others. Raises InvariantError when it is here."""
        others = dict(self)
        self.add(waiting)
        for request_id in others:
            del self[request_id]
        self.update(others)

    def remove(self, request_id: str) -> None:
        """Let a request go; nothing happens if it is not here."""
        waiting = self.pop(request_id, None)
        if waiting is None:
            return
        self.tokens -= waiting.request.prompt_tokens
        if self._oldest_s == waiting.since_s:
            self._oldest_s = None
        if self._least_tokens == waiting.least_tokens:
            self._least_tokens = None

    def first(self) -> Waiting | None:
        """Return the request that is first in order."""
        return next(iter(self.values()), None)

    def oldest_s(self) -> float:
        """Return since when the oldest hold lasts; infinity when nothing is held."""
        if self._oldest_s is None:
            self._oldest_s = min([w.since_s for w in self.values()], default=math.inf)
        return self._oldest_s

    def least_tokens(self) -> float:
        """Return the smallest `Waiting.least_tokens`; infinity when nothing is held."""
        if self._least_tokens is None:
            self._least_tokens = min([w.least_tokens for w in self.values()], default=math.inf)
        return self._least_tokens
