"""Decides whose fault it is when an engine fails a request, and whether the request is tried again.

Rule 1  (request)       a request that one engine of a role fails and then another fails too is to blame
                        itself: no engine is struck, it is tried no more, and its client gets the engine's own
                        answer. The second engine must be credible: one that lately failed everything it was
                        given proves nothing, and a third is asked.
Rule 2  (engine)        when another engine serves it, those that failed it before are at fault.
Rule 3  (once)          a request counts at most once against an engine.
Rule 4  (no evidence)   where no other engine tried it, its failure is weighed by `engine_health` (rule 3
                        there).
Rule 5  (backpressure)  a refusal by an engine that has enough costs no try and no budget, and is no fault.
                        A request counts once as such at an engine: one that is refused again and again may be
                        to blame itself. It waits longer each time, and no other request with it. The last of
                        `MOST_REFUSALS` by one engine is the client's answer, and so is the first where
                        retries are off.
Rule 6  (work done)     what an engine worked on for longer than its time-out is not computed again elsewhere,
                        unless the request streams and the engine answered nobody else meanwhile either.
Rule 7  (again)         nothing is tried again once the client has a byte, and an error is tried again only at
                        an engine that has not answered it, if one has room now.
"""

from dataclasses import dataclass
from enum import StrEnum

from headway.core.events import Role

__all__ = ["EngineFailure", "Fault", "RequestFaults", "Verdict"]

#: How long a request waits that an engine refuses for the second time; doubled each time, up to the most.
FIRST_BACKOFF_S, MOST_BACKOFF_S = 0.1, 2.0
#: So many refusals by one engine, about 15 s of waiting, end a request.
MOST_REFUSALS = 12


class Fault(StrEnum):
    """How an engine failed a request."""

    UNREACHABLE = "unreachable"  # no connection: it computed nothing
    DOWN = "down"  # it was taken out while the request was there
    BROKEN = "broken"  # the connection broke
    ERROR = "error"  # it answered an error of its own
    SILENT = "silent"  # it answered nobody, and the time-out passed
    SLOW = "slow"  # it answered others, and the time-out passed
    BACKPRESSURE = "backpressure"  # it has enough to do
    OURS = "ours"  # not the engine's: this host could not send, or the KV was lost


#: What another engine's failure of the same request explains (rule 1).
_EXPLAINED = frozenset((Fault.BROKEN, Fault.ERROR))
#: To try these again asks nothing more of an engine that lives: no budget is needed.
_FREE = frozenset((Fault.UNREACHABLE, Fault.DOWN, Fault.BROKEN, Fault.SILENT, Fault.OURS))


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """An engine that failed a request, and how."""

    engine: str
    role: Role
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about a failure.

    `retry`: place the request again. `costs_budget`: only if the budget of all retries allows it. `hold`:
    place it again without counting a try, `wait_s` from now. `exonerated`: engines that failed it without
    being at fault.
    """

    retry: bool = False
    costs_budget: bool = False
    hold: bool = False
    wait_s: float = 0.0
    exonerated: tuple[EngineFailure, ...] = ()


class RequestFaults:
    """What the engines made of one request. `attempts`: tries that engines failed."""

    def __init__(self, retries: int) -> None:
        self.attempts = 0
        self._retries = retries
        self._refusals: dict[str, int] = {}  # by engine that had enough to do
        self._suspects: dict[tuple[Role, str], EngineFailure] = {}

    def failed(
        self,
        fault: Fault,
        failure: EngineFailure | None,
        *,
        credible: bool = True,
        elsewhere: bool = True,
        begun: bool = False,
        streams: bool = True,
    ) -> Verdict:
        """Take in a failed try.

        `failure`: the engine concerned, if one is; `credible`: whether that engine lately served anything.
        `elsewhere`: whether another engine of its role has room to try. `begun`: the client has a byte.
        """
        if fault is Fault.BACKPRESSURE and not begun and self._retries:
            times = self._count_refusal(failure)
            if times < MOST_REFUSALS:
                return Verdict(retry=True, hold=True, wait_s=_backoff_s(times))
        self.attempts += 1
        if failure is not None and fault in _EXPLAINED:
            others = [key for key in self._suspects if key[0] is failure.role and key[1] != failure.engine]
            self._suspects.setdefault((failure.role, failure.engine), failure)
            if others and (credible or len(others) > 1):
                return Verdict(exonerated=self._clear(failure.role))
        may = not begun and self.attempts <= self._retries
        if fault in (Fault.SLOW, Fault.BACKPRESSURE) or (fault is Fault.SILENT and not streams):
            may = False
        if fault is Fault.ERROR and not elsewhere:
            may = False
        return Verdict(retry=may, costs_budget=fault not in _FREE)

    def _count_refusal(self, failure: EngineFailure | None) -> int:
        """Return how many times this engine refused the request, this time included."""
        engine = "" if failure is None else failure.engine
        times = self._refusals[engine] = self._refusals.get(engine, 0) + 1
        return times

    def tried(self, role: Role) -> frozenset[str]:
        """Return the engines of a role that failed it in a way that may be its own fault."""
        return frozenset(engine for of_role, engine in self._suspects if of_role is role)

    def served(self) -> tuple[EngineFailure, ...]:
        """Take in that the request is being served; return the engines at fault (rule 2)."""
        at_fault = tuple(self._suspects.values())
        self._suspects.clear()
        return at_fault

    def ended(self) -> tuple[tuple[EngineFailure, ...], tuple[EngineFailure, ...]]:
        """Take in that it is tried no more; return the engines that alone failed it, and the exonerated."""
        alone: tuple[EngineFailure, ...] = ()
        exonerated: tuple[EngineFailure, ...] = ()
        for role in {role for role, _ in self._suspects}:
            suspects = self._clear(role)
            if len(suspects) == 1:
                alone += suspects
            else:
                exonerated += suspects
        return alone, exonerated

    def _clear(self, role: Role) -> tuple[EngineFailure, ...]:
        keys = [key for key in self._suspects if key[0] is role]
        return tuple(self._suspects.pop(key) for key in keys)


def _backoff_s(times: int) -> float:
    """Return how long a request waits that an engine refused so many times: not at all after the first."""
    return 0.0 if times == 1 else min(MOST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (times - 2))
