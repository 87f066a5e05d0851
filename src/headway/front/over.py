"""What those who count and log see of a request that is over, whichever host it went through."""

from collections.abc import Sequence
from typing import Protocol

from headway.core.request import Request
from headway.front.requests import Call

__all__ = ["Over"]


class Over(Protocol):
    """A request that is over. Times are the clock's, None for what never came. `why`: of its last dispatch.

    `prompt_tokens`, `output_tokens`: as the engine counted them. `code`: of the error its client was given.
    `attempts`: how often engines failed it.
    """

    @property
    def request(self) -> Request:
        """As the policy saw it."""

    @property
    def call(self) -> Call:
        """As the client sent it."""

    @property
    def trace_id(self) -> str | None:
        """Of its trace, if it has one."""

    prompt_tokens: int | None
    output_tokens: int | None
    dispatched_s: float | None
    first_byte_s: float | None
    ended_s: float | None
    why: str
    code: str
    attempts: int

    @property
    def instances(self) -> Sequence[str]:
        """Where it was sent, in order."""
