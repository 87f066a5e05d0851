"""A request that waits for its endpoint, and is remembered until somebody says that it is over.

The policy speaks to it through the driver. Before Envoy has its answer a place can be taken back and another
be given; afterwards not: the request is in Envoy's hands.
"""

import asyncio
from collections.abc import Callable

from headway.core.actions import Dispatch, Recall, Reject
from headway.core.events import Role
from headway.core.request import Request
from headway.front.errors import Refusal, rejected
from headway.front.requests import Call
from headway.front.worker import Worker

__all__ = ["Pick"]


class Pick:
    """One request. Times are the clock's, None until they come. `size`: bytes it counts for in the buffer.

    `taken_back` hears of what can no longer be taken back, `abandoned` of a worker that is gone with it; the
    former may not feed an event at once.
    """

    scheduled = True

    def __init__(
        self,
        request: Request,
        call: Call,
        *,
        size: int,
        flow: str,
        role_of: Callable[[str], Role | None],
        taken_back: Callable[["Pick"], None],
        abandoned: Callable[["Pick", Worker], None],
    ) -> None:
        self.request = request
        self.call = call
        self.size = size
        self.flow = flow
        self.trace_id: str | None = None
        self.attempts = 0
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.dispatched_s: float | None = None
        self.first_byte_s: float | None = None
        self.ended_s: float | None = None
        self.instances: list[str] = []
        self.why = ""
        self.code = ""
        self.waits = False  # counted in the buffer
        self.answered = False
        self.prefilled = False
        self.over = False
        self.workers: list[Worker] = []  # that were told to take it
        self._role_of = role_of
        self._taken_back = taken_back
        self._abandoned = abandoned
        self._refusal: Refusal | None = None
        self._places: dict[Role, Dispatch] = {}
        self._wanted: tuple[Role, ...] = ()
        self._awaited: asyncio.Future[None] | None = None

    # What the policy says

    def dispatched(self, action: Dispatch) -> None:
        """See `Waiter.dispatched`."""
        self.why = action.why
        self._places[self._role_of(action.instance) or Role.AGGREGATED] = action
        if self._awaited is not None and self._has_all() and not self._awaited.done():
            self._awaited.set_result(None)

    def rejected(self, action: Reject) -> None:
        """See `Waiter.rejected`."""
        self._refusal = rejected(action, self.request.prompt_tokens)
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_exception(self._refusal)

    def recalled(self, action: Recall) -> None:
        """See `Waiter.recalled`."""
        if self.answered:
            self._taken_back(self)
        else:
            self._places.clear()

    def abandon(self, worker: Worker) -> None:
        """See `Leg.abandon`."""
        self._abandoned(self, worker)

    # What the stream does

    async def place(self, roles: tuple[Role, ...], timeout_s: float) -> list[Dispatch] | None:
        """Wait for a place of each role, and return them in this order; None when that takes too long.

        Raises Refusal when the policy refuses the request.
        """
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + timeout_s
        self._wanted = roles
        while not self._has_all():
            if self._refusal is not None:
                raise self._refusal
            if loop.time() >= ends_s:
                return None
            self._awaited = loop.create_future()
            timer = loop.call_at(ends_s, _give_up, self._awaited)
            try:
                await self._awaited
            finally:
                timer.cancel()
                self._awaited = None
        return [self._places.pop(role) for role in roles]

    @property
    def refused(self) -> bool:
        """Whether the policy refused it: it has forgotten the request then."""
        return self._refusal is not None

    def _has_all(self) -> bool:
        return all(role in self._places for role in self._wanted)


def _give_up(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
