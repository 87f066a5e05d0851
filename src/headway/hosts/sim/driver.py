"""The simulator's driver, the only file here that calls a cluster policy.

Hand an event in, let observers see, carry out the actions, arm the timer.
"""

from collections.abc import Callable, Iterable, Sequence

from headway.core.actions import Action
from headway.core.cluster.contract import ClusterPolicy
from headway.core.errors import InvariantError
from headway.core.events import Event, TimerFired
from headway.hosts.sim.kernel import TIMER, Kernel

__all__ = ["Driver", "Observer", "Recorder"]

#: Sees every event with what the policy did about it, before it is carried out.
Observer = Callable[[float, Event, Sequence[Action]], None]

#: A policy may wake up for nothing at one instant this often; then it would do so for ever.
MAX_IDLE_WAKES = 100


class Driver:
    """Drives one policy in virtual time.

    `carry_out(now, action)` must not feed events back at once, but schedule them. `on_wake(now)` is called
    before each `TimerFired`. Raises InvariantError when
    the policy wakes up for nothing at one instant again and again.
    """

    def __init__(
        self,
        policy: ClusterPolicy,
        kernel: Kernel,
        carry_out: Callable[[float, Action], None],
        observers: Iterable[Observer] = (),
        on_wake: Callable[[float], None] = lambda now: None,
    ) -> None:
        self._policy = policy
        self._kernel = kernel
        self._carry_out = carry_out
        self._observers = tuple(observers)
        self._on_wake = on_wake
        self._armed_s: float | None = None
        self._timer = 0
        self._rang_s = -1.0
        self._idle_wakes = 0

    def feed(self, event: Event, now: float) -> list[Action]:
        """Hand an event to the policy and carry out what it asks for."""
        actions = self._policy.handle(event, now)
        for observe in self._observers:
            observe(now, event, actions)
        for action in actions:
            self._carry_out(now, action)
        self._arm(now)
        return actions

    def _arm(self, now: float) -> None:
        """Set the timer if it is wanted earlier than it is set; one set too early sets itself anew.

        A policy that moves its wake-up time at every event would fill the heap with dead timers otherwise.
        """
        wake_s = self._policy.wake_at()
        if wake_s is None:
            return
        due_s = max(wake_s, now)
        if self._armed_s is None or due_s < self._armed_s:
            self._armed_s = due_s
            self._timer += 1
            self._kernel.at(due_s, TIMER, self._ring, self._timer)

    def _ring(self, now: float, timer: int) -> None:
        if timer != self._timer:
            return
        self._armed_s = None
        wake_s = self._policy.wake_at()
        if wake_s is None or wake_s > now:
            self._arm(now)
            return
        self._on_wake(now)
        acted = bool(self.feed(TimerFired(), now))
        self._count_idle_wakes(now, acted)

    def _count_idle_wakes(self, now: float, acted: bool) -> None:
        self._idle_wakes = 0 if acted or now > self._rang_s else self._idle_wakes + 1
        self._rang_s = now
        if self._idle_wakes > MAX_IDLE_WAKES:
            raise InvariantError(
                f"{type(self._policy).__name__} wants to be woken at {now!r} s again and again for nothing"
            )


class Recorder:
    """An observer that keeps the script of a run: (now, event) pairs without timers, which any host makes."""

    def __init__(self) -> None:
        self.script: list[tuple[float, Event]] = []

    def __call__(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        """Note the event."""
        if not isinstance(event, TimerFired):
            self.script.append((now, event))
