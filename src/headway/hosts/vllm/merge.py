"""Makes the events of one instance out of what its ranks tell. No IO, no clock.

Rule 1. One instance has one epoch and one sequence, whatever number of processes its ranks are.
Rule 2. Ranks in lockstep end their passes together: the pass is told once all that run one have ended it, or
        `GATHER_S` after the first did.
Rule 3. Independent ranks are told one by one.
Rule 4. A rank that says it has nothing left without a pass having ended (the last request was withdrawn)
        makes a snapshot: no pass will come to tell.
Rule 5. A rank nobody knew makes the instance a larger one, in a new epoch. It happens at the start only.
"""

from dataclasses import dataclass
from typing import Final

from headway.core.events import InstanceUp, PassEnded, Snapshot, StepModel
from headway.hosts.vllm.reports import Ended, Message, Shown, Started, Tally, Up

__all__ = ["GAP_S", "GATHER_S", "Merge", "Receipts"]

GATHER_S: Final = 0.005
GAP_S: Final = 1.0
#: A number this far from where the count stands belongs to another count.
_FAR: Final = 10_000


class Receipts:
    """Which dispatches an instance has received.

    A number is acknowledged when it and all lower ones are here. One that stays away for `GAP_S` while higher
    ones are here was refused at the door, or lost: it is passed over. Number 1 come again, or one far from
    where the count stands, begins a new count: the scheduler was restarted.
    """

    def __init__(self) -> None:
        self.acknowledged = 0
        self._ahead: dict[int, float] = {}  # number → when it came

    def receive(self, number: int, now: float) -> None:
        """Note that this number is here."""
        again = number == 1 and self.acknowledged > 0
        if again or abs(number - self.acknowledged) > _FAR:
            self._ahead = {}
            self.acknowledged = number - 1
        if number > self.acknowledged:
            self._ahead[number] = now
        self.catch_up(now)

    def catch_up(self, now: float) -> None:
        """Acknowledge what has become contiguous, or old."""
        while self._ahead:
            first = min(self._ahead)
            if first > self.acknowledged + 1 and now - self._ahead[first] < GAP_S:
                return
            del self._ahead[first]
            self.acknowledged = first


@dataclass(slots=True)
class _Rank:
    """The last word of a rank. `ran`: of the pass that is being gathered."""

    shown: Shown
    tally: Tally
    under_way: bool = False
    last: Ended | None = None
    ran: Ended | None = None


class Merge:
    """The instance. `epoch`: that of the wire format, a wall-clock millisecond of its start."""

    def __init__(self, name: str, epoch: int) -> None:
        self.ranks: list[_Rank] = []
        self._name = name
        self._epoch = epoch
        self._sequence = 0
        self._up: Up | None = None
        self._receipts = Receipts()
        self._gathering_s: float | None = None  # since the first rank of a pass ended it

    @property
    def due_s(self) -> float | None:
        """When `flush` has something to tell, if nothing comes before."""
        return None if self._gathering_s is None else self._gathering_s + GATHER_S

    def take(self, message: Message, now: float) -> list[InstanceUp | PassEnded | Snapshot]:
        """Take in what a rank says; return what is to be published."""
        if isinstance(message, Up):
            return self._join(message)
        if message.rank >= len(self.ranks) or self._up is None:
            return []
        rank = self.ranks[message.rank]
        if isinstance(message, Started):
            rank.under_way = True
            return []
        for number in message.dispatches:
            self._receipts.receive(number, now)
        self._receipts.catch_up(now)
        rank.shown, rank.tally, rank.last, rank.under_way = message.shown, message.tally, message, False
        if message.ran_tokens is None:
            return [self._snapshot()]
        if not self._up.lockstep:
            return [self._ended([message], message.rank)]
        rank.ran = message
        self._gathering_s = self._gathering_s or now
        return self._pass() if not any(other.under_way for other in self.ranks) else []

    def flush(self, now: float) -> list[InstanceUp | PassEnded | Snapshot]:
        """Tell a pass in lockstep that has been gathered for long enough."""
        return self._pass() if self.due_s is not None and now >= self.due_s else []

    def snapshot(self) -> list[InstanceUp | PassEnded | Snapshot]:
        """Say what the instance is and how it stands; nothing before a rank is there."""
        if self._up is None:
            return []
        return [self._up.instance_up(self._name, len(self.ranks), self._epoch), self._snapshot()]

    def _join(self, up: Up) -> list[InstanceUp | PassEnded | Snapshot]:
        known = len(self.ranks)
        while len(self.ranks) < max(up.ranks, up.rank + 1):
            self.ranks.append(_Rank(Shown(), Tally()))
        if self._up is not None and len(self.ranks) > known:
            self._epoch += 1
            self._sequence = 0
        if self._up is None or up.rank == 0:
            self._up = up
        return self.snapshot()

    def _pass(self) -> list[InstanceUp | PassEnded | Snapshot]:
        self._gathering_s = None
        told = [rank.ran or Ended(index, rank.shown, rank.tally, []) for index, rank in enumerate(self.ranks)]
        for rank in self.ranks:
            rank.ran = None
        return [self._ended(told, 0)]

    def _ended(self, told: list[Ended], first_rank: int) -> PassEnded:
        self._sequence += 1
        return PassEnded(
            self._name,
            self._epoch,
            self._sequence,
            self._receipts.acknowledged,
            max(each.duration_s for each in told),
            tuple([each.ran_tokens or 0 for each in told]),
            *_state([each.shown for each in told]),
            first_rank,
            _if_any([each.decode_model for each in told]),
            _if_any([each.mixed_model for each in told]),
        )

    def _snapshot(self) -> Snapshot:
        self._sequence += 1
        shown = [rank.shown for rank in self.ranks]
        busy = any(rank.running or rank.waiting for rank in shown)
        acknowledged = self._receipts.acknowledged
        return Snapshot(self._name, self._epoch, self._sequence, acknowledged, busy, *_state(shown))


_Counts = tuple[int, ...]


def _state(shown: list[Shown]) -> tuple[_Counts, _Counts, _Counts, _Counts, _Counts | None]:
    budgets = [rank.pab_tokens for rank in shown]
    known = [budget for budget in budgets if budget is not None]
    return (
        tuple([rank.queued_tokens for rank in shown]),
        tuple([rank.kv_blocks for rank in shown]),
        tuple([rank.running for rank in shown]),
        tuple([rank.waiting for rank in shown]),
        tuple(known) if len(known) == len(shown) else None,
    )


def _if_any(values: list[StepModel | None]) -> tuple[StepModel | None, ...] | None:
    return tuple(values) if any(value is not None for value in values) else None
