"""Decides whether an engine gets work, from health checks and from what becomes of requests there.

    starting ──▶ up ──▶ ejected ──▶ down        ejected: takes nothing new; what runs there goes on
                 ▲ ◀──────┘          │          down: it is gone; what had no byte yet goes elsewhere
                 └───────────────────┘

`TRANSITIONS` is the whole state machine; everything else decides when a signal is due. Draining by an
operator is apart from it: it outlasts every state.

Rule 1 (unreachable)  a refused connection ejects at once: nothing can be served there.
Rule 2 (failures)     `eject_after` failed requests in a row eject, where another engine served each of them:
                      the engine is at fault. After a return from such an ejection one failure is enough.
Rule 3 (outlier)      failures that no other engine tried eject only when they cannot be the requests' fault:
                      when a row so long would be an accident of 1 in 100,000 at the rate at which the other
                      engines of the role fail.
Rule 4 (last engine)  the last engine of a role that takes work is not ejected for answers it gives.
Rule 5 (checks)       `down_after` failed health checks in a row take an engine down, one if it is ejected.
Rule 6 (return)       it returns after healthy checks in a row, twice as many after each ejection, and not
                      before `eject_for_s`. One that announced its end returns in a new epoch only.
Rule 7 (reasons)      why an engine is not up is reported at the first failed check, at each change of the
                      reason, after `REPORT_AGAIN_S`, and every `REPORT_EVERY_S` from then on.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "FORGIVEN_S",
    "REPORT_AGAIN_S",
    "REPORT_EVERY_S",
    "TRANSITIONS",
    "EngineHealth",
    "EngineState",
    "HealthChange",
    "HealthRules",
    "OutcomeRate",
    "Signal",
    "is_outlier",
]

#: Up for this long, an engine's ejections are forgotten.
FORGIVEN_S = 60.0
#: When the reason why an engine is not up is reported again, the first time and later.
REPORT_AGAIN_S, REPORT_EVERY_S = 5.0, 60.0
#: A row of failures less likely than this is no accident.
UNLIKELY = 1e-5
#: A share of the older outcomes that each new one pushes out: about the last 50 count.
FADE = 0.02


class EngineState(StrEnum):
    """Whether an engine gets work."""

    STARTING = "starting"
    UP = "up"
    EJECTED = "ejected"
    DOWN = "down"


class Signal(StrEnum):
    """What moves an engine from one state to another."""

    RECOVERED = "recovered"  # enough healthy checks in a row
    UNREACHABLE = "unreachable"  # connections are refused
    FAILING = "failing"  # it fails requests that others serve
    UNHEALTHY = "unhealthy"  # enough failed checks in a row
    DRAINS = "drains"  # it announced that it takes nothing new
    LEFT = "left"  # it announced its end


TRANSITIONS: dict[tuple[EngineState, Signal], EngineState] = {
    (EngineState.STARTING, Signal.RECOVERED): EngineState.UP,
    (EngineState.EJECTED, Signal.RECOVERED): EngineState.UP,
    (EngineState.DOWN, Signal.RECOVERED): EngineState.UP,
    (EngineState.UP, Signal.UNREACHABLE): EngineState.EJECTED,
    (EngineState.UP, Signal.FAILING): EngineState.EJECTED,
    (EngineState.UP, Signal.DRAINS): EngineState.EJECTED,
    (EngineState.UP, Signal.UNHEALTHY): EngineState.DOWN,
    (EngineState.EJECTED, Signal.UNHEALTHY): EngineState.DOWN,
    (EngineState.UP, Signal.LEFT): EngineState.DOWN,
    (EngineState.EJECTED, Signal.LEFT): EngineState.DOWN,
}


@dataclass(frozen=True, slots=True)
class HealthRules:
    """The numbers of the rules above.

    `eject_after`: 0 ejects for no failed request. `return_most`: most healthy checks that a return takes.
    `consecutive`: every failed request counts, also of the last engine (rules 3 and 4 are off).
    """

    eject_after: int = 3
    down_after: int = 3
    return_after: int = 1
    return_most: int = 16
    eject_for_s: float = 0.0
    consecutive: bool = False


@dataclass(frozen=True, slots=True)
class HealthChange:
    """A change of state, and why."""

    old: EngineState
    new: EngineState
    reason: str


@dataclass(slots=True)
class OutcomeRate:
    """How many of an engine's latest requests it served and failed; older ones fade out."""

    served: float = 0.0
    failed: float = 0.0

    def note(self, *, served: bool) -> None:
        """Count an outcome."""
        self.served = self.served * (1.0 - FADE) + served
        self.failed = self.failed * (1.0 - FADE) + (not served)

    def __add__(self, other: "OutcomeRate") -> "OutcomeRate":
        return OutcomeRate(self.served + other.served, self.failed + other.failed)


