"""The gateway's driver, the only file here that calls a cluster policy.

Hand an event in, let observers see, carry out the actions, arm the timer. Time comes in from outside: on
an event loop `clock` is `loop.time` and `call_at` is `loop.call_at`, in a test both are a virtual
clock's.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from headway.core.actions import Action, Dispatch, Poll, Recall, Reject
from headway.core.cluster.contract import ClusterPolicy, Held
from headway.core.errors import InvariantError
from headway.core.events import Arrived, Event, TimerFired
from headway.core.request import Request

__all__ = ["CallAt", "Driver", "Observer", "Waiter"]

#: Sees every event with what the policy did about it, before it is carried out.
Observer = Callable[[float, Event, Sequence[Action]], None]

#: A policy may wake up for nothing this often in a row; from then on it is woken this much later, for a door
#: that spins serves nobody.
MAX_IDLE_WAKES = 100
IDLE_WAKE_DELAY_S = 0.01


class Waiter(Protocol):
    """A request that waits for its places. None of these may feed an event back at once."""

    def dispatched(self, action: Dispatch) -> None:
        """Go there."""

    def rejected(self, action: Reject) -> None:
        """Be refused."""

    def recalled(self, action: Recall) -> None:
        """Come back, and wait for another place."""


class Handle(Protocol):
    """A timer that can be called off."""

    def cancel(self) -> None:
        """Call it off."""


class CallAt(Protocol):
    """Have a function called at a time of the clock."""

    def __call__(self, when: float, callback: Callable[..., Any], /, *args: Any) -> Handle:
        """Return the handle."""


class Driver:
    """Drives one policy in the clock's time.

    `poll(instance)` asks an instance for a snapshot, in the background. `feed` raises InvariantError when the
    policy names a request that does not wait, after everything else was carried out.
    """

    def __init__(
        self,
        policy: ClusterPolicy,
        *,
        clock: Callable[[], float],
        call_at: CallAt,
        poll: Callable[[str], None] = lambda instance: None,
        observers: Iterable[Observer] = (),
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._call_at = call_at
        self._poll = poll
        self._observers = tuple(observers)
        self._waiters: dict[str, Waiter] = {}
        self._armed_s: float | None = None
        self._timer: Handle | None = None
        self._idle_wakes = 0

    @property
    def reads_prefixes(self) -> bool:
        """Whether the policy looks at `Request.prefix`."""
        return self._policy.reads_prefixes

    @property
    def requests(self) -> int:
        """How many requests are not over."""
        return len(self._waiters)

    def held(self) -> list[Held]:
        """Explain every request that was not dispatched yet."""
        return self._policy.held()

    def arrive(self, request: Request, waiter: Waiter) -> None:
        """Hand a request to the policy; `waiter` hears of it until `leave`."""
        if request.id in self._waiters:
            raise InvariantError(f"request {request.id} arrived twice")
        self._waiters[request.id] = waiter
        self.feed(Arrived(request))

    def leave(self, request_id: str) -> None:
        """Forget a request whose last event was fed."""
        self._waiters.pop(request_id, None)

    def feed(self, event: Event) -> list[Action]:
        """Hand an event to the policy and carry out what it asks for."""
        self._idle_wakes = 0
        return self._handle(event, self._clock())

    def stop(self) -> None:
        """Fire no timer any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._armed_s = None

    def _handle(self, event: Event, now: float) -> list[Action]:
        actions = self._policy.handle(event, now)
        for observe in self._observers:
            observe(now, event, actions)
        strays = [action for action in actions if not self._carry_out(action)]
        self._arm(now)
        if strays:
            raise InvariantError(f"{strays[0]}: no such request waits")
        return actions

    def _carry_out(self, action: Action) -> bool:
        """Do it; False if it is about a request that is not here."""
        if isinstance(action, Poll):
            self._poll(action.instance)
            return True
        waiter = self._waiters.get(action.request_id)
        if waiter is None:
            return False
        if isinstance(action, Dispatch):
            waiter.dispatched(action)
        elif isinstance(action, Reject):
            waiter.rejected(action)
        else:
            waiter.recalled(action)
        return True

    def _arm(self, now: float) -> None:
        """Set the timer if it is wanted earlier than it is set; one set too early sets itself anew."""
        wake_s = self._policy.wake_at()
        if wake_s is None:
            return
        due_s = max(wake_s, now)
        if self._idle_wakes > MAX_IDLE_WAKES:
            due_s = max(due_s, now + IDLE_WAKE_DELAY_S)
        if self._armed_s is None or due_s < self._armed_s:
            if self._timer is not None:
                self._timer.cancel()
            self._armed_s = due_s
            self._timer = self._call_at(due_s, self._ring)

    def _ring(self) -> None:
        self._timer = self._armed_s = None
        now = self._clock()
        wake_s = self._policy.wake_at()
        if wake_s is None or wake_s > now:
            self._arm(now)
            return
        self._idle_wakes += 1
        if self._handle(TimerFired(), now):
            self._idle_wakes = 0