def is_outlier(failures: int, others: OutcomeRate) -> bool:
    """Whether so many failures in a row cannot be an accident at the rate at which other engines fail."""
    rate = (others.failed + 1.0) / (others.served + others.failed + 2.0)
    return rate**failures <= UNLIKELY


class EngineHealth:
    """The health of one engine.

    `missed`, `passed`: health checks in a row. `failures`: requests in a row that failed here and that
    another engine served, or that no other engine tried. `suspicions`: failures since the last success that
    were put down to the requests. `answered_s`: when any request was last answered. `reason`: why it is not
    up. `since_s`: when it entered its state.
    """

    def __init__(self, rules: HealthRules, now: float = -math.inf) -> None:
        self.rules = rules
        self.state = EngineState.STARTING
        self.leaving = False
        self.reason = "not checked yet"
        self.missed = 0
        self.passed = 0
        self.failures = 0
        self.suspicions = 0
        self.ejections = 0
        self.outcomes = OutcomeRate()
        self.answered_s = -math.inf
        self.up_since_s = math.inf
        self.since_s = now  # in this state
        self._ejected_s = -math.inf
        self._on_probation = False
        self._reported = ""  # the reason as it was last reported
        self._report_s = -math.inf  # when it is to be reported again

    @property
    def credible(self) -> bool:
        """Whether its failure speaks against the request: lately it did not fail everything."""
        return self.failures == 0 and self.suspicions < max(1, self.rules.eject_after)

    # Health checks

    def check_passed(self, now: float) -> bool:
        """Take in a healthy check; return whether the engine may return: `admit` it then."""
        self.missed = 0
        self.passed += 1
        if self.state is EngineState.UP:
            if now - self.up_since_s > FORGIVEN_S:
                self.ejections = 0
            return False
        return not self.leaving and (self.state is EngineState.STARTING or self._may_return(now))

    def _may_return(self, now: float) -> bool:
        rules = self.rules
        needed = min(rules.return_most, rules.return_after * 2 ** max(0, self.ejections - 1))
        return self.passed >= needed and now - self._ejected_s >= rules.eject_for_s

    def admit(self, now: float) -> HealthChange | None:
        """Let an engine take work."""
        change = self._move(Signal.RECOVERED, "", now)
        if change is not None:
            self.failures = 0
            self.up_since_s = now
            self._reported = ""
        return change

    def check_failed(self, now: float, reason: str, *, unreachable: bool) -> HealthChange | None:
        """Take in a failed check."""
        self.passed = 0
        self.missed += 1
        if self.state is not EngineState.UP:
            self.reason = reason
        enough = self.missed >= self.rules.down_after
        if unreachable or enough:
            self.reached_end()
        if self.state is EngineState.EJECTED or enough:
            self.ejections += self.state is EngineState.UP
            return self._move(Signal.UNHEALTHY, reason, now)
        if unreachable:
            return self._eject(Signal.UNREACHABLE, reason, now)
        return None

    def report_due(self, now: float) -> bool:
        """Whether to report why the engine is not up (rule 7); once it is asked, it counts as reported."""
        if self.state is EngineState.UP:
            return False
        if self._reported != self.reason:
            self._reported, self._report_s = self.reason, now + REPORT_AGAIN_S
            return True
        if now < self._report_s:
            return False
        self._report_s = now + REPORT_EVERY_S
        return True

    # Requests

    def served(self, now: float) -> None:
        """Take in that the engine served a request."""
        self.answered_s = now
        self.failures = self.suspicions = 0
        self._on_probation = False
        self.outcomes.note(served=True)

    def unreachable(self, now: float, reason: str) -> HealthChange | None:
        """Take in that a connection was refused."""
        return self._eject(Signal.UNREACHABLE, reason, now)

    def failed(self, now: float, reason: str, *, last: bool) -> HealthChange | None:
        """Take in that the engine failed a request that another one served. `last`: see rule 4."""
        self.outcomes.note(served=False)
        self.failures += 1
        needed = 1 if self._on_probation else self.rules.eject_after
        if self.failures < needed:
            return None
        return self._eject_for_failures(now, reason, last=last)

    def failed_alone(
        self, now: float, reason: str, *, others: OutcomeRate, last: bool
    ) -> HealthChange | None:
        """Take in that the engine failed a request that no other engine tried (rule 3).

        `others`: what the other engines of its role made of their requests.
        """
        self.outcomes.note(served=False)
        self.failures += 1
        needed = 1 if self._on_probation and self.rules.consecutive else self.rules.eject_after
        if self.failures < needed or not (self.rules.consecutive or is_outlier(self.failures, others)):
            return None
        return self._eject_for_failures(now, reason, last=last)

    def silent(self, now: float, reason: str) -> HealthChange | None:
        """Take in that the engine answered nobody while a request waited for its answer."""
        self.failures += 1
        if self.failures < self.rules.eject_after:
            return None
        return self._eject_for_failures(now, reason, last=False)

    def exonerated(self) -> None:
        """Take in that a request failed at other engines as well: the request is at fault."""
        self.suspicions += 1
        self.outcomes.note(served=False)

    def _eject_for_failures(self, now: float, reason: str, *, last: bool) -> HealthChange | None:
        if self.rules.eject_after == 0 or (last and not self.rules.consecutive):
            return None
        change = self._eject(Signal.FAILING, reason, now)
        self._on_probation = self._on_probation or change is not None
        return change

    # What it announces

    def drains(self, now: float, reason: str) -> HealthChange | None:
        """Take in that the engine takes nothing new until it restarts."""
        self.leaving = True
        return self._eject(Signal.DRAINS, reason, now)

    def left(self, now: float, reason: str) -> HealthChange | None:
        """Take in that the engine ended."""
        self.leaving = True
        return self._move(Signal.LEFT, reason, now)

    def reached_end(self) -> None:
        """Note that what it announced is over: it restarted, or was away."""
        if self.leaving:
            self.leaving = False
            self.passed = 0

    def removed(self, now: float, reason: str) -> HealthChange:
        """Take it out for good."""
        change = HealthChange(self.state, EngineState.DOWN, reason)
        self._enter(EngineState.DOWN, reason, now)
        return change

    # Moves

    def _eject(self, signal: Signal, reason: str, now: float) -> HealthChange | None:
        change = self._move(signal, reason, now)
        if change is not None:
            self.ejections += 1
            self._ejected_s = now
        return change

    def _move(self, signal: Signal, reason: str, now: float) -> HealthChange | None:
        new = TRANSITIONS.get((self.state, signal))
        if new is None:
            return None
        change = HealthChange(self.state, new, reason)
        self._enter(new, reason, now)
        return change

    def _enter(self, state: EngineState, reason: str, now: float) -> None:
        self.state, self.reason, self.since_s = state, reason, now
        if state is not EngineState.UP:
            self.passed = 0
